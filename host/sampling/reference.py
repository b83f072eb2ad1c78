"""The torch reference sampler: the definition of sampling, slow and obvious. `edge.decoding.canvas` must agree with it.

It scores the whole vocabulary itself, keeps the K best, and shares no code with the edge, Philox 4x32-10 (Salmon et
al., SC 2011) included. A token is drawn by the Gumbel-max trick: arg max of log p / T − log(−log u).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from host.model.diffusion import canvas_logits
from host.model.network import Denoiser
from shared.manifest import Selection
from shared.schedule import ScheduleName, reveal_count, time_of_masked_fraction
from shared.tokens import EOS, FIRST_TEXT_ID, MASK, PAD

TOP_K: Final = 64
"""Candidates of each position: the most that `top_k` can be, and what a bundle's CPU graph returns."""


@dataclass(frozen=True)
class Settings:
    """How to draw and commit; the fields mean what they mean in a request."""

    seed: int
    steps: int = 64
    selection: Selection = "random"
    temperature: float = 1.0
    top_k: int = TOP_K
    top_p: float = 1.0
    threshold: float | None = None
    entropy_bound: float | None = None


@dataclass(frozen=True)
class Sampled:
    """A finished canvas.

    margin: the smallest gap that decided a draw, an order or a count; where it is below a backend's numeric tolerance,
    that backend may decide otherwise. The order of `random` selection is exact everywhere and does not count.
    """

    canvas: Tensor  # (L,)
    steps: int
    margin: float


def philox(counter: Tensor, key: int | Tensor) -> Tensor:
    """Philox 4x32-10.  counter (..., 4) int64 holding 32-bit words, key: one, or int64 (...) → (..., 4)"""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return torch.stack([c0, c1, c2, c3], -1)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 × 32 bit product, in halves: int64 has no room for an unsigned 64-bit product."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def uniforms(seed: int, step: int, *, position: Tensor, token: Tensor, domain: int) -> Tensor:
    """Draws in (0, 1): (23 bits + ½)·2⁻²³, float64."""
    position, token = torch.broadcast_tensors(position, token)
    counter = torch.stack([token, position, torch.full_like(token, step), torch.full_like(token, domain)], -1)
    return ((philox(counter, seed)[..., 0] >> 9).double() + 0.5) * 2.0**-23


