"""Progress of long work: a bar on a terminal; anywhere else, as in a log file, a line every few seconds."""

import io
import sys
from typing import Any, Final, TextIO

from tqdm import tqdm

LINE_EVERY_S: Final = 10.0


class _Lines(io.TextIOBase):
    """Turns each redraw of a bar, which starts with a carriage return, into a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if shown := text.strip():
            self._stream.write(f"{shown}\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def progress(iterable: Any = None, *, bar_format: str | None = None, **options: Any) -> Any:
    """`tqdm(iterable, bar_format=bar_format, **options)` on standard error; `|{bar}|` is left out of lines."""
    if sys.stderr.isatty():
        return tqdm(iterable, bar_format=bar_format, dynamic_ncols=True, mininterval=0.2, **options)
    options |= {"file": _Lines(sys.stderr), "mininterval": LINE_EVERY_S, "maxinterval": LINE_EVERY_S}
    if bar_format is None:
        return tqdm(iterable, ncols=0, **options)
    return tqdm(iterable, bar_format=bar_format.replace("|{bar}|", ""), **options)
