"""Drafting by mask rows: after random clean rows, masks predict the tokens after the next; clean rows learn `ar`.

Deep drafts are reached less often, so their weight falls as e^(−(k − 1) / depth) (DSpark, arXiv 2607.05147).
"""

from typing import Final

import numpy as np
import torch
from torch import Tensor

from host.model.layouts import drafts
from host.model.network import NO_PADDING
from host.train.objectives.example import Example, Settings, story

DEPTH: Final = 4  # masks after an anchor
ANCHOR_EVERY: Final = 8  # tokens, on average
WEIGHT: Final = 0.2  # of the first mask, against a clean row's 1


def examples(x0: Tensor, rng: np.random.Generator, settings: Settings) -> list[Example]:
    """x0 (n, L)"""
    return [_example(story(canvas), rng) for canvas in x0]


def _example(tokens: Tensor, rng: np.random.Generator) -> Example:
    n = len(tokens) - 1  # clean rows; row i scores token i + 1
    anchors = torch.from_numpy(np.sort(rng.choice(n, max(1, n // ANCHOR_EVERY), replace=False)))
    rows = drafts(tokens[None, :-1], anchors, DEPTH)
    positions = rows.positions[0]
    at = (positions < n).nonzero()[:, 0]  # masks after the end of the story have no target
    depth = torch.where(at < n, 0, (at - n) % DEPTH + 1)
    weight = torch.where(depth == 0, 1.0, WEIGHT * torch.exp(-(depth - 1) / DEPTH))
    kept = int(at[-1]) + 1
    visible = rows.visible[:, :kept, :kept]
    cut = rows._replace(tokens=rows.tokens[:, :kept], positions=rows.positions[:, :kept], visible=visible)
    return Example(cut, at, tokens[positions[at] + 1], weight, torch.full_like(at, NO_PADDING), n)
