"""The loss is the NELBO: a bound on the exact negative log-likelihood, met by the ideal denoiser."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from host.data.shards import Split
from host.model.diffusion import Corrupted, corrupt, counted_tokens, low_discrepancy_times
from host.model.network import CONFIGS, Denoiser
from host.train.batches import story_indices
from shared.schedule import SCHEDULES, ScheduleName, mask_prob
from shared.tokens import BOS, EOS, MASK, PAD
from tests.support.ideal import LENGTHS, PAIRS, A, B, Ideal
from tests.support.nelbo import nelbo_sums


class Wrong(Ideal):
    """Believes that every token is more even than it is."""

    def logits(self, hidden: Tensor, ends_are_impossible: Tensor) -> Tensor:
        return (0.7 * hidden + 0.3 / hidden.shape[-1]).float().log()


def exact_nelbo(model: Any, ideal: Ideal, schedule: ScheduleName, times: int = 60) -> float:
    """The bound summed over every canvas, every mask pattern and a fine grid of t: no randomness left."""
    length = ideal.canvases.shape[1]
    patterns = torch.tensor(list(itertools.product([0.0, 1.0], repeat=length - 1)))  # 0: masked, 1: survives
    keep = torch.cat([torch.ones(len(patterns), 1), patterns], 1)
    total = 0.0
    for canvas, p in zip(ideal.canvases, ideal.p, strict=True):
        x0 = torch.from_numpy(canvas).repeat(len(patterns), 1)
        for t in (np.arange(times) + 0.5) / times:
            m = mask_prob(schedule, float(t))
            masked = (length - 1) - patterns.sum(1)
            chance = m**masked * (1 - m) ** (length - 1 - masked)
            batch = corrupt(x0, keep * 2, [float(t)] * len(patterns), schedule)
            sums = nelbo_sums(model, batch, x0=x0, t=[float(t)] * len(patterns), schedule=schedule)
            total += float(p) * float((chance * sums).sum()) / times
    return total


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ideal", [PAIRS, LENGTHS], ids=["two tokens", "with lengths"])
def test_nelbo_of_the_ideal_denoiser_is_the_exact_likelihood(ideal: Ideal, schedule: ScheduleName) -> None:
    found = exact_nelbo(ideal, ideal, schedule)
    print(f"NELBO {found:.6f}, exact NLL {ideal.nll():.6f}")
    assert found == pytest.approx(ideal.nll(), abs=5e-4)


def test_nelbo_by_hand_for_two_tokens() -> None:
    """∫ (1/t)[t²·both + t(1−t)·one] dt = ½·both + ½·one, with both and one read off the distribution."""
    both = -(0.5 * np.log(0.5) + 0.5 * np.log(0.5)) - (0.6 * np.log(0.6) + 0.4 * np.log(0.4))
    second_given_first = -(0.4 * np.log(0.8) + 0.1 * np.log(0.2) + 0.2 * np.log(0.4) + 0.3 * np.log(0.6))
    first_given_second = -(0.4 * np.log(4 / 6) + 0.2 * np.log(2 / 6) + 0.1 * np.log(0.25) + 0.3 * np.log(0.75))
    by_hand = 0.5 * both + 0.5 * (second_given_first + first_given_second)
    assert by_hand == pytest.approx(PAIRS.nll(), abs=1e-12)
    assert exact_nelbo(PAIRS, PAIRS, "linear") == pytest.approx(by_hand, abs=5e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ideal", [PAIRS, LENGTHS], ids=["two tokens", "with lengths"])
def test_nelbo_of_a_wrong_denoiser_lies_above_the_likelihood(ideal: Ideal, schedule: ScheduleName) -> None:
    wrong = Wrong(dict(zip(map(tuple, ideal.canvases.tolist()), ideal.p.tolist(), strict=True)))
    assert exact_nelbo(wrong, ideal, schedule) > ideal.nll() + 0.1


def debug_model() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(CONFIGS["debug"]).eval()


def stories(n: int = 6) -> Tensor:
    """Canvases of several lengths, one cut at the end."""
    rng = np.random.default_rng(0)
    rows = np.full((n, 256), PAD)
    for i, row in enumerate(rows):
        text = rng.integers(A, 512, 20 + 60 * i)[:255]
        row[0], row[1 : 1 + len(text)] = BOS, text
        if len(text) < 255:
            row[1 + len(text)] = EOS
    return torch.from_numpy(rows)


@torch.no_grad()
def test_nelbo_does_not_depend_on_padding_after_the_end() -> None:
    model, x0 = debug_model(), stories()
    t = low_discrepancy_times(len(x0), 0.3)
    whole = corrupt(x0, torch.rand(x0.shape, generator=torch.Generator().manual_seed(1)), t, "linear")
    together = nelbo_sums(model, whole, x0=x0, t=t, schedule="linear")
    assert any(whole.active_len < x0.shape[1]) and any(whole.active_len == x0.shape[1])
    for i, length in enumerate(whole.active_len.tolist()):
        cut = Corrupted(whole.xt[i : i + 1, :length], whole.scored[i : i + 1, :length], whole.active_len[i : i + 1])
        alone = nelbo_sums(model, cut, x0=x0[i : i + 1, :length], t=t[i : i + 1], schedule="linear")
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_corrupt_scores_no_padding_after_a_visible_end() -> None:
    x0 = stories(2)[:1]  # 20 tokens, EOS at 21
    keep = torch.ones_like(x0, dtype=torch.float32)
    keep[0, 5] = 0.0
    visible_end = corrupt(x0, keep, [0.5], "linear")
    keep[0, 100:] = 0.0
    padding_masked_too = corrupt(x0, keep, [0.5], "linear")
    assert visible_end.active_len.tolist() == padding_masked_too.active_len.tolist() == [22]
    torch.testing.assert_close(visible_end.xt, padding_masked_too.xt)
    assert padding_masked_too.scored.sum() == 1


def test_corrupt_scores_a_masked_end_and_its_padding() -> None:
    x0 = stories(2)[:1]
    keep = torch.ones_like(x0, dtype=torch.float32)
    keep[0, 21:30] = 0.0  # EOS and eight PAD
    batch = corrupt(x0, keep, [0.5], "linear")
    assert batch.active_len.tolist() == [31]
    assert batch.scored[0].nonzero()[:, 0].tolist() == list(range(21, 30))


def test_corrupt_never_masks_bos_and_masks_all_else_at_time_one() -> None:
    batch = corrupt(stories(), torch.rand(6, 256), [1.0] * 6, "linear")
    assert (batch.xt[:, 0] == BOS).all() and (batch.xt[:, 1:] == MASK).all()


def test_low_discrepancy_times_cover_the_unit_interval_and_never_reach_zero() -> None:
    for u in (0.0, 0.37, 0.999999):
        t = sorted(low_discrepancy_times(16, u))
        assert 0 < t[0] <= 1 / 16 + 1e-12 and t[-1] <= 1
        np.testing.assert_allclose(np.diff(t), 1 / 16)


def test_counted_tokens_leave_out_bos_and_pad() -> None:
    assert counted_tokens(stories()).tolist() == [21, 81, 141, 201, 255, 255]
    assert counted_tokens(torch.tensor([[BOS, A, B, EOS, PAD]])).tolist() == [3]


def split(n: int) -> Split:
    return Split((np.concatenate([stories(6).numpy().astype(np.uint16)] * (n // 6)),))


def test_story_indices_visit_every_story_once_an_epoch() -> None:
    seen = np.concatenate([story_indices(7, step, 5, 12) for step in range(12)])  # 60 = 5 epochs of 12
    for epoch in seen.reshape(5, 12):
        assert sorted(epoch) == list(range(12))
    assert not np.array_equal(seen[:12], seen[12:24])


def test_logits_of_impossible_tokens_have_no_probability() -> None:
    model = Denoiser(replace(CONFIGS["debug"], time_input=False))
    logits = model.logits(torch.randn(2, 64), torch.tensor([False, True]))
    assert logits.isneginf()[0].nonzero()[:, 0].tolist() == [BOS, MASK]
    assert logits.isneginf()[1].nonzero()[:, 0].tolist() == [PAD, BOS, EOS, MASK]
