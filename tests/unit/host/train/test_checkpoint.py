"""Checkpoints are whole or not there, and say so when they are not ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from host.model.network import Denoiser, ModelConfig, config_named
from host.train.checkpoint import (
    BEST,
    LAST,
    Progress,
    find_checkpoint,
    init_from,
    load_model,
    newest_run,
    read_progress,
    restore,
    save_checkpoint,
)
from host.train.optim import Ema, build_optimizers
from shared.errors import DataError, DiffusionLLMError
from tests.support.commands import small_disk

REPOSITORY = Path(__file__).parents[4]
DEBUG = config_named("debug")
CPU_SCALER = torch.amp.GradScaler("cpu", enabled=False)

KILLED_WHILE_SAVING = """
import os, resource, signal, sys, time
from pathlib import Path
import torch
from host.train.checkpoint import Progress, load_model, save_checkpoint
from host.model.network import Denoiser, config_named
from host.train.optim import Ema, build_optimizers
torch.set_num_threads(1)
config = config_named("debug")
model = Denoiser(config)
optimizers, ema = build_optimizers(model, "adamw", lr=1e-3), Ema(model, 0.9)
scaler = torch.amp.GradScaler("cpu", enabled=False)
state = {"model": model, "ema": ema, "optimizers": optimizers, "scaler": scaler}
path = Path(sys.argv[1]) / "last.safetensors"
def assert_whole():
    loaded, progress = load_model(path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))
    assert {p.name for p in path.parent.iterdir()} <= {path.name, "last.saving"}  # the next save clears that away
for attempt in range(8):
    child = os.fork()
    if child == 0:
        for step in range(1_000_000):
            save_checkpoint(path, Progress(config, {"canvas": 1.0}, "linear", step), **state)
    while not path.exists():
        time.sleep(0.001)
    time.sleep(0.003 * attempt)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert_whole()
for written in (1, 10_000, path.stat().st_size - 1):  # the system kills who writes on
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (written, written))
        save_checkpoint(path, Progress(config, {"canvas": 1.0}, "linear"), **state)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGXFSZ
    assert_whole()
print("whole every time")
"""

ON_A_FULL_DISK = """\
import sys, torch
from pathlib import Path
from host.train.checkpoint import Progress, load_model, read_progress, save_checkpoint
from host.model.network import CONFIGS, Denoiser
from host.train.optim import Ema
from shared.errors import DiffusionLLMError

path, config = Path(sys.argv[1]) / "last.safetensors", CONFIGS["debug"]
model, scaler = Denoiser(config), torch.amp.GradScaler("cpu", enabled=False)
state = {"model": model, "ema": Ema(model, 0.9), "optimizers": [], "scaler": scaler}
save_checkpoint(path, Progress(config, {"canvas": 1.0}, "linear", 1), **state)
try:
    save_checkpoint(path, Progress(config, {"canvas": 1.0}, "linear", 2), **state)
except DiffusionLLMError as error:
    print(error)
load_model(path)
print("step", read_progress(path).step, sorted(p.name for p in path.parent.iterdir()))
"""


def save(path: Path, model: Denoiser, objective: str = "canvas") -> None:
    progress = Progress(model.config, {objective: 1.0}, "cosine", step=7, best_nats=1.5)
    optimizers = build_optimizers(model, "adamw", lr=1e-3)
    save_checkpoint(path, progress, model=model, ema=Ema(model, 0.9), optimizers=optimizers, scaler=CPU_SCALER)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of an untrained network."""
    path = tmp_path / LAST
    save(path, Denoiser(DEBUG))
    return path


def test_checkpoint_holds_plain_tensors_and_json(checkpoint: Path) -> None:
    with safe_open(checkpoint, framework="pt") as file:
        assert set(file.metadata()) == {"progress", "scaler"}
    assert all(name.startswith(("model.", "ema.")) for name in load_file(checkpoint))
    assert read_progress(checkpoint) == Progress(DEBUG, {"canvas": 1.0}, "cosine", step=7, best_nats=1.5)
    assert [p.name for p in checkpoint.parent.iterdir()] == [LAST]


def test_load_model_takes_the_ema_weights(tmp_path: Path) -> None:
    model = Denoiser(DEBUG)
    ema = Ema(model, 0.9)
    with torch.no_grad():
        model.head.bias.add_(1.0)
    progress = Progress(DEBUG, {"canvas": 1.0}, "linear")
    save_checkpoint(tmp_path / LAST, progress, model=model, ema=ema, optimizers=[], scaler=CPU_SCALER)
    averaged, _ = load_model(tmp_path / LAST)
    assert torch.equal(averaged.head.bias, torch.zeros(512))
    assert not averaged.training


@pytest.mark.slow
def test_save_checkpoint_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "whole every time\n", done.stderr


