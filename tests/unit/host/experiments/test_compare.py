"""`python -m host.baseline` and `host.compare`: runs at equal hours, charged for what they began with."""

import csv
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import Tensor

from host.data.shards import load_data
from host.data.tokenizer import load_tokenizer
from host.experiments import baseline, compare
from host.experiments.baseline import Baseline, BaselineLoop
from host.experiments.compare import Curve, Point
from host.model.diffusion import corrupt, low_discrepancy_times
from host.model.network import Denoiser, ModelConfig
from host.train import trainer as train
from host.train.batches import story_indices
from host.train.checkpoint import find_checkpoint, read_progress
from host.train.run_folder import VALIDATION_DRAWS, VALIDATION_SEED, TrainConfig, write_config
from shared.tokens import EOS, FIRST_TEXT_ID
from tests.support.commands import call, refusal
from tests.support.nelbo import nelbo_sums


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoregressive run, a diffusion run that began with it, and the baseline."""
    out = tmp_path_factory.mktemp("compared")
    common = ("--config", "debug", "--data", data, "--valid-every", 2)
    call(train.main, *common, "--batch-size", 8, "--steps", 4, "--objectives", "ar", "--out", out / "ar")
    ours = ("--objectives", "canvas", "--init", out / "ar", "--out", out / "ours")
    call(train.main, *common, "--batch-size", 8, "--steps", 6, *ours)
    call(baseline.main, *common, "--steps", 4, "--out", out / "baseline")
    return out


@pytest.mark.slow
def test_compare_prints_a_table_and_draws_a_picture(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    call(compare.main, *(f"{name}={runs / name}" for name in ("ours", "baseline", "ar")), "--out", picture)
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    head, _, *rows = lines
    assert head[:5] == ["run", compare.HOURS, "million tokens", "epochs", "bits per byte"]
    assert [row[0] for row in rows] == ["ours", "baseline", "ar"]
    assert all(0 < float(row[4]) < 20 for row in rows)
    assert matplotlib.image.imread(picture).shape == (450, 1100, 4)


@pytest.mark.slow
def test_compare_charges_a_run_for_the_one_it_began_with(runs: Path) -> None:
    parent = read_progress(find_checkpoint(runs / "ar"))
    with (runs / "ours" / "log.csv").open(newline="") as file:
        logged = [row for row in csv.DictReader(file) if row["valid"]]
    points = compare.read_curve("ours", runs / "ours").points
    assert parent.compute_seconds > 0
    assert [p.compute_s for p in points] == pytest.approx(
        [parent.compute_seconds + float(row["compute_s"]) for row in logged]
    )
    assert [p.tokens for p in points] == [parent.tokens_seen + int(row["tokens"]) for row in logged]


@pytest.mark.slow
def test_compare_keeps_what_a_run_began_with(runs: Path, data: Path, tmp_path: Path) -> None:
    """However long that one is trained afterwards, and when it is gone."""
    parent, child = tmp_path / "ar", tmp_path / "ours"
    common = ("--config", "debug", "--data", data, "--valid-every", 2, "--batch-size", 8)
    shutil.copytree(runs / "ar", parent)
    call(train.main, *common, "--objectives", "canvas", "--steps", 2, "--init", parent, "--out", child)
    before = compare.read_curve("ours", child)
    assert before.points[0].compute_s >= read_progress(find_checkpoint(runs / "ar")).compute_seconds
    call(train.main, "--resume", parent, "--steps", 8)
    assert compare.read_curve("ours", child) == before
    shutil.rmtree(parent)
    assert compare.read_curve("ours", child) == before


def test_compare_hours_epochs_and_bits_per_byte_by_hand(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two hours, two epochs, three nats a token; the table and the picture say the same."""
    folder = load_data(data)
    tokens = int(sum((shard >= FIRST_TEXT_ID).sum() + (shard == EOS).sum() for shard in folder.train.shards))
    (valid,) = folder.valid.shards
    spelled = load_tokenizer(folder.tokenizer_path).decode_batch([row[row >= FIRST_TEXT_ID].tolist() for row in valid])
    nats = 3.0 * ((valid >= FIRST_TEXT_ID).sum() + (valid == EOS).sum())
    bits_per_byte = float(nats * math.log2(math.e) / len("".join(spelled).encode()))
    write_config(TrainConfig(tmp_path, data))
    (tmp_path / "log.csv").write_text(f"step,tokens,valid,compute_s\n1,{2 * tokens},3.0,7200\n")
    drawn: list[Any] = []
    monkeypatch.setattr(compare, "save_picture", lambda figure, path: drawn.append(figure))
    call(compare.main, f"run={tmp_path}")
    head, _, row, *_ = capsys.readouterr().out.splitlines()
    assert head.endswith(" | after 2.00 hours |")
    assert row == f"| run | 2.00 | {2 * tokens / 1e6:.2f} | 2.00 | {bits_per_byte:.4f} | {bits_per_byte:.4f} |"
    by_hours, by_epochs = (axes.lines[0].get_xydata().tolist() for axes in drawn[0].axes)
    assert by_hours == [pytest.approx([2.0, bits_per_byte], rel=1e-9)]
    assert by_epochs == [pytest.approx([2.0, bits_per_byte], rel=1e-9)]


def test_compare_picture_holds_the_best_of_a_run_that_overfits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(compare, "save_picture", lambda figure, path: drawn.append(figure))
    overfits = Curve("overfits", [Point(1, 1, 9.0), Point(2, 2, 1.0), Point(3, 3, 3.0)], 1)
    compare.draw(tmp_path / "compare.png", [overfits, Curve("steady", [Point(1, 1, 9.0), Point(3, 3, 2.0)], 1)])
    low, high = drawn[0].axes[0].get_ylim()
    assert low < 1
    assert 3 < high < 9


