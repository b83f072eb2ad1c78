"""Many samples at once: the passes of `host.sampling.reference`, with batched network calls."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from host.model.conditions import Condition, Given, Memory
from host.model.diffusion import canvas_logits
from host.model.layouts import causal, first_end
from host.model.network import NO_PADDING, Cache, Denoiser
from host.sampling.reference import TOP_K, Sampled, Settings, commit_pass, drawn, guided
from shared.schedule import ScheduleName, time_of_masked_fraction
from shared.tokens import BOS, EOS, MASK, PAD

ROWS: Final = 16  # canvases in a network call
TEXTS: Final = 64  # autoregressive texts in a network call


def open_canvas(length: int) -> Tensor:
    """BOS, and everything else to be filled.  → (L,) int64"""
    canvas = torch.full((length,), MASK)
    canvas[0] = BOS
    return canvas


@torch.no_grad()
def sample_many(
    model: Denoiser, schedule: ScheduleName, settings: Sequence[Settings], dtype: torch.dtype | None = None
) -> list[Sampled]:
    """One canvas for each of `settings`, equal to those of `sample` up to rounding. dtype: for autocast.

    Canvases are cut after a committed end: what follows is PAD for certain.
    """
    length = model.config.canvas_len
    canvases = [open_canvas(length) for _ in settings]
    passes, margins = [0] * len(settings), [float("inf")] * len(settings)
    while unfinished := [i for i, canvas in enumerate(canvases) if bool((canvas == MASK).any())]:
        unfinished.sort(key=lambda i: int(first_end(canvases[i][None])))
        for start in range(0, len(unfinished), ROWS):
            rows = unfinished[start : start + ROWS]
            for i, logp in zip(rows, scores(model, schedule, [canvases[i] for i in rows], dtype), strict=True):
                open_positions = (canvases[i] == MASK).nonzero()[:, 0]
                margin = commit_pass(canvases[i], open_positions, logp=logp, step=passes[i], settings=settings[i])
                passes[i], margins[i] = passes[i] + 1, min(margins[i], margin)
    return [Sampled(*one) for one in zip(canvases, passes, margins, strict=True)]


def scores(
    model: Denoiser, schedule: ScheduleName, canvases: list[Tensor], dtype: torch.dtype | None
) -> tuple[Tensor, ...]:
    """Log-probabilities at the masked positions of each canvas.  → (M, V) for each"""
    whole = torch.stack(canvases)
    length = whole.shape[1]
    cut = whole[:, : min(length, int(first_end(whole).max()) + 1)]
    masked = cut == MASK
    at = masked.flatten().nonzero()[:, 0]
    times = [time_of_masked_fraction(schedule, float(row.sum()) / (length - 1)) for row in masked]
    with torch.autocast(model.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        logp = canvas_logits(model, cut, times, at).log_softmax(-1).cpu()
    parts: tuple[Tensor, ...] = logp.split(masked.sum(1).tolist())
    return parts


@torch.no_grad()
def sample_autoregressive(
    model: Denoiser,
    settings: Sequence[Settings],
    *,
    dtype: torch.dtype | None = None,
    prompts: Tensor | None = None,
    conditions: Sequence[Condition] = (),
    guidance: float = 0.0,
) -> Tensor:
    """One canvas for each of `settings`, equal to those of `host.sampling.blocks.write` up to rounding.

    prompts (len(settings), P), conditions: of each, or none at all → (len(settings), L)
    """
    length, n = model.config.canvas_len, len(settings)
    given = torch.full((n, 1), BOS) if prompts is None else F.pad(prompts, (1, 0), value=BOS)
    canvases = torch.full((n, length), PAD)
    canvases[:, : given.shape[1]] = given
    for start in range(0, n, TEXTS):
        here = slice(start, start + TEXTS)
        memory = model.remember(Given.of(conditions[here]).to(model.device)) if conditions else None
        memories = [memory, None] if guidance else [memory]
        _continue(
            model,
            canvases[here],
            start=given.shape[1],
            settings=settings[here],
            dtype=dtype,
            memories=memories,
            guidance=guidance,
        )
    return canvases


def _continue(
    model: Denoiser,
    canvases: Tensor,
    *,
    start: int,
    settings: Sequence[Settings],
    dtype: torch.dtype | None,
    memories: Sequence[Memory | None],
    guidance: float,
) -> None:
    """Fill canvases (B, L) in place from position `start` on, a token of each in a pass.

    memories: of the rows that are written by; with guidance also that of the others, which is none.
    """
    caches = [Cache.empty(model.config, len(canvases), model.device) for _ in memories]
    going, seeds = torch.ones(len(canvases), dtype=torch.bool), torch.tensor([one.seed for one in settings])
    alike: dict[Settings, list[int]] = {}  # rows that are drawn at once
    for row, one in enumerate(settings):
        alike.setdefault(replace(one, seed=0), []).append(row)
    for i in range(start, canvases.shape[1]):
        rows = causal(canvases[:, :i]).to(model.device)
        new, laws = torch.arange(len(caches[0]), i), []
        for cache, memory in zip(caches, memories, strict=True):
            with torch.autocast(model.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                fresh = rows.tokens[:, new], rows.positions[:, new], rows.visible[:, new]
                states = model(*fresh, cache, memory=memory)[:, -1]
                laws.append(model.logits(states, NO_PADDING).log_softmax(-1).cpu())
            cache.keep(torch.arange(len(new)))
        logp = guided(laws[0], laws[-1], guidance, min(TOP_K, laws[0].shape[1])) if guidance else laws[0]
        for one, rows_alike in alike.items():
            at = torch.tensor([row for row in rows_alike if going[row]], dtype=torch.long)
            if len(at):
                canvases[at, i] = drawn(logp[at], torch.full((len(at),), i), one, seeds[at])[0]
        going &= canvases[:, i] != EOS
        if not going.any():
            break
