"""Noise schedules and the reveal grid: the one place that defines them for training and for sampling.

Two opposite curves are called "cosine" in public code. Ours masks little at first: mask_prob(t) = 1 − cos(πt/2).
Training schedule and reveal grid are independent: the first weighs the loss, the second says how many tokens a
sampler commits at each step.
"""

import math
from typing import Final, Literal, get_args

ScheduleName = Literal["linear", "cosine"]
SCHEDULES: Final[tuple[str, ...]] = get_args(ScheduleName)


def mask_prob(schedule: ScheduleName, t: float) -> float:
    """1 − alpha(t): the probability that a token is masked at time t in (0, 1]."""
    return t if schedule == "linear" else 1.0 - math.cos(math.pi * t / 2)


def loss_weight(schedule: ScheduleName, t: float) -> float:
    """−alpha'(t) / (1 − alpha(t)): the NELBO's weight on the cross-entropy *sum* over masked positions.

    linear: 1/t. cosine: (π/2)·sin(πt/2) / (1 − cos(πt/2)) = (π/2)·cot(πt/4).
    """
    return 1.0 / t if schedule == "linear" else (math.pi / 2) / math.tan(math.pi * t / 4)


def time_of_masked_fraction(schedule: ScheduleName, fraction: float) -> float:
    """The t at which `fraction` of the positions is masked: the inverse of mask_prob.

    A network that takes time is fed this, from the canvas as it is, never the step counter.
    """
    return fraction if schedule == "linear" else 2 / math.pi * math.acos(1.0 - fraction)


def reveal_counts(num_masked: int, num_steps: int) -> tuple[int, ...]:
    """How many positions each step commits: few early, many late, at least one each.

    After step k of n, cos(πk/2n) of the positions are still masked (MaskGIT, arXiv 2202.04200). More steps than
    positions means one position a step. Sums to num_masked; its length is min(num_steps, num_masked).
    """
    n = min(num_steps, num_masked)
    counts = []
    left = num_masked
    for k in range(1, n + 1):
        target = math.floor(num_masked * math.cos(math.pi / 2 * k / n) + 1e-9)
        keep = max(n - k, min(left - 1, target))  # leave one for every later step, commit at least one now
        counts.append(left - keep)
        left = keep
    return tuple(counts)