def test_curve_at_a_time_lies_between_measurements() -> None:
    curve = Curve("c", [Point(10, 1, 4.0), Point(20, 2, 2.0)], 1)
    assert [curve.at(s) for s in (9, 10, 15, 20, 21)] == [None, 4.0, 3.0, 2.0, None]


class AsDenoiser:
    """The baseline, as `nelbo_sums` asks a network."""

    def __init__(self, baseline: Baseline) -> None:
        self.baseline, self.config, self.device = baseline, baseline.config, torch.device("cpu")

    def score_canvas(self, canvas: Tensor, t: Tensor, at: Tensor) -> Tensor:
        scores: Tensor = self.baseline(canvas, t).flatten(0, 1)[at]
        return scores

    def logits(self, scores: Tensor, ends_are_impossible: Tensor) -> Tensor:
        return scores


def test_baseline_nelbo_is_the_bound_itself(data: Path) -> None:
    """On whole canvases, with the noise that `host.train` draws for the same stories."""
    shape = ModelConfig("test", d_model=64, layers=1, heads=2, vocab_size=300)
    loop, valid = BaselineLoop(shape, load_data(data), torch.device("cpu")), load_data(data).valid
    loop.step(0)
    n, nats, tokens = len(valid), 0.0, 0
    for draw in range(VALIDATION_DRAWS):
        rows = valid.take(story_indices(VALIDATION_SEED, draw, n, n)).astype(np.int64)
        x0, noise = (
            torch.from_numpy(rows),
            np.random.Generator(np.random.Philox(np.random.SeedSequence((VALIDATION_SEED, 1, draw)))),
        )
        t = low_discrepancy_times(n, float(noise.random()))
        batch = corrupt(x0, torch.from_numpy(noise.random(x0.shape, dtype=np.float32)), t, "linear")
        with torch.no_grad():
            model = cast(Denoiser, AsDenoiser(loop.model.eval()))
            nats += float(nelbo_sums(model, batch, x0=x0, t=t, schedule="linear").sum())
        tokens += int((rows >= FIRST_TEXT_ID).sum() + (rows == EOS).sum())
    loop.model.train()
    assert loop.nelbo(n) == pytest.approx(nats / tokens, rel=1e-5)


@pytest.mark.slow
def test_baseline_learns(data: Path) -> None:
    """On sixteen stories over and over; an untrained one of 300 words is near log 300 = 5.7 nats."""
    loop = BaselineLoop(
        ModelConfig("test", d_model=64, layers=1, heads=2, vocab_size=300), load_data(data), torch.device("cpu")
    )
    before = loop.nelbo(8)
    for number in range(30):
        loop.step(number)
    assert loop.nelbo(8) < 0.8 * before


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        (["runs/ours"], 78, "'runs/ours' is not NAME=RUN, for instance ours=runs/tinystories"),
        (["ours=nowhere"], 65, "nowhere/config.json cannot be read"),
        (["ours={runs}/ours", "--out", "nowhere/a.png"], 78, "the picture nowhere/a.png cannot be written"),
    ],
)
def test_compare_refuses_what_cannot_be_compared(
    runs: Path, given: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, sentence = refusal(capsys, compare.main, *(word.format(runs=runs) for word in given))
    assert found == code
    assert words in sentence


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (("--steps", 0), "--steps must be a number above 0, not 0"),
        (("--lr", "inf"), "--lr must be a number above 0, not inf"),
        (("--out", "{runs}/baseline"), "exists: choose another --out"),
    ],
)
def test_baseline_refuses_what_cannot_be_trained(
    runs: Path, data: Path, changed: tuple[object, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(flag).format(runs=runs) for flag in changed]
    code, sentence = refusal(
        capsys, baseline.main, "--data", data, "--steps", 2, "--out", "unused", "--config", "debug", *flags
    )
    assert code == 78
    assert words in sentence


@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        (lambda content: content[:-2], "bytes instead of"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "was altered since it was written"),
    ],
    ids=["truncated", "altered"],
)
def test_baseline_refuses_damaged_data_before_anything_is_written(
    damaged: Callable[[bytes], bytes], words: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    shard = tmp_path / "data" / "train-00000.bin"
    shard.write_bytes(damaged(shard.read_bytes()))
    code, sentence = refusal(
        capsys,
        baseline.main,
        *("--config", "debug", "--data", tmp_path / "data", "--steps", 1, "--out", tmp_path / "run"),
    )
    assert code == 65
    assert sentence.startswith(f"{shard} ") and words in sentence
    assert not (tmp_path / "run").exists()


def test_baseline_that_diverges_says_so(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, sentence = refusal(
        capsys,
        baseline.main,
        *("--config", "debug", "--data", data, "--steps", 9, "--lr", 1e30, "--out", tmp_path / "run"),
    )
    assert code == 1
    assert sentence.startswith("the loss became nan at step ")


def test_train_does_not_write_over_the_log_of_a_baseline(
    runs: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (runs / "baseline" / "log.csv").read_bytes()
    code, sentence = refusal(
        capsys, train.main, "--config", "debug", "--data", data, "--steps", 1, "--out", runs / "baseline"
    )
    assert code == 78
    assert sentence == f"{runs / 'baseline'} holds the log of a run that saved no weights: choose another --out"
    assert (runs / "baseline" / "log.csv").read_bytes() == before
