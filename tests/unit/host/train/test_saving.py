"""Between validations, too, a run is saved every few minutes, and only while it works."""

from pathlib import Path

import pytest
import torch

from host import device
from host.device import CpuSpeeds
from host.train import trainer as train
from host.train.checkpoint import LAST, read_progress
from host.train.readings import StepResult
from host.train.trainer import Trainer
from tests.support.commands import call, refusal, small


class DiesAtFive(Trainer):
    """Ends without a word in its fifth step."""

    def step(self) -> StepResult:
        if self.progress.step == 4:
            raise KeyboardInterrupt
        return super().step()


def test_saving_between_validations_is_every_few_minutes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(train, "Trainer", DiesAtFive)
    with pytest.raises(KeyboardInterrupt):
        call(train.main, *small(data, tmp_path / "run", "--steps", 9, "--valid-every", 99))
    assert read_progress(tmp_path / "run" / LAST).step == 3  # whose loss, in the fourth step, was a number


def test_saving_between_validations_leaves_what_can_be_continued(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that diverges keeps the weights from before, not those that do not work."""
    monkeypatch.setattr(train, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(train, "learning_rate_factor", lambda done, *of_run: 1.0 if done < 0.5 else 1e30)
    run = tmp_path / "run"
    refusal(capsys, train.main, *small(data, run, "--steps", 8))
    step = read_progress(run / LAST).step
    assert 1 <= step <= 4
    monkeypatch.setattr(train, "learning_rate_factor", lambda done, *of_run: 1e-3)
    call(train.main, "--resume", run, "--steps", step + 1)


@pytest.mark.parametrize("bf16", [1.0, 3.0], ids=["float32", "bf16"])
def test_saving_keeps_the_type_that_a_cpu_trained_in(
    bf16: float, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever is faster when the run goes on: in the other it would not repeat the uninterrupted one."""
    seen: list[torch.dtype | None] = []

    class Recorded(Trainer):
        def step(self) -> StepResult:
            seen.append(self.dtype)
            return super().step()

    monkeypatch.setattr(train, "Trainer", Recorded)
    monkeypatch.setattr(device, "has_bf16_instructions", lambda: True)
    monkeypatch.setattr(device, "cpu_speeds", lambda: CpuSpeeds(2.0, bf16))
    call(train.main, *small(data, tmp_path / "run", "--steps", 1))
    monkeypatch.setattr(device, "cpu_speeds", lambda: CpuSpeeds(2.0, 4.0 - bf16))
    for steps in (2, 3):
        call(train.main, "--resume", tmp_path / "run", "--steps", steps)
    assert seen == [torch.bfloat16 if bf16 > 2 else None] * 3
