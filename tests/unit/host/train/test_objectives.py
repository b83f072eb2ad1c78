"""Objectives turn stories into rows, and a mixture shares them out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from host.data.shards import Split
from host.model.network import NO_PADDING, Denoiser, config_named
from host.train.arguments import DEFAULT_OBJECTIVES, parse_arguments
from host.train.batches import make_batch
from host.train.loss import WeightedLoss
from host.train.objectives import OBJECTIVES, Example, Settings, parse_mixture, shares_of_batch
from host.train.objectives.infill import gapped
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, MASK, PAD

LENGTH, VOCAB = 64, 96
SETTINGS = Settings(weighting="flat", input_noise=0.2)


def canvases(n: int = 40, seed: int = 0) -> Tensor:
    """Stories of every length that a canvas can hold, down to one token and cut ones."""
    rng = np.random.default_rng(seed)
    x0 = torch.full((n, LENGTH), PAD)
    for row, end in zip(x0, rng.integers(2, LENGTH + 6, n), strict=True):
        row[0] = BOS
        row[1:end] = torch.from_numpy(rng.integers(FIRST_TEXT_ID, VOCAB, min(end, LENGTH) - 1))
        row[end : end + 1] = EOS
    return x0


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"conditioned", "shown"}))  # those need conditions
def test_examples_of_every_objective_are_well_formed(name: str) -> None:
    examples = OBJECTIVES[name](canvases(), np.random.default_rng(1), SETTINGS)
    assert len(examples) > 30
    for one in examples:
        tokens, positions, visible = one.rows
        n = tokens.shape[1]
        assert positions.shape == (1, n) and visible.shape == (1, n, n)
        assert int(positions.min()) >= 0 and int(positions.max()) < LENGTH
        assert len(one.at) == len(one.target) == len(one.weight) == len(one.ends)
        assert int(one.at.max()) < n and one.tokens > 0 and bool((one.weight > 0).all())
        assert not bool(((one.target == MASK) | (one.target == BOS)).any())


def test_ar_rows_score_every_token_and_the_end() -> None:
    x0 = canvases()
    for story, one in zip(x0, OBJECTIVES["ar"](x0, np.random.default_rng(1), Settings()), strict=True):
        kept = story[story != PAD]
        assert torch.equal(one.rows.tokens[0], kept[:-1]) and torch.equal(one.target, kept[1:])
        assert one.tokens == len(kept) - 1


def test_input_noise_spoils_inputs_and_no_targets() -> None:
    x0 = canvases(200)
    clean = OBJECTIVES["ar"](x0, np.random.default_rng(1), Settings())
    noisy = OBJECTIVES["ar"](x0, np.random.default_rng(1), Settings(input_noise=0.2))
    spoilt = [(a.rows.tokens != b.rows.tokens).float().mean() for a, b in zip(clean, noisy, strict=True)]
    assert all(torch.equal(a.target, b.target) for a, b in zip(clean, noisy, strict=True))
    assert 0.3 < sum(part == 0 for part in spoilt) / len(spoilt) < 0.7
    assert 0.07 < float(sum(spoilt)) / len(spoilt) < 0.13  # a fifth in half of the stories, a few by themselves
    masks = sum(int((one.rows.tokens == MASK).sum()) for one in noisy)
    assert masks > 50 and all(int(one.rows.tokens[0, 0]) == BOS for one in noisy)


def as_text(one: Example) -> list[int]:
    """The story again, from evidence and gap targets by position; an EOS that closes a gap is left out."""
    tokens, positions = one.rows.tokens[0], one.rows.positions[0]
    evidence = int(one.at[0])
    found = dict(zip(positions[:evidence].tolist(), tokens[:evidence].tolist(), strict=True))
    last = max(found)
    for row, target in zip(one.at.tolist(), one.target.tolist(), strict=True):
        position = int(positions[row]) + 1
        assert position not in found
        if target != EOS or position > last:
            found[position] = target
    return [found[position] for position in sorted(found)]


def test_infill_takes_a_story_apart_and_loses_nothing() -> None:
    """The evidence sees itself alone; gaps are causal; positions are the true ones, longer by the slack."""
    rng, shares, opened, slack = np.random.default_rng(2), [], 0, 0
    for story in canvases(300, seed=3):
        kept = story[story != PAD].tolist()
        if len(kept) <= 3:
            continue
        one = gapped(kept, rng, length=LENGTH)
        assert as_text(one) == kept
        evidence, n = int(one.at[0]), one.rows.tokens.shape[1]
        assert torch.equal(one.at, torch.arange(evidence, n))
        sees = torch.ones(n, n, dtype=torch.bool).tril()
        sees[:evidence, :evidence] = True
        assert torch.equal(one.rows.visible[0], sees)
        assert one.ends.unique().tolist() == [NO_PADDING]
        opened += kept[-1] == EOS and EOS not in one.rows.tokens[0, :evidence]
        slack += int(one.rows.positions.max()) >= len(kept)
        shares.append(one.tokens / len(kept))
    print(f"{np.mean(shares):.0%} of the tokens are targets, {opened} open ends, {slack} stories made longer")
    assert 0.3 < np.mean(shares) < 0.6 and opened > 20 and slack > 20


def test_draft_rows_cost_what_they_teach() -> None:
    """Weights fall with depth; a mask has no target after the end of the story."""
    (one,) = OBJECTIVES["draft"](torch.arange(FIRST_TEXT_ID - 1, LENGTH + 3)[None], np.random.default_rng(0), SETTINGS)
    tokens, positions, _ = one.rows
    clean = LENGTH - 1
    assert torch.equal(one.target, positions[0, one.at] + FIRST_TEXT_ID)
    assert bool((tokens[0, clean:] == MASK).all()) and tokens.shape[1] > clean + 10
    assert one.weight[:clean].unique().tolist() == [1.0]
    assert float(one.weight[clean:].max()) == pytest.approx(0.2)


def test_mixture_is_read_and_shared_out_exactly() -> None:
    mixture = parse_mixture("ar=1,infill=.25,canvas=.15")
    assert mixture == pytest.approx({"ar": 1 / 1.4, "infill": 0.25 / 1.4, "canvas": 0.15 / 1.4})
    assert parse_mixture("ar") == {"ar": 1.0}
    batches = [shares_of_batch(mixture, step, 16) for step in range(500)]
    assert all(sum(counts.values()) == 16 and min(counts.values()) >= 0 for counts in batches)
    for name, share in mixture.items():
        assert sum(counts[name] for counts in batches) == pytest.approx(share * 16 * 500, abs=1.01)


def test_mixed_batch_is_the_sum_of_its_objectives_on_any_number_of_processes() -> None:
    torch.manual_seed(1)
    model = Denoiser(replace(config_named("debug"), vocab_size=VOCAB, canvas_len=LENGTH, time_input=False))
    split = Split((canvases().numpy().astype(np.uint16),))
    mixture = parse_mixture("ar,draft,infill,canvas")

    def loss(micro_size: int, share: tuple[int, int], length_step: int) -> tuple[float, int]:
        made = make_batch(
            split,
            1,
            seed=2,
            batch_size=20,
            micro_size=micro_size,
            mixture=mixture,
            settings=SETTINGS,
            share=share,
            length_step=length_step,
        )
        return sum(float(WeightedLoss(model)(part)) for part in made.parts), made.tokens

    with torch.no_grad():
        whole, tokens = loss(20, (0, 1), 1)
        shares = [loss(3, (rank, 3), 16) for rank in range(3)]
    assert sum(part for part, _ in shares) == pytest.approx(whole, rel=1e-5)
    assert {counted for _, counted in shares} == {tokens}


def test_mixture_where_nothing_is_said_has_the_three_laws_that_a_bundle_serves() -> None:
    assert parse_arguments([]).objectives == parse_mixture(DEFAULT_OBJECTIVES)
    assert set(parse_mixture(DEFAULT_OBJECTIVES)) == {"ar", "infill", "canvas"}
