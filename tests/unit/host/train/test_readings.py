"""A step does not wait for its device: what it leaves there is read once for several steps."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from host.data.shards import load_data
from host.train import trainer as train
from host.train.arguments import parse_arguments
from host.train.checkpoint import LAST
from host.train.logging import LOG_FILE, read_log
from host.train.readings import READ_EVERY, read, steps_between_readings
from host.train.run_folder import run_laid_out
from host.train.trainer import Trainer
from tests.support.commands import call, refusal, small

WAITS = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique2", "aten.equal"}
"""What hands a number, or a size, from a device to the host."""


class Waits(TorchDispatchMode):
    """Counts operations of this thread that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removesuffix(".default")
        by_mask = name.startswith("aten.index") and any(
            isinstance(index, torch.Tensor) and index.dtype is torch.bool
            for index in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        if name in WAITS or by_mask:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("flags", [["--objectives", "ar=2,infill,canvas"], ["--optimizer", "adamw"]], ids=str)
def test_step_reads_nothing_from_its_device(data: Path, tmp_path: Path, flags: list[str]) -> None:
    arguments = [str(one) for one in small(data, tmp_path / "run", *flags)]
    with run_laid_out(parse_arguments(arguments)) as (config, progress):
        trainer = Trainer(config, progress, data=load_data(data), device=torch.device("cpu"))
    with trainer._preparer:
        trainer.steps_unread()  # from here on batches are made by another thread
        trainer.read_every = 3
        with Waits() as waits:
            steps = trainer.steps_unread()
            assert waits.found == {} and len(steps) == 3
            losses, norms = read(steps)
    assert waits.found == {}  # tolist copies all of them at once
    assert losses == [float(step.loss) for step in steps] and all(norm > 0 for norm in norms)
    with Waits() as waits:
        float(steps[0].loss), torch.arange(4)[torch.arange(4) > 1]
    assert len(waits.found) == 2  # the counter counts


class ReadsSeldom(Trainer):
    """As on CUDA."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.read_every = 4


@pytest.mark.slow
def test_steps_that_are_read_together_are_the_same(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--steps", 11, "--valid-every", 5)
    call(train.main, *small(data, tmp_path / "each", *flags))
    monkeypatch.setattr(train, "Trainer", ReadsSeldom)
    call(train.main, *small(data, tmp_path / "four", *flags))
    each, four = (load_file(tmp_path / run / LAST) for run in ("each", "four"))
    assert all(torch.equal(each[name], four[name]) for name in each)
    rows, again = (read_log(tmp_path / run / LOG_FILE) for run in ("each", "four"))
    for name in ("step", "tokens", "loss", "valid", "lr", "grad_norm"):
        assert [row[name] for row in rows] == [row[name] for row in again]
    assert [row["step"] for row in again if row["valid"]] == ["5", "10", "11"]
    assert all(float(row["gflops"]) > 0 and float(row["memory_mb"]) > 10 and not row["mfu"] for row in again)
    seconds = [float(row["seconds"]) for row in again]
    assert seconds == sorted(seconds)


def test_divergence_between_readings_is_found_before_anything_is_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "Trainer", ReadsSeldom)
    run = tmp_path / "run"
    monkeypatch.setattr(train, "learning_rate_factor", lambda done, *of_run: 1.0 if done < 0.5 else 1e30)
    _, sentence = refusal(capsys, train.main, *small(data, run, "--steps", 16, "--valid-every", 4))
    assert sentence.startswith("the loss became nan at step 9; the last good checkpoint is ")
    assert all(value.isfinite().all() for value in load_file(run / LAST).values())


def test_readings_are_seldom_on_cuda_alone() -> None:
    assert [steps_between_readings(torch.device(name)) for name in ("cpu", "cuda")] == [1, READ_EVERY]
