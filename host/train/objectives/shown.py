"""A picture of a concept that the story tells of, and its word: for `--stage pictures`, whose loss sees them alone."""

import numpy as np
import torch
from torch import Tensor

from host.model.layouts import causal
from host.train.objectives.example import Example, Settings


def examples(x0: Tensor, rng: np.random.Generator, settings: Settings) -> list[Example]:
    """x0 (n, L); stories that tell of no concept are left out. No row of the text is scored."""
    assert settings.conditioner is not None
    none = torch.zeros(0, dtype=torch.long)
    rows = causal(x0[:1, :1])
    shown = settings.conditioner.show(x0, rng)
    return [Example(rows, none, none, none.float(), none, 1, condition=one) for one in shown]
