"""Masked diffusion: corruption and the NELBO. The torch reference sampler is in `host.sampling.reference`.

x0: clean canvas, xt: corrupted canvas, both (B, L) integer ids. A canvas is BOS, text, EOS, then PAD.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from host.model.conditions import Memory
from host.model.layouts import causal, first_end
from host.model.network import NO_PADDING, Denoiser, ends_impossible
from shared.schedule import ScheduleName, loss_weight, mask_prob
from shared.tokens import BOS, MASK, PAD

Weighting = Literal["nelbo", "flat"]


def token_weight(weighting: Weighting, schedule: ScheduleName, t: float) -> float:
    """A masked token's weight in training.

    flat: the same at every t; 1 per token on average over t, so that the loss is in nats per masked token.
    """
    if weighting == "nelbo":
        return loss_weight(schedule, t)
    return 2.0 if schedule == "linear" else 1 / (1 - 2 / math.pi)  # 1 / ∫ mask_prob


def low_discrepancy_times(n: int, u: float) -> list[float]:
    """n evenly spread times in (0, 1]: t = 1 − ((u + i/n) mod 1), one u in [0, 1) for the batch (arXiv 2107.00630)."""
    return [1.0 - ((u + i / n) % 1.0) for i in range(n)]


@dataclass(frozen=True)
class Corrupted:
    """A corrupted batch. scored: masked positions before the first visible end; after it all is PAD for certain."""

    xt: Tensor  # (B, L)
    scored: Tensor  # (B, L) bool
    active_len: Tensor  # (B,) positions up to and with the first visible EOS or PAD; the rest may be cut away


def corrupt(x0: Tensor, keep: Tensor, t: list[float], schedule: ScheduleName) -> Corrupted:
    """Mask each position after BOS with probability mask_prob(t).

    keep (B, L): uniform draws in [0, 1); a position survives when its draw is at least mask_prob.
    """
    probability = torch.tensor([mask_prob(schedule, value) for value in t], device=x0.device)
    is_masked = keep < probability[:, None]
    is_masked[:, 0] = False  # BOS is always visible
    xt = torch.where(is_masked, MASK, x0)
    active_len = (first_end(xt) + 1).clamp(max=x0.shape[1])
    certain = torch.arange(x0.shape[1], device=x0.device) >= active_len[:, None]
    return Corrupted(torch.where(certain, PAD, xt), is_masked & ~certain, active_len)


def counted_tokens(x0: Tensor) -> Tensor:
    """Tokens a canvas counts as: text and EOS, neither BOS nor PAD.  (B, L) → (B,)"""
    return ((x0 != PAD) & (x0 != BOS)).sum(1)


def canvas_logits(model: Denoiser, canvas: Tensor, t: Sequence[float], at: Tensor) -> Tensor:
    """Scores of some positions of canvases (B, L) at times t, on the device of the network.

    at (M,): counted over all canvases, i·L + j.  → (M, V)
    """
    canvas, at = canvas.to(model.device), at.to(model.device)
    time = torch.tensor(t, device=model.device) if model.config.time_input else None
    return model.logits(model.score_canvas(canvas, time, at), ends_impossible(canvas).flatten()[at])


def cross_entropy_at(model: Denoiser, batch: Corrupted, x0: Tensor, t: list[float]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each scored position, in nats, and the row it belongs to, on the CPU.  → (M,), (M,)"""
    at = batch.scored.flatten().nonzero()[:, 0]
    target = x0.flatten()[at].long().to(model.device)
    losses = F.cross_entropy(canvas_logits(model, batch.xt, t, at), target, reduction="none")
    return losses.cpu(), at // x0.shape[1]


def autoregressive_nats(model: Denoiser, x0: Tensor, memory: Memory | None = None) -> Tensor:
    """Each token's exact negative log-likelihood under a causal mask, 0 of BOS and PAD; given a memory or not.

    x0 (B, L) → (B, L), on the CPU
    """
    x0 = x0.to(model.device)
    at = ((x0 != PAD) & (x0 != BOS)).flatten().nonzero()[:, 0]
    logits = model.logits(model(*causal(x0), at=at - 1, memory=memory), NO_PADDING)
    losses = F.cross_entropy(logits, x0.flatten()[at].long(), reduction="none")
    return torch.zeros(x0.numel(), device=x0.device).index_copy(0, at, losses).view(x0.shape).cpu()
