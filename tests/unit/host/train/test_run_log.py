"""What a run tells of itself: its log, and the picture of it."""

import io
import math
import shutil
import sys
import time
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from host.train.logging import LOG_FILE, open_log, progress_bar, read_log
from host.train.plots import plot_curves


def test_curves_show_an_overfitting_run_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training loss far below, validation loss far above where both began."""
    with open_log(tmp_path / LOG_FILE, 0) as log:
        for step in range(1, 101):
            valid = 3 + 0.05 * step if step % 10 == 0 else ""
            log((step, 100 * step, step, 4 * math.exp(-step / 10), valid, 1e-3, 1, 100, step))
    limits: list[tuple[float, float]] = []
    monkeypatch.setattr(Axes, "set_ylim", lambda axes, low, high: limits.append((low, high)))
    plot_curves(tmp_path)
    ((low, high),) = limits
    assert low < 0.2
    assert high > 8


class Terminal(io.StringIO):
    """Until its reader leaves."""

    left = False

    def write(self, text: str) -> int:
        if self.left:
            raise BrokenPipeError
        return super().write(text)


def test_a_bar_whose_reader_left_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `host.train 2>&1 | tee log` and Ctrl-C, which `tee` gets first: the run has yet to be saved."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(3, None) as show:
        for step in (1, 2, 3):
            time.sleep(0.11)  # so that the bar is drawn
            show(step, step, 1.0, None, 1.0)
            terminal.left = True
    assert "1/3" in terminal.getvalue()
    assert "2/3" not in terminal.getvalue()


def test_lines_of_the_log_that_a_crash_spoilt_do_not_count(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    rows = read_log(run / LOG_FILE)
    with (run / LOG_FILE).open("ab") as file:
        file.write(b"\0\0\0\0\0\n6\xff1,x\n,,,\n61,12")
    assert read_log(run / LOG_FILE) == rows
