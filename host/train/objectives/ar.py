"""Autoregressive: every token given the ones before it.

With input noise, half of the stories see some of their tokens replaced, by MASK or by random text, their targets
clean: a regulariser where data are repeated (arXiv 2606.06888, 2606.16246).
"""

import numpy as np
import torch
from torch import Tensor

from host.model.layouts import causal
from host.model.network import NO_PADDING
from host.train.objectives.example import Example, Settings, story
from shared.tokens import FIRST_TEXT_ID, MASK


def examples(x0: Tensor, rng: np.random.Generator, settings: Settings) -> list[Example]:
    """x0 (n, L)"""
    return [_example(story(canvas), rng, settings.input_noise) for canvas in x0]


def _example(tokens: Tensor, rng: np.random.Generator, noise: float) -> Example:
    seen, target = tokens[:-1].clone(), tokens[1:]
    if noise and rng.random() < 0.5:
        lost = torch.from_numpy(rng.random(len(seen)) < noise) & (seen >= FIRST_TEXT_ID)
        # Of the same story, so that the replacements are as frequent as the tokens of the text.
        others = torch.from_numpy(rng.permutation(seen[1:].numpy())[np.arange(len(seen)) % max(1, len(seen) - 1)])
        seen[lost] = torch.where(torch.from_numpy(rng.random(len(seen)) < 0.5), MASK, others)[lost]
    n = len(target)
    every = torch.arange(n)
    return Example(causal(seen[None]), every, target, torch.ones(n), torch.full((n,), NO_PADDING), n)
