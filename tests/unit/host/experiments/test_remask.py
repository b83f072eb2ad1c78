"""Canvas sampling that masks again: ordinary without rounds, every network call counted, the critic's choice."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from host.experiments import remask
from host.experiments.remask import Remasking, Rule
from host.export.random_weights import untrained
from host.model.network import Denoiser, config_named
from host.sampling.many import sample_many
from host.sampling.reference import Settings
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, MASK, PAD
from tests.support.commands import call, refusal
from tests.support.networks import assert_sound

SEEDS = range(1, 6)


@pytest.fixture(scope="module")
def network() -> Denoiser:
    model, _, _ = untrained(replace(config_named("debug"), canvas_len=32))
    return model


@pytest.fixture
def calls(network: Denoiser) -> Iterator[list[int]]:
    """Canvases in each call of the network."""
    sizes: list[int] = []
    hook = network.register_forward_hook(lambda *call: sizes.append(len(call[1][0])))
    yield sizes
    hook.remove()


def test_remask_without_rounds_is_ordinary_sampling(network: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remask, "mixed_precision_dtype", lambda device: None)
    found = Remasking(network, "linear", Rule(passes=8, plain=8, temperature=0.8), SEEDS).sample()
    ordinary = sample_many(network, "linear", [Settings(seed, steps=8, temperature=0.8) for seed in SEEDS])
    assert torch.equal(found, torch.stack([one.canvas for one in ordinary]))


@pytest.mark.parametrize(
    ("rule", "rounds", "passes"),
    [
        (Rule(passes=12, plain=4), 8, 12),
        (Rule(passes=12, plain=4, critic=1.0), 4, 12),
        (Rule(passes=12, plain=5, critic=math.inf), 3, 11),
    ],
)
def test_remask_counts_every_network_call(
    network: Denoiser, calls: list[int], *, rule: Rule, rounds: int, passes: int
) -> None:
    remasking = Remasking(network, "linear", rule, SEEDS)
    texts = remasking.sample()
    for row in texts.numpy():
        assert_sound(row)
    assert (rule.rounds, remasking.passes) == (rounds, passes)
    assert len(calls) == passes


@pytest.mark.parametrize("critic", [0.0, 1.0, math.inf])
def test_remask_masks_a_fraction_of_the_text_and_no_end(network: Denoiser, critic: float) -> None:
    """Of ten tokens three; with w = ∞ those that surprise most, with less the others also have a chance."""
    remasking = Remasking(network, "linear", Rule(fraction=0.3, critic=critic), range(40))
    full = torch.tensor([BOS, *range(FIRST_TEXT_ID, FIRST_TEXT_ID + 10), EOS, *[PAD] * 20])
    nats = torch.zeros(40, 32)
    nats[:, [2, 5, 9, 11]] = 3.0  # 11: the end
    remasking.canvases = full.repeat(40, 1)
    remasking._mask(nats)
    masked = remasking.canvases == MASK
    assert (masked.sum(1) == 3).all()
    assert torch.equal(remasking.canvases[~masked], full.repeat(40, 1)[~masked])
    assert not masked[:, [0, *range(11, 32)]].any()
    surprising = float(masked[:, [2, 5, 9]].sum()) / 120
    assert {0.0: 0.15 < surprising < 0.45, 1.0: 0.6 < surprising < 0.98, math.inf: surprising == 1}[critic]


@pytest.mark.slow
def test_remask_writes_texts_that_evaluate_reads(
    joint_runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "texts.txt"
    flags = ("--run", joint_runs[0], "--passes", 4, "--plain", 2, "--count", 3, "--out", out)
    call(remask.main, *flags, "--critic", 1)
    assert "3 texts, 4 passes each, 1 rounds" in capsys.readouterr().out
    assert out.read_text("utf-8").count("<|endoftext|>\n") == 3
    assert refusal(capsys, remask.main, *flags, "--critic", -1)[1] == "--critic must be at least 0, not -1.0"
