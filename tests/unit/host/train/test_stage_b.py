"""The drafter's stage: its loss against the definition, and a network that does not move by a bit."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from host.data.shards import Split
from host.model.network import Denoiser, config_named
from host.train import trainer as train
from host.train.batches import MicroBatch, make_batch
from host.train.checkpoint import BEST, load_model
from host.train.draft_loss import CROSS_ENTROPY, TEMPERATURES, ChainLoss
from host.train.objectives import Settings, parse_mixture
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, PAD
from tests.support.commands import call, refusal, small

LENGTH, VOCAB = 40, 64
LIKELY = [EOS, *range(FIRST_TEXT_ID + 2, VOCAB - 3)]


def network() -> Denoiser:
    torch.manual_seed(1)
    shape = replace(config_named("debug"), vocab_size=VOCAB, canvas_len=LENGTH, time_input=False, draft_depth=3)
    model = Denoiser(shape)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert model.drafter is not None
    model.drafter.likely = torch.tensor(LIKELY)
    return model


def parts(mixture: str = "ar,infill") -> tuple[MicroBatch, ...]:
    rng = np.random.default_rng(0)
    canvases = np.full((12, LENGTH), PAD, np.uint16)
    for row, end in zip(canvases, rng.integers(4, LENGTH + 5, 12), strict=True):
        row[0] = BOS
        row[1:end] = rng.integers(FIRST_TEXT_ID, VOCAB, min(end, LENGTH) - 1)
        row[end : end + 1] = EOS
    return make_batch(
        Split((canvases,)), 0, seed=3, batch_size=12, micro_size=5, mixture=parse_mixture(mixture), settings=Settings()
    ).parts


def by_definition(model: Denoiser, part: MicroBatch) -> torch.Tensor:
    """One anchor and one draft at a time."""
    assert model.drafter is not None
    states = model(*part.rows, at=part.at).detach()
    law = model.logits(states, part.ends).detach()
    b, n = part.rows.tokens.shape
    place = part.rows.positions.expand(b, n).flatten()[part.at].tolist()
    total = torch.zeros(())
    for j in range(len(part.at)):
        t = TEMPERATURES[(j + int(part.target[j])) % 3]
        state = states[j : j + 1]
        for k, step in enumerate(model.drafter.depths):
            there = j + k + 1
            if there >= len(part.at) or part.at[there] // n != part.at[j] // n or place[there] != place[j] + k + 1:
                break
            state = step(state, model.token_embedding(part.target[there - 1 : there]))
            z = model.draft_logits(state, part.ends[there : there + 1])[0]
            tv = ((z / t).softmax(-1) - (law[there] / t).softmax(-1)).abs().sum() / 2
            target = int(part.target[there])
            ce = -z.log_softmax(-1)[target] if target in LIKELY else torch.zeros(())
            total = total + math.exp(-k / 4) * (CROSS_ENTROPY * ce + (1 - CROSS_ENTROPY) * tv)
    return total


def test_draft_loss_and_its_gradients_are_the_definition() -> None:
    model = network()
    drafter = {name: p for name, p in model.named_parameters() if name.startswith("drafter.")}
    for part in parts():
        expected = by_definition(model, part)
        gradients = torch.autograd.grad(expected, list(drafter.values()))
        model.zero_grad()
        found = ChainLoss(model)(part)
        found.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        for (name, p), gradient in zip(drafter.items(), gradients, strict=True):
            assert p.grad is not None
            assert torch.allclose(p.grad, gradient, rtol=1e-3, atol=1e-5), name


def test_draft_loss_does_not_depend_on_rows_of_no_weight() -> None:
    model, (part, *_) = network(), parts("ar")
    with torch.no_grad():
        assert float(ChainLoss(model)(part.padded(64))) == pytest.approx(float(ChainLoss(model)(part)), rel=1e-6)


@pytest.fixture(scope="module")
def stages(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A joint run and its drafter's."""
    folder = tmp_path_factory.mktemp("stages")
    a, b = folder / "a", folder / "b"
    call(train.main, *small(data, a, "--objectives", "ar=2,infill,canvas", "--steps", 20, "--valid-every", 10))
    drafter = ["--data", data, "--out", b, "--batch-size", 8, "--stage", "drafter", "--init", a]
    call(train.main, *drafter, "--steps", 20, "--valid-every", 10)
    return a, b


@pytest.mark.slow
def test_stage_b_trains_the_drafter_and_leaves_the_network_to_the_bit(stages: tuple[Path, Path]) -> None:
    before, after = (load_file(run / BEST) for run in stages)
    body = [name for name in before if name.startswith("ema.")]
    assert body and all(torch.equal(before[name], after[name]) for name in body)
    assert all(torch.equal(before[name], after[f"model.{name[4:]}"]) for name in body)
    model, progress = load_model(stages[1] / BEST)
    assert model.drafter is not None and progress.model.draft_depth == 3
    assert set(progress.objectives) == {"ar", "infill", "canvas"}
    fresh = Denoiser(progress.model)
    assert fresh.drafter is not None
    moved = zip(model.drafter.parameters(), fresh.drafter.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)


@pytest.mark.slow
def test_stage_b_drafter_stays_while_the_body_learns(data: Path, stages: tuple[Path, Path], tmp_path: Path) -> None:
    more = ["--data", data, "--batch-size", 8, "--steps", 4, "--init", stages[1]]
    call(train.main, *more, "--objectives", "ar,canvas", "--out", tmp_path / "more")
    before, after = (load_file(run / BEST) for run in (stages[1], tmp_path / "more"))
    kept = [name for name in before if name.startswith("ema.drafter.")]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    assert not torch.equal(before["ema.head.weight"], after["ema.head.weight"])

    call(train.main, *more, "--objectives", "canvas", "--out", tmp_path / "canvas")
    assert load_model(tmp_path / "canvas" / BEST)[0].drafter is None


@pytest.mark.slow
def test_stage_b_lowers_its_loss(stages: tuple[Path, Path]) -> None:
    rows = (stages[1] / "log.csv").read_text().splitlines()
    valid = rows[0].split(",").index("valid")
    measured = [float(row.split(",")[valid]) for row in rows[1:] if row.split(",")[valid]]
    assert measured[-1] < measured[0]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--stage", "drafter"], "--stage drafter needs --init RUN"),
        (
            ["--stage", "drafter", "--init", "{trained}", "--dropout", 0.1],
            "--dropout cannot be combined with --stage drafter",
        ),
        (["--stage", "drafter", "--init", "{trained}"], "{trained} did not learn the objective ar"),
    ],
)
def test_stage_b_without_a_law_is_refused(
    data: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: list[object],
    sentence: str,
) -> None:
    flags = [str(flag).format(trained=trained) for flag in given]
    code, found = refusal(capsys, train.main, "--data", data, "--out", tmp_path / "run", *flags)
    assert code == 78
    assert found.startswith(sentence.format(trained=trained))
