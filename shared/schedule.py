"""Noise schedules and the unmasking schedule, for training and for sampling.

Two opposite curves are called "cosine" in public code. Ours masks little at first: mask_prob(t) = 1 − cos(πt/2).
Training schedule and unmasking schedule are independent: the first weights the loss, the second determines how many
tokens a sampler commits per step.
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

    A network conditioned on time gets this t of its present canvas, not the step counter.
    """
    return fraction if schedule == "linear" else 2 / math.pi * math.acos(1.0 - fraction)


def reveal_ratio(step: int, num_steps: int) -> float:
    """Fraction of the masked positions that are still masked after step `step`, counted from 0 and not the last.

    The masked fraction after k of n steps is cos(πk/2n) (MaskGIT, arXiv 2202.04200). Only the ratio of neighbouring
    values is used, so that the schedule continues from any canvas, as after an early EOS or a deferred position.
    """
    return math.cos(math.pi / 2 * (step + 1) / num_steps) / math.cos(math.pi / 2 * step / num_steps)


def reveal_count(masked: int, step: int, num_steps: int) -> int:
    """Number of the `masked` positions that step `step` commits: at least one, more in later steps, all in the last."""
    if step >= num_steps - 1:
        return masked
    return max(1, masked - math.floor(masked * reveal_ratio(step, num_steps) + 0.5))
