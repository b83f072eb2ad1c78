"""What a run tells of itself: its log, and the picture of it."""

import io
import itertools
import math
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes

from host.device import machine_of, mixed_precision_dtype, work_clock
from host.model.network import config_named
from host.train import plots
from host.train import trainer as train
from host.train.checkpoint import Progress
from host.train.logging import LOG_FILE, LogRow, open_log, progress_bar, read_log
from host.train.plots import plot_curves
from host.train.run_folder import TrainConfig, counted_seconds, fraction_done, validation_due
from tests.support.commands import call, small

PLAIN = LogRow(step=0, tokens=0, seconds=0, loss=1, valid=None, lr=1e-3, grad_norm=1, tokens_per_s=100, compute_s=0)


def row_of(step: int, **changes: float | None) -> LogRow:
    return replace(PLAIN, step=step, seconds=changes.pop("seconds", step), **changes)  # type: ignore[arg-type]


def test_curves_show_an_overfitting_run_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training loss far below, validation loss far above where both began."""
    with open_log(tmp_path / LOG_FILE, 0) as log:
        for step in range(1, 101):
            valid = 3 + 0.05 * step if step % 10 == 0 else None
            log(row_of(step, tokens=100 * step, loss=4 * math.exp(-step / 10), valid=valid))
    limits: list[tuple[float, float]] = []
    monkeypatch.setattr(Axes, "set_ylim", lambda axes, low, high: limits.append((low, high)))
    plot_curves(tmp_path)
    ((low, high),) = limits
    assert low < 0.2
    assert high > 8


def test_curves_draw_loss_validation_and_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_log(tmp_path / LOG_FILE, 0) as log:
        for step, valid in ((1, None), (2, 3.5), (3, 3.0)):
            log(row_of(step, tokens=step * 1_000_000, loss=6 - step, valid=valid, lr=step / 100))
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save_picture", lambda figure, path: drawn.append(figure))
    plots.plot_curves(tmp_path)
    above, below = drawn[0].axes
    loss, smooth, valid_curve = (line.get_xydata().tolist() for line in above.lines)
    assert loss == [[1, 5], [2, 4], [3, 3]]
    assert smooth == [pytest.approx(point) for point in ([1, 5], [2, 4.95], [3, 4.8525])]
    assert valid_curve == [[2, 3.5], [3, 3.0]]
    assert below.lines[0].get_xydata().tolist() == [[1, 0.01], [2, 0.02], [3, 0.03]]


class Terminal(io.StringIO):
    """Until its reader leaves."""

    left = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.left:
            raise BrokenPipeError
        return super().write(text)


def test_progress_bar_whose_reader_left_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `host.train 2>&1 | tee log` and Ctrl-C, which `tee` gets first: the run has yet to be saved."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(3, None) as show:
        for step in (1, 2, 3):
            time.sleep(0.21)  # so that the bar is drawn
            show(row_of(step))
            terminal.left = True
    assert "1/3" in terminal.getvalue()
    assert "2/3" not in terminal.getvalue()


def test_progress_in_a_log_file_is_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress_bar(300, None) as show:
        for step in range(1, 301):
            time.sleep(0.002)
            show(row_of(step, loss=1.5, valid=2.5, tokens_per_s=1000.0))
    lines = log.getvalue().splitlines()
    assert len(lines) == 2 and "\r" not in log.getvalue()
    assert "300/300 steps" in lines[-1] and "loss 1.500, validation 2.500, 1,000 tokens/s" in lines[-1]


def test_progress_with_minutes_counts_minutes_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress_bar(20_000, 2.0) as show:
        show(row_of(7, seconds=90.0, loss=1.5, tokens_per_s=1000.0))
    last = log.getvalue().splitlines()[-1]
    assert "1.5/2 min" in last and "step 7, loss 1.500, 1,000 tokens/s" in last


@pytest.mark.parametrize(
    ("config", "due"),
    [
        ({"steps": 10}, [2, 4, 6, 8, 10]),
        ({"steps": 1100}, [220, 440, 500, 660, 880, 1000, 1100]),
        ({"steps": 10, "valid_every": 4}, [4, 8, 10]),
        ({"minutes": 0.1}, [2, 3, 4, 5, 6]),  # steps of a second: fifths of six end at 1.2, 2.4, 3.6, 4.8, 6
    ],
)
def test_validation_is_due_at_each_fifth_of_a_short_run(config: dict[str, float], due: list[int]) -> None:
    settings = TrainConfig(Path(), Path(), **config)  # type: ignore[arg-type]
    at = [Progress(config_named("debug"), {"ar": 1.0}, "linear", step=step, seconds=step) for step in range(1101)]
    going = [(a, b) for a, b in itertools.pairwise(at) if fraction_done(settings, a) < 1]
    assert [b.step for a, b in going if validation_due(settings, a, b)] == due


def test_counted_seconds_of_a_pause_are_those_of_a_few_steps() -> None:
    """A machine suspended for an hour; then one that has become ten times slower for good."""
    counted, usual = counted_seconds(1.0, math.inf)
    assert counted_seconds(1.0, usual) == (1.0, 1.0)
    assert counted_seconds(3600.0, usual)[0] == 4.0
    for _ in range(50):
        counted, usual = counted_seconds(10.0, usual)
    assert counted == 10.0


def test_train_says_first_what_it_trains_and_where(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cpu = tmp_path / "run", torch.device("cpu")
    call(train.main, *small(data, run, "--steps", 1))
    first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("debug, 0.") and "M parameters" in first and first.endswith(" threads")
    assert machine_of(cpu, mixed_precision_dtype(cpu)) in first
    assert second == f"data {data}: 396 stories; 1 steps, 8 stories a step, from step 0"
    assert third == f"run folder {run}: Ctrl-C saves and ends; go on with --resume {run}"


@pytest.mark.parametrize(("device", "seconds"), [("cpu", 0.0), ("cuda", 0.05)])
def test_work_clock_counts_a_wait_on_a_gpu_alone(device: str, seconds: float) -> None:
    """CPU-hours of CUDA training were those of its host, which mostly waits."""
    clock = work_clock(torch.device(device))
    before = clock()
    time.sleep(0.05)
    assert seconds <= clock() - before
    if not seconds:
        assert clock() - before < 0.03


def test_read_log_leaves_out_lines_that_a_crash_spoilt(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    rows = read_log(run / LOG_FILE)
    with (run / LOG_FILE).open("ab") as file:
        file.write(b"\0\0\0\0\0\n6\xff1,x\n,,,\n61,12")
    assert read_log(run / LOG_FILE) == rows
