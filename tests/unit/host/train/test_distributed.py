"""Two processes train as one does, stop together, and hand a run on to any number of processes."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from host.data.shards import load_data
from host.model.network import Denoiser, config_named
from host.train import trainer as train
from host.train.batches import MicroBatch, make_batch
from host.train.checkpoint import LAST, Progress, read_progress
from host.train.distributed import Ranks
from host.train.logging import LOG_FILE
from host.train.loss import WeightedLoss
from host.train.objectives import Settings
from host.train.run_folder import TrainConfig
from host.train.stages import training_loss
from host.train.trainer import Trainer
from tests.support.commands import call, small

REPOSITORY = Path(__file__).parents[4]
FLOAT32 = """
import os, signal, torch
from host.train import trainer as train
from shared.errors import run_main
torch.set_num_threads(1)
train.mixed_precision_dtype = lambda *_: None
step = train.Trainer.step
def interrupted(trainer):
    if trainer.progress.step == int(os.environ["STOP_AT"]) - 1 and trainer.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGINT)  # this process alone
    return step(trainer)
train.Trainer.step = interrupted
run_main(train.main)
"""


def two_processes(folder: Path, *arguments: object, stop_at: int = 0) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node 2`, in float32; the second process gets Ctrl-C in step `stop_at`."""
    script = folder / "float32.py"
    script.write_text(FLOAT32)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *arguments]
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "STOP_AT": str(stop_at)},
        capture_output=True,
        text=True,
        timeout=110,
    )


def curve(run: Path) -> list[list[float]]:
    with (run / LOG_FILE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [[float(row[name] or 0) for name in ("step", "tokens", "loss", "valid", "lr", "grad_norm")] for row in rows]


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "mixed_precision_dtype", lambda *_: None)


@pytest.mark.slow
@pytest.mark.usefixtures("float32")
def test_processes_stop_together_and_one_goes_on_along_the_same_curve(data: Path, tmp_path: Path) -> None:
    length: list[object] = ["--steps", 8, "--valid-every", 4, "--micro-size", 3]
    call(train.main, *small(data, tmp_path / "one", *length))
    run = tmp_path / "two"
    done = two_processes(tmp_path, *small(data, run, *length), stop_at=5)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{run}: stopped at step 5; continue with --resume {run}") == 1  # one of them speaks
    assert read_progress(run / LAST).step == 5
    call(train.main, "--resume", run)
    assert curve(run) == [pytest.approx(row, rel=1e-3) for row in curve(tmp_path / "one")]
    assert {p.name for p in run.iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}


@pytest.mark.slow
@pytest.mark.usefixtures("float32")
def test_processes_take_up_the_run_of_one(data: Path, tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    flags: list[object] = ["--optimizer", "muon", "--valid-every", 3, "--steps", 3]
    call(train.main, *small(data, run, *flags))
    one = curve(run)
    done = two_processes(tmp_path, "--resume", run, "--steps", 6)
    assert done.returncode == 0, done.stderr
    assert len(one) == 3 and curve(run)[:3] == one
    assert [row[0] for row in curve(run)] == [1, 2, 3, 4, 5, 6]
    call(train.main, *small(data, again, *flags))
    call(train.main, "--resume", again, "--steps", 6)
    assert curve(run) == [pytest.approx(row, rel=1e-3) for row in curve(again)]
    ours, theirs = load_file(run / LAST), load_file(again / LAST)
    assert ours.keys() == theirs.keys()
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in ours if n.startswith("model.")) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--batch-size", 1], "error: --batch-size 1 is too small to share among 2 processes\n"),
        (["--lr", "nan"], "error: --lr must be a number above 0, not nan\n"),
    ],
    ids=["layout", "command line"],
)
def test_processes_report_bad_input_in_one_sentence(
    data: Path, tmp_path: Path, flags: list[object], sentence: str
) -> None:
    done = two_processes(tmp_path, *small(data, tmp_path / "run"), *flags)
    assert done.returncode != 0
    assert done.stderr.count(sentence) == 1
    assert str(REPOSITORY / "host") not in done.stderr  # torchrun's own words aside
    assert not (tmp_path / "run").exists()


class ManyRanks(Ranks):
    """As if a hundred processes did what this one does."""

    def sums(self, *values: float) -> list[float]:
        return [100 * value for value in values]


def test_compute_seconds_are_those_of_all_processes(data: Path, tmp_path: Path) -> None:
    progress = Progress(config_named("debug"), {"canvas": 1.0}, "linear")
    config = TrainConfig(tmp_path, data, steps=3, batch_size=4)
    trainer = Trainer(config, progress, data=load_data(data), device=torch.device("cpu"), ranks=ManyRanks())
    before = time.process_time()
    trainer.run()
    assert trainer.progress.compute_seconds > time.process_time() - before


@pytest.mark.slow
def test_loss_compiles_whole(data: Path) -> None:
    """As on CUDA: traced without a break, for any batch; here its graph is run as it is."""
    model = Denoiser(config_named("debug"))
    plain = WeightedLoss(model)
    compiled = torch.compile(WeightedLoss(model), backend="aot_eager", fullgraph=True, dynamic=True)
    batch = make_batch(
        load_data(data).train, 0, seed=0, batch_size=12, micro_size=4, mixture={"canvas": 1.0}, settings=Settings()
    )
    for part in batch.parts:
        assert isinstance(part, MicroBatch)
        gradients = []
        for loss in (plain, compiled):
            model.zero_grad()
            value = loss(part)
            value.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-5
    assert isinstance(training_loss(model, torch.device("cpu"), Ranks()), WeightedLoss)