def block_uniforms(seed: int | Tensor, position: Tensor, token: Tensor) -> Tensor:
    """The same for decoding by blocks: token i takes word i mod 4 of the counter (i div 4, position, 0, 2)."""
    position, token = torch.broadcast_tensors(position, token)
    counter = torch.stack([token // 4, position, torch.zeros_like(token), torch.full_like(token, 2)], -1)
    words = philox(counter, seed).gather(-1, (token % 4)[..., None])[..., 0]
    return ((words >> 9).double() + 0.5) * 2.0**-23


@torch.no_grad()
def sample(
    model: Denoiser,
    canvas: Tensor,
    *,
    fill: Tensor,
    schedule: ScheduleName,
    settings: Settings,
    on_pass: Callable[[Tensor], None] = lambda canvas: None,
) -> Sampled:
    """Fill the positions `fill` of a canvas (L,) int64; on_pass sees the canvas before each pass."""
    canvas = canvas.clone()
    step, margin = 0, float("inf")
    while (open_positions := (fill & (canvas == MASK)).nonzero()[:, 0]).numel():
        on_pass(canvas)
        t = time_of_masked_fraction(schedule, float((canvas == MASK).sum()) / (canvas.numel() - 1))
        logp = canvas_logits(model, canvas[None], [t], open_positions).log_softmax(-1).cpu()  # (M, V)
        margin = min(margin, commit_pass(canvas, open_positions, logp=logp, step=step, settings=settings))
        step += 1
    return Sampled(canvas, step, margin)


def commit_pass(canvas: Tensor, open_positions: Tensor, *, logp: Tensor, step: int, settings: Settings) -> float:
    """One pass: draw a candidate everywhere, order them, commit some of them in place.  → smallest deciding gap

    canvas (L,), open_positions (M,), logp (M, V)
    """
    entropy = -(logp.exp() * logp.clamp(min=-1e6)).sum(-1)
    best, ids = _best(logp, max(2, settings.top_k))  # two: `margin` compares them
    uniform = uniforms(settings.seed, step, position=open_positions[:, None], token=ids, domain=0)
    token, confidence, apart = _draw(best, ids, uniform, settings)
    score = _order_score(best, open_positions, entropy=entropy, confidence=confidence, step=step, s=settings)
    ranked, order = score.sort(descending=True, stable=True)
    count, gap = _num_to_commit(ranked, step, confidence=confidence, entropy=entropy[order], s=settings)
    margin = min(float(apart.min()), gap)
    exact = settings.selection == "random" and settings.threshold is None and settings.entropy_bound is None
    if count < len(order) and not exact:
        margin = min(margin, float(ranked[count - 1] - ranked[count]))
    _commit(canvas, open_positions[order[:count]], token[order[:count]])
    return margin


def _best(logp: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, best first; ties: the lower id first, which `topk` leaves open.

    logp (M, V) → log-probabilities (M, k), ids (M, k)
    """
    at_least = int((logp >= logp.topk(k).values[:, -1:]).sum(-1).max())  # k, and what ties with the k-th
    ids = logp.topk(at_least).indices.sort(-1).values
    best, order = logp.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return best[:, :k], ids.gather(-1, order)[:, :k]


def _draw(logp: Tensor, ids: Tensor, uniform: Tensor, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """A draw from the softmax over the kept candidates (M, k).  → token, confidence, gap to the second, all (M,)"""
    if s.temperature == 0:
        return ids[:, 0], logp[:, 0], logp[:, 0] - logp[:, 1]
    logp, ids, uniform = logp[:, : s.top_k], ids[:, : s.top_k], uniform[:, : s.top_k]
    score = logp.double() / s.temperature
    p = score.softmax(-1)
    kept = p.cumsum(-1) - p < s.top_p
    noisy = torch.where(kept, score - (-uniform.log()).log(), -torch.inf)
    best = noisy.amax(-1, keepdim=True)
    token = ids.masked_fill(noisy < best, torch.iinfo(ids.dtype).max).amin(-1, keepdim=True)  # ties: the lower id
    second = noisy.masked_fill(ids == token, -torch.inf).amax(-1, keepdim=True)
    return token[:, 0], logp[ids == token], (best - second)[:, 0]


def drawn(logp: Tensor, position: Tensor, settings: Settings, seeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each row's token by temperature, top-k and top-p, with the noise of blocks: of (seed, position, token).

    logp (M, V), position (M,), seeds (M,): in place of that of the settings → token (M,), gap to the second best (M,)
    """
    best, ids = _best(logp, min(max(2, settings.top_k), logp.shape[-1]))
    seed = settings.seed if seeds is None else seeds[:, None]
    token, _, gap = _draw(best, ids, block_uniforms(seed, position[:, None], ids), settings)
    return token, gap


def guided(conditioned: Tensor, plain: Tensor, guidance: float, candidates: int) -> Tensor:
    """The law that a condition and its guidance w give: among the K likeliest tokens given the condition,
    (1 + w) · log p(token | condition) − w · log p(token), others never (Ho and Salimans, arXiv 2207.12598).

    Temperature, top-k and top-p are applied after it. Only the K: far down in both laws their ratio says nothing.
    conditioned, plain: log-probabilities (M, V), candidates: K → unnormalized (M, V)
    """
    best, ids = _best(conditioned, candidates)
    scores = ((1 + guidance) * best - guidance * plain.gather(-1, ids)).where(best.isfinite(), -torch.inf)
    return torch.full_like(conditioned, -torch.inf).scatter(-1, ids, scores)


def _order_score(
    logp: Tensor, position: Tensor, *, entropy: Tensor, confidence: Tensor, step: int, s: Settings
) -> Tensor:
    if s.threshold is not None:
        return confidence
    if s.entropy_bound is not None:
        return -entropy
    if s.selection == "random":
        return uniforms(s.seed, step, position=position, token=torch.zeros_like(position), domain=1)
    by_rule = {"confidence": confidence, "entropy": -entropy, "margin": logp[:, 0].exp() - logp[:, 1].exp()}
    return by_rule[s.selection]


def _num_to_commit(ranked: Tensor, step: int, *, confidence: Tensor, entropy: Tensor, s: Settings) -> tuple[int, float]:
    """How many positions to commit, and by how much that number was decided."""
    if step >= s.steps - 1:
        return len(ranked), float("inf")
    if s.threshold is not None:
        above = confidence - math.log(s.threshold)
        return max(1, int((above >= 0).sum())), float(above.abs().min())
    if s.entropy_bound is not None:
        room = s.entropy_bound - (entropy.cumsum(0) - entropy)  # ascending: the last of a set is its largest
        return int((room >= 0).sum()), float(room[1:].abs().min()) if len(room) > 1 else float("inf")
    return reveal_count(len(ranked), step, s.steps), float("inf")


def _commit(canvas: Tensor, position: Tensor, token: Tensor) -> None:
    """Text first; then ends, only after all text; then what is certain."""
    for p, v in zip(position.tolist(), token.tolist(), strict=True):
        if v >= FIRST_TEXT_ID:
            canvas[p] = v
    last_text = max((i for i, v in enumerate(canvas.tolist()) if v >= FIRST_TEXT_ID), default=0)
    for p, v in zip(position.tolist(), token.tolist(), strict=True):
        if v < FIRST_TEXT_ID and p > last_text:
            canvas[p] = v
    for i, v in enumerate(canvas.tolist()):
        if v in (EOS, PAD):
            canvas[i] = EOS if canvas[i - 1] != MASK else v
            canvas[i + 1 :] = PAD
            break
