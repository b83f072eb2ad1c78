"""`python -m host.train`: what it learns, what it writes, and that stopping it costs nothing."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from host.data.shards import load_data
from host.device import mixed_precision_dtype
from host.model.diffusion import corrupt, counted_tokens, low_discrepancy_times
from host.train import trainer as train
from host.train.arguments import parse_arguments
from host.train.batches import story_indices
from host.train.checkpoint import BEST, LAST, Progress, load_model, read_progress
from host.train.logging import LOG_COLUMNS, LOG_FILE
from host.train.readings import StepResult
from host.train.run_folder import (
    CONFIG_FILE,
    VALIDATION_DRAWS,
    VALIDATION_SEED,
    TrainConfig,
    run_laid_out,
)
from host.train.trainer import Trainer
from shared.manifest import TOKENIZER
from tests.support.commands import call, refusal, small
from tests.support.nelbo import nelbo_sums

REPOSITORY = Path(__file__).parents[4]
CPU = torch.device("cpu")
Log = list[dict[str, str]]


def read_log(run: Path) -> Log:
    with (run / LOG_FILE).open(newline="") as file:
        return list(csv.DictReader(file))


def without_times(log: Log) -> list[tuple[str, ...]]:
    """What must not depend on the clock."""
    return [tuple(row[name] for name in ("step", "tokens", "loss", "valid", "lr", "grad_norm")) for row in log]


def trainer(data: Path, out: Path, *more: object, kind: type[Trainer] = Trainer) -> Trainer:
    """As main() makes it."""
    made: list[Trainer] = []

    def make() -> None:
        with run_laid_out(parse_arguments()) as (config, progress):
            made.append(kind(config, progress, data=load_data(config.data), device=CPU))

    call(make, *small(data, out, *more))
    return made[0]


def resumed(run: Path, *more: object) -> tuple[TrainConfig, Progress]:
    """What main() takes up."""
    with run_laid_out(parse_arguments(["--resume", str(run), *map(str, more)])) as found:
        return found


class StopsAtFive(Trainer):
    """Gets Ctrl-C during its fifth step."""

    def step(self) -> StepResult:
        self.stopping = self.progress.step == 4
        return super().step()


def assert_same_state(one: Path, other: Path) -> None:
    """Weights, average and optimizer state, bit for bit."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    assert {name.split(".")[0] for name in a} == {"model", "ema", "optimizer"}
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_train_learns_and_leaves_a_whole_run(trained: Path) -> None:
    log = read_log(trained)
    assert [int(row["step"]) for row in log] == list(range(1, 61))
    assert tuple(log[0]) == LOG_COLUMNS
    assert float(log[0]["loss"]) > 5.0  # ln 300 = 5.7
    assert sum(float(row["loss"]) for row in log[-10:]) / 10 < 2.5
    valid = [float(row["valid"]) for row in log if row["valid"]]
    assert len(valid) == 2 and valid[1] < valid[0]
    assert {p.name for p in trained.iterdir()} == {BEST, LAST, LOG_FILE, CONFIG_FILE, TOKENIZER, "curves.png"}
    progress = read_progress(trained / LAST)
    assert (progress.step, progress.data_stories) == (60, 396)
    assert progress.best_nats == pytest.approx(valid[1], abs=1e-4)
    assert progress.tokens_seen == int(log[-1]["tokens"])


def test_curves_are_a_real_picture(trained: Path) -> None:
    pixels = matplotlib.image.imread(trained / "curves.png")
    assert pixels.shape[:2] == (600, 800)


def test_learning_rate_rises_and_falls_in_the_log(trained: Path) -> None:
    rates = [float(row["lr"]) for row in read_log(trained)]
    assert max(rates) == pytest.approx(3e-3, rel=0.01)
    assert rates.index(max(rates)) <= 3  # 3 % of 60 steps
    assert rates[0] < 1e-4 and rates[-1] < 4e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [["--optimizer", "adamw"], ["--schedule", "cosine"], ["--objectives", "ar"]],
    ids=["adamw", "muon", "autoregressive"],
)
def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(data: Path, tmp_path: Path, flags: list[object]) -> None:
    length: list[object] = ["--steps", 8, "--valid-every", 3, *flags]
    call(train.main, *small(data, tmp_path / "whole", *length))
    trainer(data, tmp_path / "parted", *length, kind=StopsAtFive).run()
    assert read_progress(tmp_path / "parted" / LAST).step == 5
    call(train.main, "--resume", tmp_path / "parted")
    for file in (LAST, BEST):
        assert_same_state(tmp_path / "whole" / file, tmp_path / "parted" / file)
    assert without_times(read_log(tmp_path / "whole")) == without_times(read_log(tmp_path / "parted"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "valid_every"), [(signal.SIGINT, 1000), (signal.SIGHUP, 1000), (signal.SIGKILL, 3)])
