"""The rows and targets that an objective makes of a story."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from host.model.conditions import Condition
from host.model.diffusion import Weighting
from host.model.layouts import Rows
from shared.schedule import ScheduleName
from shared.tokens import PAD


class Drawer(Protocol):
    """Draws conditions of stories."""

    def draw(self, canvas: Tensor, rng: np.random.Generator) -> tuple[Condition, Tensor] | None:
        """Of a story (L,), with the positions (L,) bool that first tell of it; None where it has nothing to name."""

    def show(self, canvases: Tensor, rng: np.random.Generator) -> list[Condition]:
        """Of stories (n, L) a picture of a concept of each, and its word; without those that tell of none."""


@dataclass(frozen=True)
class Settings:
    """Of a run, for its objectives. input_noise: share of the input tokens that half of the `ar` stories lose.

    conditioner: draws what `conditioned` stories are conditioned on.
    """

    schedule: ScheduleName = "linear"
    weighting: Weighting = "flat"
    input_noise: float = 0.0
    conditioner: Drawer | None = None


@dataclass(frozen=True)
class Example:
    """One sequence of rows, and the targets of those that are scored."""

    rows: Rows  # B = 1
    at: Tensor  # (M,) int64: rows that are scored
    target: Tensor  # (M,) int64: the token of the next position
    weight: Tensor  # (M,) float32
    ends: Tensor  # (M,) int64, see `Denoiser.logits`
    tokens: int  # for the loss per token
    t: float = 1.0  # diffusion time
    condition: Condition | None = None


def story(canvas: Tensor) -> Tensor:
    """BOS, text and, unless it was cut, EOS.  (L,) → (n,)"""
    return canvas[canvas != PAD]
