"""Autoregressive, given words and pictures of what the story tells of, drawn anew each time.

Tokens that the condition names have weight 1, the others REST: they are a few of two hundred, and the gradients of the
others, of which the condition says little, are noise to what is learned here. So the law leans to what it is asked for,
by odds of up to 1 / REST where it cannot know better.

A story whose condition is dropped has the law of the body alone. With the body frozen nothing is to be learned of it,
so that no conditions are dropped; beside it, `ar` is the objective of such stories.
"""

from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from host.train.objectives import ar
from host.train.objectives.example import Example, Settings

REST: Final = 0.3


def examples(x0: Tensor, rng: np.random.Generator, settings: Settings) -> list[Example]:
    """x0 (n, L); stories that have no content words and no concepts are left out."""
    assert settings.conditioner is not None
    made = []
    for story in x0:
        if (drawn := settings.conditioner.draw(story, rng)) is not None:
            condition, named = drawn
            (plain,) = ar.examples(story[None], rng, settings)
            weight = torch.where(named[1 : 1 + len(plain.target)], 1.0, REST)
            made.append(replace(plain, weight=weight, condition=condition))
    return made