def test_signal_in_the_middle_of_a_run_costs_nothing(
    data: Path, tmp_path: Path, number: signal.Signals, valid_every: int
) -> None:
    """Ctrl-C, or a terminal that closes, saves first; a killed run goes on from its last checkpoint.

    Either ends as if nothing had happened.
    """
    length: list[object] = ["--steps", 12, "--valid-every", valid_every]
    run = tmp_path / "signalled"
    process = subprocess.Popen(
        [sys.executable, "-m", "host.train", *map(str, small(data, run, *length))],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as here: the sums of two threads differ in their last bits
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (run / LOG_FILE).exists() or (run / LOG_FILE).read_text().count("\n") < 5:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    step = read_progress(run / LAST).step
    assert 3 <= step < 12
    if number != signal.SIGKILL:
        assert process.returncode == 0, err
        assert f"stopped at step {step}; continue with --resume {run}" in out
        assert len(read_log(run)) == step
    call(train.main, "--resume", run)
    call(train.main, *small(data, tmp_path / "whole", *length))
    assert_same_state(tmp_path / "whole" / LAST, run / LAST)
    assert without_times(read_log(tmp_path / "whole")) == without_times(read_log(run))


def test_step_of_a_batch_in_parts_is_that_of_one_pass(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "mixed_precision_dtype", lambda *_: None)
    found = []
    for micro in (3, 8):
        one = trainer(data, tmp_path / str(micro), "--micro-size", micro, "--lr", 1e-4, "--optimizer", "adamw")
        loss, norm, tokens, *_ = one.step()
        (optimizer,) = one.optimizers
        momentum = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in one.model.parameters()])
        weights = torch.cat([p.detach().flatten() for p in one.model.parameters()])
        found.append((loss, norm, tokens, momentum, weights))
    (loss, norm, tokens, momentum, weights), (loss_1, norm_1, tokens_1, momentum_1, weights_1) = found
    assert tokens == tokens_1
    assert float(loss) == pytest.approx(float(loss_1), rel=1e-5)
    assert float(norm) == pytest.approx(float(norm_1), rel=1e-4)
    assert float((momentum - momentum_1).norm() / momentum_1.norm()) < 1e-4
    assert float((weights - weights_1).abs().max()) < 1e-6


def test_gradients_are_clipped_to_norm_one(data: Path, tmp_path: Path) -> None:
    one = trainer(data, tmp_path / "run", "--optimizer", "adamw")
    norm = float(one.step().norm)
    assert norm > 2.0  # of the gradient as it was
    (optimizer,) = one.optimizers
    momentum = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in one.model.parameters()])
    assert float(momentum.norm()) == pytest.approx(0.1 * one.config.clip_norm, rel=1e-3)  # (1 − 0.9) × the clipped one


def test_validation_measures_the_average_and_leaves_the_weights_alone(data: Path, tmp_path: Path) -> None:
    one = trainer(data, tmp_path / "run", "--lr", 0.1)
    one.step()
    before = {n: p.detach().clone() for n, p in one.model.named_parameters()}
    measured = one.validate()
    assert all(torch.equal(p, before[n]) for n, p in one.model.named_parameters())
    assert one.validate() == measured  # the same noise every time
    one.model.load_state_dict(one.ema.shadow)
    assert one.validate() == measured


def test_bf16_steps_differ_in_few_shapes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU compiles a kernel for every new one; in float32, where it does not, nothing is added."""
    for dtype, multiples in ((torch.bfloat16, (16, 64)), (None, (1, 1))):
        monkeypatch.setattr(train, "mixed_precision_dtype", lambda *_, dtype=dtype: dtype)
        one = trainer(data, tmp_path / str(dtype))
        read_out: list[int] = []
        one.model.register_forward_hook(lambda model, given, states, seen=read_out: seen.append(len(states)))
        parts = one.batch_at(one.data.train, 0, 0, 8).parts
        for part in parts:
            one.summed_loss(part).backward()
        lengths = [part.rows.tokens.shape[1] for part in parts]
        assert [length % multiples[0] for length in lengths] == [0] * len(parts)
        assert read_out == [-(-len(part.at) // multiples[1]) * multiples[1] for part in parts]


@torch.no_grad()
def test_validation_is_the_bound_whatever_training_weighs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against its definition, over the two draws of stories and noise that every run is measured on."""
    monkeypatch.setattr(train, "mixed_precision_dtype", lambda *_: None)
    one = trainer(data, tmp_path / "run", "--weighting", "flat")
    nats, tokens = 0.0, 0
    stories = one.data.valid
    for draw in range(VALIDATION_DRAWS):
        noise = np.random.Generator(np.random.Philox(np.random.SeedSequence((VALIDATION_SEED, 1, draw))))
        wanted = story_indices(VALIDATION_SEED, draw, len(stories), len(stories))
        x0 = torch.from_numpy(stories.take(wanted).astype(np.int64))
        t = low_discrepancy_times(len(x0), float(noise.random()))
        noised = corrupt(x0, torch.from_numpy(noise.random(x0.shape, dtype=np.float32)), t, "linear")
        nats += float(nelbo_sums(one.model, noised, x0=x0, t=t, schedule="linear").sum())
        tokens += int(counted_tokens(x0).sum())
    assert one.validate() == pytest.approx(nats / tokens, rel=1e-5)


