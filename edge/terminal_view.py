"""A canvas unmasking in the terminal: redrawn in place, or a few plain lines where there is no terminal."""

import os
import re
import textwrap
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Final, TextIO

from shared.messages import Part, Partial

PLAIN_LINES: Final = 8
CONTROL: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
DIM, RESET = "\x1b[2m", "\x1b[0m"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
CLIP_LINES, WRAP_LINES = "\x1b[?7l", "\x1b[?7h"


def printable(text: str) -> str:
    """Text without control characters except line break and tab: it cannot steer a terminal."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def laid_out(text: str, out: TextIO) -> str:
    """A finished text for `out`: printable and wrapped between words on a terminal, unchanged elsewhere."""
    if not out.isatty():
        return text
    return "\n".join(wrap(printable(text), _size(out).columns))


def _size(out: TextIO) -> os.terminal_size:
    """Columns and rows of a terminal; some pseudo-terminals say 0, which counts as 80 columns."""
    size = os.get_terminal_size(out.fileno())
    return os.terminal_size((size.columns or 80, size.lines))


class Redrawn:
    """Lines redrawn in place on `out`; a context manager that leaves the terminal clean. live: whether it can be."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        # Without a known height, frames might scroll, and scrolled lines cannot be redrawn.
        self.live = out.isatty() and os.environ.get("TERM", "dumb") != "dumb" and _size(out).lines > 0
        self._drawn_lines = 0

    def __enter__(self) -> "Redrawn":
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()

    def draw(self, lines: Sequence[str], status: str) -> None:
        """Show as many lines as there is room for, in place of the last, and a dim one behind them."""
        shown = [*lines[: max(_size(self._out).lines - 2, 1)], f"{DIM}{status}{RESET}"]
        frame = "".join(f"{line}\n" for line in shown)
        # Clipping keeps one line one row even where characters are two columns wide.
        self._out.write(f"{self._rewind()}{HIDE_CURSOR}{CLIP_LINES}{frame}{WRAP_LINES}")
        self._out.flush()
        self._drawn_lines = len(shown)

    def clear(self) -> None:
        """Remove the lines from the terminal."""
        if self._drawn_lines:
            self._out.write(f"{self._rewind()}{SHOW_CURSOR}")
            self._out.flush()
            self._drawn_lines = 0

    def _rewind(self) -> str:
        return f"\x1b[{self._drawn_lines}F\x1b[J" if self._drawn_lines else ""


class View:
    """Shows one request's snapshots on `out`; a context manager that leaves the terminal clean."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._screen = Redrawn(out)
        self._next_plain_step = 0
        self._first: tuple[float, int] | None = None  # seconds and open positions at the first snapshot

    def __enter__(self) -> "View":
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()

    def show(self, partial: Partial) -> None:
        """Show a newer snapshot in place of the last."""
        if self._screen.live:
            self._screen.draw(dimmed(partial.parts, _size(self._out).columns), self._status(partial))
        elif partial.step >= self._next_plain_step:
            self._next_plain_step = partial.step + max(1, partial.steps // PLAIN_LINES)
            text = printable(partial.text).replace("\n", " ")
            self._out.write(f"{self._status(partial)}: {text}\n")
            self._out.flush()

    def clear(self) -> None:
        """Remove the canvas from the terminal."""
        self._screen.clear()

    def _status(self, partial: Partial) -> str:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, partial.masked)
        seconds, tokens = now - self._first[0], self._first[1] - partial.masked
        speed = f", {tokens / seconds:.0f} tokens/s" if seconds and tokens else ""
        # By blocks nobody knows how many passes there will be.
        of_all = f"/{partial.steps}, {partial.masked} open" if partial.appended is None else ""
        return f"step {partial.step}{of_all}{speed}"


def dimmed(parts: Sequence[Part], columns: int) -> list[str]:
    """Lines of at most `columns` characters, drafts dim."""
    text = printable("".join(part.text for part in parts)).replace("\t", " ")
    drafted = [part.draft for part in parts for _ in part.text]
    lines, at = [], 0
    for line in wrap(text, columns):
        cells = []
        for character in line:
            at = text.index(character, at)  # wrapping leaves out spaces and line breaks
            cells.append((drafted[at], character))
            at += 1
        runs = [(draft, "".join(c for _, c in run)) for draft, run in groupby(cells, lambda cell: cell[0])]
        lines.append("".join(f"{DIM}{run}{RESET}" if draft else run for draft, run in runs))
    return lines


def wrap(text: str, columns: int) -> list[str]:
    """Lines of at most `columns` characters, broken between words; line breaks of the text stay."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines += textwrap.wrap(paragraph, columns, break_on_hyphens=False) or [""]
    return lines
