"""Autoregressive, given words and pictures that the story tells of, drawn again each time it is seen.

The first tokens that tell of each word and picture have weight 1, the others REST. Only a few of two hundred are told;
the gradients of the others, about which the condition says little, are noise here. So the law favours what is asked
for, by odds of up to 1 / REST where it cannot know better; once it is told, the law is that of stories that tell of it.

No conditions are dropped: with the body frozen, a story without one teaches nothing. Where the body learns, too, `ar`
is the objective of such stories.
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
            condition, told = drawn
            (plain,) = ar.examples(story[None], rng, settings)
            weight = torch.where(told[1 : 1 + len(plain.target)], 1.0, REST)
            made.append(replace(plain, weight=weight, condition=condition))
    return made