def test_half_precision_has_a_scaler_only_on_old_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mixed_precision_dtype(CPU) in (None, torch.bfloat16)
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bf16: has)
        assert mixed_precision_dtype(torch.device("cuda")) is dtype


def test_minutes_end_a_run(data: Path, tmp_path: Path) -> None:
    call(train.main, *small(data, tmp_path / "run", "--minutes", 0.01))
    progress = read_progress(tmp_path / "run" / LAST)
    assert progress.seconds >= 0.6
    assert progress.best_nats is not None


def test_finished_run_goes_on_for_more_steps(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(train.main, *small(data, tmp_path / "run", "--steps", 2))
    call(train.main, "--resume", tmp_path / "run", "--steps", 3)
    assert [row["step"] for row in read_log(tmp_path / "run")] == ["1", "2", "3"]
    assert "done; best validation loss" in capsys.readouterr().out


@pytest.mark.slow
def test_diffusion_starts_from_an_autoregressive_run(data: Path, tmp_path: Path) -> None:
    """Every weight is taken over; the time input, which the other lacks, starts fresh."""
    call(train.main, *small(data, tmp_path / "ar", "--objectives", "ar", "--steps", 3))
    started = trainer(data, tmp_path / "run")
    fresh = {n: p.detach().clone() for n, p in started.model.named_parameters()}
    started.start_from(tmp_path / "ar")
    theirs, _ = load_model(tmp_path / "ar" / BEST)
    weights = dict(theirs.named_parameters())
    assert theirs.time_mlp is None
    for name, parameter in started.model.named_parameters():
        expected = fresh[name] if name.startswith("time_mlp.") else weights[name]
        assert torch.equal(parameter, expected)
        assert torch.equal(started.ema.shadow[name], expected)
    call(train.main, *small(data, tmp_path / "other", "--steps", 1, "--init", tmp_path / "ar"))


def test_divergence_stops_before_anything_broken_is_saved(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = small(data, run, "--lr", 1e30, "--valid-every", 1)
    code, sentence = refusal(capsys, train.main, *arguments)
    assert code == 1
    assert sentence == ("the validation loss became nan at step 1; no checkpoint had been saved yet; try a lower --lr")
    assert not (run / LAST).exists()


def test_divergence_names_the_last_good_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    call(train.main, *small(data, run, "--steps", 2))
    config = json.loads((run / CONFIG_FILE).read_text())
    (run / CONFIG_FILE).write_text(json.dumps(config | {"lr": 1e30}))
    before = (run / LAST).read_bytes()
    code, sentence = refusal(capsys, train.main, "--resume", run, "--steps", 10)
    assert code == 1
    assert sentence == (f"the loss became nan at step 3; the last good checkpoint is {run / LAST}; try a lower --lr")
    assert (run / LAST).read_bytes() == before


def test_infinite_gradient_in_half_precision_touches_no_weight(data: Path, tmp_path: Path) -> None:
    """Of two optimizers, only one meets it; clipping by its norm would hand it to the other."""
    one = trainer(data, tmp_path / "run", "--optimizer", "muon")
    one.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    one.step()
    before = {n: p.detach().clone() for n, p in one.model.named_parameters()}
    weight = one.model.get_parameter("blocks.0.up.weight")
    hook = weight.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
    norm = one.step().norm
    assert not math.isfinite(norm)
    assert all(torch.equal(p, before[n]) for n, p in one.model.named_parameters())
    assert one.scaler.get_scale() == 512.0
    hook.remove()
    assert math.isfinite(one.step().norm)
    assert not torch.equal(one.model.head.weight, before["head.weight"])


@pytest.mark.slow
def test_resumed_run_keeps_a_new_length(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    call(train.main, *small(data, run, "--steps", 2))
    for steps in ([], ["--steps", 9]):
        config, progress = resumed(run, *steps)
        longer = StopsAtFive(config, progress, data=load_data(data), device=CPU)
        longer.resume()
        longer.run()
    assert read_progress(run / LAST).step == 5
    call(train.main, "--resume", run)
    assert read_progress(run / LAST).step == 9


def test_resumed_run_of_a_cpu_goes_on_where_a_scaler_is_needed(trained: Path) -> None:
    config, progress = resumed(trained)
    one = Trainer(config, progress, data=load_data(config.data), device=CPU)
    one.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    one.resume()
    assert one.progress.step == 60
    assert one.scaler.get_scale() == 1024.0
