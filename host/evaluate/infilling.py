"""The infilling law on held-out text: exact nats per gap token.

The same gaps are measured by the autoregressive law, which ignores what follows a gap, and by the bound of the canvas
objective, which sees it.
"""

import functools
from typing import Final

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from host.evaluate.likelihood import SEED, HeldOut, ratio
from host.model.diffusion import Corrupted, cross_entropy_at, low_discrepancy_times
from host.model.layouts import stack
from host.model.network import NO_PADDING, Denoiser
from host.train.objectives import Example
from host.train.objectives.example import story
from host.train.objectives.infill import gapped
from shared.figures import Figure
from shared.tokens import MASK, PAD

GAPS: Final = 3  # at most, of 1 to 64 tokens each
STORIES_AT_ONCE: Final = 8


class Infilling(msgspec.Struct, frozen=True):
    """Nats per gap token. bound: None where the network has not learned the objective canvas."""

    gap_tokens: int
    infilling: Figure
    autoregressive: Figure
    bound: Figure | None


def held_out_gaps(held_out: HeldOut) -> tuple[list[Tensor], list[Example]]:
    """Stories that are long enough, and each of them with one to three random gaps of known sizes."""
    x0 = torch.from_numpy(held_out.canvases.astype(np.int64))
    rng = np.random.default_rng(SEED)
    stories = [story(row) for row in x0[(x0 != PAD).sum(1) > 3]]
    gap = functools.partial(gapped, rng=rng, length=x0.shape[1], most_gaps=GAPS, open_ends=0.0, slack_gaps=0.0)
    return stories, [gap(one.tolist()) for one in stories]


def evaluate_infilling(
    model: Denoiser, held_out: HeldOut, *, token_nats: np.ndarray, draws: int, canvas: bool
) -> Infilling:
    """Each story once, with its gaps; the bound takes `draws` draws of each.

    token_nats (n, L): of the held-out stories' tokens under the autoregressive law.
    """
    stories, gaps = held_out_gaps(held_out)
    tokens = np.array([len(one.at) for one in gaps])[None]
    order = np.argsort([one.rows.tokens.shape[1] for one in gaps])
    law = np.zeros((1, len(gaps)))
    bound = np.zeros((draws, len(gaps)))
    for start in range(0, len(order), STORIES_AT_ONCE):
        here = order[start : start + STORIES_AT_ONCE]
        law[0, here] = _law(model, [gaps[i] for i in here])
    own = token_nats[(held_out.canvases != PAD).sum(1) > 3]
    left = [own[i, one.rows.positions[0, one.at] + 1].sum() for i, one in enumerate(gaps)]
    for draw in range(draws if canvas else 0):
        noise = np.random.default_rng((SEED, draw))
        times = np.array(low_discrepancy_times(len(gaps), noise.random()))[noise.permutation(len(gaps))]
        for start in range(0, len(order), STORIES_AT_ONCE):
            here = order[start : start + STORIES_AT_ONCE]
            chosen = [(stories[i], gaps[i], float(times[i])) for i in here]
            bound[draw, here] = _bound(model, chosen, noise)
    return Infilling(
        gap_tokens=int(tokens.sum()),
        infilling=ratio(law, tokens),
        autoregressive=ratio(np.array([left]), tokens),
        bound=ratio(bound, np.broadcast_to(tokens, bound.shape)) if canvas else None,
    )


@torch.no_grad()
def _law(model: Denoiser, gaps: list[Example]) -> list[float]:
    states = model(*stack([one.rows for one in gaps]).to(model.device))
    return [_nats(model, states[b, one.at], one.target) for b, one in enumerate(gaps)]


def _nats(model: Denoiser, states: Tensor, target: Tensor) -> float:
    return float(F.cross_entropy(model.logits(states, NO_PADDING), target.to(model.device), reduction="sum"))


@torch.no_grad()
def _bound(model: Denoiser, chosen: list[tuple[Tensor, Example, float]], noise: np.random.Generator) -> list[float]:
    """One draw of the NELBO, linear schedule: gap tokens are masked with probability t, and weigh 1 / t."""
    length = max(len(one) for one, _, _ in chosen)
    x0 = torch.stack([F.pad(one, (0, length - len(one)), value=PAD) for one, _, _ in chosen])
    scored = torch.zeros_like(x0, dtype=torch.bool)
    for row, (_, gap, t) in zip(scored, chosen, strict=True):
        place = gap.rows.positions[0, gap.at] + 1
        row[place] = torch.from_numpy(noise.random(len(place)) < t)
    active = torch.tensor([len(one) for one, _, _ in chosen])
    batch = Corrupted(torch.where(scored, MASK, x0), scored, active)
    losses, rows = cross_entropy_at(model, batch, x0, [t for _, _, t in chosen])
    sums = torch.zeros(len(chosen)).index_add(0, rows, losses).tolist()
    return [nats / t for nats, (_, _, t) in zip(sums, chosen, strict=True)]


def print_infilling(measured: Infilling) -> None:
    """One line for each law."""
    own = measured.infilling
    print(
        f"infilling, {measured.gap_tokens:,} tokens in one to {GAPS} gaps, nats per gap token: "
        f"{own.value:.4f} ± {own.stderr:.4f}"
    )
    for name, other in (
        ("autoregressive, left context alone", measured.autoregressive),
        ("canvas bound", measured.bound),
    ):
        if other is not None:
            below = 1 - own.value / other.value
            print(f"  {name}: {other.value:.4f} ± {other.stderr:.4f}, infilling is {below:.1%} below")
