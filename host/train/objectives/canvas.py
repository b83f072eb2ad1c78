"""Full-canvas diffusion: masked tokens given the others, at a noise level of each story's own (arXiv 2406.07524)."""

import numpy as np
import torch
from torch import Tensor

from host.model.diffusion import corrupt, counted_tokens, low_discrepancy_times, token_weight
from host.model.layouts import canvas
from host.model.network import ends_impossible
from host.train.objectives.example import Example, Settings


def examples(x0: Tensor, rng: np.random.Generator, settings: Settings) -> list[Example]:
    """x0 (n, L). Times t are a low-discrepancy set over the stories. Canvases are cut after a visible end."""
    t = low_discrepancy_times(len(x0), float(rng.random()))
    whole = corrupt(x0, torch.from_numpy(rng.random(x0.shape, dtype=np.float32)), t, settings.schedule)
    tokens = counted_tokens(x0).tolist()
    corrupted = []
    for i, n in enumerate(whole.active_len.tolist()):
        xt, scored = whole.xt[i : i + 1, :n], whole.scored[i, :n].nonzero()[:, 0]
        weight = torch.full((len(scored),), token_weight(settings.weighting, settings.schedule, t[i]))
        ends = ends_impossible(xt)[0, scored].long()
        corrupted.append(Example(canvas(xt), scored - 1, x0[i, scored], weight, ends, tokens[i], t[i]))
    return corrupted
