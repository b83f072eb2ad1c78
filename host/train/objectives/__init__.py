"""Objectives: each turns stories into rows with targets and weights; a run trains a weighted mixture.

A new objective is a file with a function `examples` and a line in `OBJECTIVES`: the trainer, batches, loss and
checkpoints know rows only.
"""

import math
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from torch import Tensor

from host.train.objectives import ar, canvas, conditioned, draft, infill, shown
from host.train.objectives.example import Example, Settings
from shared.errors import ConfigError

__all__ = ["OBJECTIVES", "Example", "Settings", "parse_mixture", "shares_of_batch"]

OBJECTIVES: Final[dict[str, Callable[[Tensor, np.random.Generator, Settings], list[Example]]]] = {
    "ar": ar.examples,
    "draft": draft.examples,
    "infill": infill.examples,
    "canvas": canvas.examples,
    "conditioned": conditioned.examples,
    "shown": shown.examples,
}
"""Each takes canvases (n, L), a random generator and the run's settings; it may skip stories without a target."""


def parse_mixture(text: str) -> dict[str, float]:
    """`ar=1,infill=.25` → the share of the stories that each objective gets; a name alone has the weight 1.

    Raises ConfigError for unknown or repeated names and for weights that are not above 0.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in OBJECTIVES:
            raise ConfigError(f"--objectives: unknown objective {name!r}: choose among {', '.join(OBJECTIVES)}")
        if name in weights:
            raise ConfigError(f"--objectives: {name} is given twice")
        try:
            weights[name] = float(value or 1)
        except ValueError:
            raise ConfigError(f"--objectives: the weight of {name} must be a number, not {value!r}") from None
        if not 0 < weights[name] < math.inf:
            raise ConfigError(f"--objectives: the weight of {name} must be a number above 0, not {value}")
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def shares_of_batch(mixture: Mapping[str, float], step: int, size: int) -> dict[str, int]:
    """Stories of a batch of `size` for each objective at `step`: whole numbers that average to the shares over steps.

    Cumulative shares are rounded, so that the counts add up to `size`.
    """
    counts, below, taken = {}, 0.0, 0
    for name, share in mixture.items():
        below += share
        upto = size if name == list(mixture)[-1] else _rounded(below, step, size)
        counts[name] = upto - taken
        taken = upto
    return counts


def _rounded(share: float, step: int, size: int) -> int:
    return math.floor(share * size * (step + 1) + 1e-9) - math.floor(share * size * step + 1e-9)
