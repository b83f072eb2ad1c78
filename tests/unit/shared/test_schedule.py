"""Both schedules and the unmasking schedule, held to their definitions."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.schedule import SCHEDULES, ScheduleName, loss_weight, mask_prob, reveal_count, time_of_masked_fraction

TIMES = st.floats(1e-3, 1.0)
NAMES = st.sampled_from(SCHEDULES)


def reveal(masked: int, num_steps: int) -> list[int]:
    """Positions committed at each pass until none is masked."""
    counts: list[int] = []
    while masked:
        counts.append(reveal_count(masked, len(counts), num_steps))
        masked -= counts[-1]
    return counts


@pytest.mark.parametrize(
    ("schedule", "probability", "weight"), [("linear", 0.5, 2.0), ("cosine", 0.29289, 3.7922)], ids=SCHEDULES
)
def test_schedule_values_halfway_are_pinned(schedule: ScheduleName, probability: float, weight: float) -> None:
    """Two opposite curves are called "cosine"; the other one masks 0.70711 here."""
    assert mask_prob(schedule, 0.5) == pytest.approx(probability, abs=1e-4)
    assert loss_weight(schedule, 0.5) == pytest.approx(weight, abs=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_mask_prob_is_zero_at_zero_and_one_at_one(schedule: ScheduleName) -> None:
    assert mask_prob(schedule, 1.0) == pytest.approx(1.0)
    assert mask_prob(schedule, 0.0) == 0.0


@given(schedule=NAMES, t=st.floats(0.01, 0.999))
def test_loss_weight_is_the_derivative_over_the_mask_probability(schedule: ScheduleName, t: float) -> None:
    """−alpha' / (1 − alpha), and −alpha' is the slope of mask_prob."""
    h = 1e-6
    slope = (mask_prob(schedule, t + h) - mask_prob(schedule, t - h)) / (2 * h)
    assert loss_weight(schedule, t) == pytest.approx(slope / mask_prob(schedule, t), rel=1e-4)


@given(schedule=NAMES, t=TIMES)
def test_time_of_masked_fraction_inverts_mask_prob(schedule: ScheduleName, t: float) -> None:
    assert time_of_masked_fraction(schedule, mask_prob(schedule, t)) == pytest.approx(t, abs=1e-6)


@given(schedule=NAMES, earlier=TIMES, later=TIMES)
def test_mask_prob_increases_with_time(schedule: ScheduleName, earlier: float, later: float) -> None:
    earlier, later = sorted((earlier, later))
    assert mask_prob(schedule, earlier) <= mask_prob(schedule, later)


@given(masked=st.integers(1, 300), num_steps=st.integers(1, 400))
def test_reveal_count_is_positive_and_the_last_step_commits_all(masked: int, num_steps: int) -> None:
    counts = reveal(masked, num_steps)
    assert sum(counts) == masked
    assert min(counts) >= 1
    assert len(counts) <= num_steps


@given(masked=st.integers(1, 300), num_steps=st.integers(2, 400))
def test_reveal_count_is_small_early_and_large_late(masked: int, num_steps: int) -> None:
    """Counts never fall by more than their rounding; 1 is the floor where passes outnumber positions."""
    counts = reveal(masked, num_steps)
    assert all(later >= earlier - 1 for earlier, later in itertools.pairwise(counts))


@pytest.mark.parametrize("num_steps", [2, 8, 16, 24, 32])
def test_reveal_count_follows_the_cosine(num_steps: int) -> None:
    """255 positions: after k of n passes cos(πk/2n) of them are masked, but for the rounding of k counts."""
    left = 255
    for k, count in enumerate(reveal(255, num_steps), start=1):
        left -= count
        assert left == pytest.approx(255 * math.cos(math.pi / 2 * k / num_steps), abs=3)


def test_reveal_count_of_one_step_is_all() -> None:
    assert reveal(255, 1) == [255]


def test_reveal_count_with_steps_to_spare_is_one() -> None:
    assert reveal(5, 100) == [1] * 5


def test_reveal_count_continues_after_an_early_end() -> None:
    """An early EOS reveals many positions at once; the grid keeps its ratio instead of catching up."""
    assert reveal_count(100, 8, 16) == pytest.approx(2 * reveal_count(50, 8, 16), abs=1)