def test_checkpoint_is_as_readable_as_other_files(checkpoint: Path) -> None:
    (checkpoint.parent / "other").touch()
    assert checkpoint.stat().st_mode == (checkpoint.parent / "other").stat().st_mode


def test_save_checkpoint_clears_what_a_killed_save_left(checkpoint: Path) -> None:
    left = checkpoint.with_suffix(".saving")
    left.mkdir()
    (left / ".tmpA1b2C3").write_bytes(b"half of a checkpoi")
    save(checkpoint, Denoiser(DEBUG))
    assert [path.name for path in checkpoint.parent.iterdir()] == [LAST]
    load_model(checkpoint)


def test_save_checkpoint_to_a_refusing_disk_keeps_the_old_file(checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    refused = pytest.raises(DiffusionLLMError, match=r"the checkpoint .*last\.safetensors cannot be written: ")
    with refused, small_disk(10_000):
        save(checkpoint, Denoiser(DEBUG))
    assert checkpoint.read_bytes() == before
    assert [p.name for p in checkpoint.parent.iterdir()] == [LAST]


@pytest.mark.slow
def test_save_checkpoint_to_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    """A real one, of 2 MiB, with room for one checkpoint and the first third of another."""
    mounted = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=2m none "$0" && exec "$@"', str(tmp_path)]
    if subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a disk of their own")
    done = subprocess.run(
        [*mounted, sys.executable, "-c", ON_A_FULL_DISK, str(tmp_path)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    refused, whole = done.stdout.splitlines() or [done.stderr, ""]
    assert refused.startswith(f"the checkpoint {tmp_path / LAST} cannot be written: ") and "No space left" in refused
    assert whole == "step 1 ['last.safetensors']"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "cannot be read: "),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "cannot be read: "),
        (lambda path: path.write_bytes(b""), "cannot be read: "),
        (lambda path: path.write_text("Once upon a time"), "cannot be read: "),
        (lambda path: path.unlink(), "cannot be read: "),
        (lambda path: save_file({"x": torch.zeros(3)}, path), "is not a checkpoint of this project: "),
        (
            lambda path: save_file({"x": torch.zeros(3)}, path, metadata={"progress": '{"step": "seven"}'}),
            "is not a checkpoint of this project: ",
        ),
    ],
    ids=["cut at the end", "cut in its header", "empty", "text", "missing", "foreign", "foreign progress"],
)
def test_load_model_refuses_a_damaged_or_foreign_file(checkpoint: Path, damage: object, words: str) -> None:
    assert callable(damage)
    damage(checkpoint)
    with pytest.raises(DataError) as refused:
        load_model(checkpoint)
    assert str(refused.value).count("\n") == 0
    assert words in str(refused.value)
    assert str(checkpoint) in str(refused.value)


def test_load_model_refuses_a_checkpoint_without_its_weights(checkpoint: Path) -> None:
    with safe_open(checkpoint, framework="pt") as file:
        metadata = file.metadata()
    save_file({"model.x": torch.zeros(1)}, checkpoint, metadata=metadata)
    with pytest.raises(DataError, match="does not hold the weights"):
        load_model(checkpoint)


def test_restore_refuses_a_run_of_another_shape(checkpoint: Path) -> None:
    other = Denoiser(ModelConfig("debug", d_model=32, layers=1, heads=2, vocab_size=512))
    optimizers = build_optimizers(other, "adamw", lr=1e-3)
    with pytest.raises(DataError, match="was trained as ModelConfig"):
        restore(checkpoint, other, ema=Ema(other, 0.9), optimizers=optimizers, scaler=CPU_SCALER)


def test_init_from_refuses_weights_of_another_shape(checkpoint: Path) -> None:
    other = Denoiser(ModelConfig("debug", d_model=64, layers=3, heads=2, vocab_size=512))
    with pytest.raises(DataError, match=r"blocks\.2\.norm1\.weight is missing or has another shape"):
        init_from(other, checkpoint)


def test_find_checkpoint_prefers_the_best_and_takes_the_last(tmp_path: Path) -> None:
    save(tmp_path / LAST, Denoiser(DEBUG))
    assert find_checkpoint(tmp_path) == tmp_path / LAST
    save(tmp_path / BEST, Denoiser(DEBUG))
    assert find_checkpoint(tmp_path) == tmp_path / BEST
    assert find_checkpoint(tmp_path, LAST) == tmp_path / LAST


def test_newest_run_is_the_diffusion_run_trained_last(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no trained run in .*: make one with `python -m host.train`"):
        newest_run(tmp_path)
    model = Denoiser(DEBUG)
    for age, (name, objective) in enumerate([("ar", "ar"), ("new", "canvas"), ("old", "canvas")]):
        (tmp_path / name).mkdir()
        save(tmp_path / name / LAST, model, objective)
        os.utime(tmp_path / name / LAST, (1e9 - age, 1e9 - age))
    assert newest_run(tmp_path) == tmp_path / "new"
