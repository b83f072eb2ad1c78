"""Call a command line as a user does, without paying for a new interpreter."""

import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared.errors import run_main


def call(main: Callable[[], int | None], *arguments: object) -> None:
    """Run `main` with these arguments; errors pass through, signal handlers are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, arguments)])
        try:
            main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def refusal(capsys: pytest.CaptureFixture[str], main: Callable[[], int | None], *arguments: object) -> tuple[int, str]:
    """Run `main` to its error.  → exit code, the one sentence that the user reads"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(lambda: run_main(main), *arguments)
    printed = capsys.readouterr().err
    # A bar that an earlier test's traceback keeps alive makes the next one move the cursor up again: CSI A.
    *before, last = [line for line in printed.replace("\x1b[A", "").splitlines() if line]
    assert last.startswith("error: "), printed[-1000:]
    assert not any(line.startswith(("error", "Traceback")) for line in before)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, last.removeprefix("error: ")


def small(data: Path, out: Path, *more: object) -> list[object]:
    """Arguments of a training run whose steps take milliseconds; by masked diffusion where nothing else is said."""
    said = {"--objectives", "--stage"} & set(map(str, more))
    of_canvas = () if said else ("--objectives", "canvas")
    return ["--config", "debug", "--data", data, "--out", out, "--batch-size", 8, *of_canvas, *more]


@contextmanager
def small_disk(largest_file: int) -> Iterator[None]:
    """The system refuses to write files of more bytes than that, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
