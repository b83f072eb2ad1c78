"""Many samples at once: the passes of `host.sampling.reference`, with batched network calls."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from host.model.conditions import Condition, Given, Memory, Remaining
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
        _continue(
            model,
            canvases[here],
            start=given.shape[1],
            settings=settings[here],
            dtype=dtype,
            asking=None if memory is None else _Asking(memory, list(map(Remaining, conditions[here]))),
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
    asking: "_Asking | None",
    guidance: float,
) -> None:
    """Fill canvases (B, L) in place from position `start` on, a token of each in a pass.

    With guidance there are two streams of rows, of which the second reads no memory.
    """
    caches = [Cache.empty(model.config, len(canvases), model.device) for _ in range(2 if guidance else 1)]
    going, seeds = torch.ones(len(canvases), dtype=torch.bool), torch.tensor([one.seed for one in settings])
    alike: dict[Settings, list[int]] = {}  # rows that are drawn at once
    for row, one in enumerate(settings):
        alike.setdefault(replace(one, seed=0), []).append(row)
    for i in range(start, canvases.shape[1]):
        rows = causal(canvases[:, :i]).to(model.device)
        new, laws = torch.arange(len(caches[0]), i), []
        for cache, memory in zip(caches, (None if asking is None else asking.memory(), None), strict=False):
            with torch.autocast(model.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                fresh = rows.tokens[:, new], rows.positions[:, new], rows.visible[:, new]
                states = model(*fresh, cache, memory=memory)[:, -1]
                laws.append(model.logits(states, NO_PADDING).log_softmax(-1).cpu())
            cache.keep(torch.arange(len(new)))
        logp = laws[0]
        if guidance and asking is not None:
            changed = guided(laws[0], laws[-1], guidance, min(TOP_K, laws[0].shape[1]))
            logp = torch.where(asking.nothing()[:, None], logp, changed)
        for one, rows_alike in alike.items():
            at = torch.tensor([row for row in rows_alike if going[row]], dtype=torch.long)
            if len(at):
                canvases[at, i] = drawn(logp[at], torch.full((len(at),), i), one, seeds[at])[0]
        going &= canvases[:, i] != EOS
        if asking is not None:
            asking.read(canvases[:, start : i + 1])
        if not going.any():
            break


class _Asking:
    """What texts are still asked for (`Remaining`), and the memory that their rows read, an empty row behind it."""

    def __init__(self, memory: Memory, asked: list[Remaining]) -> None:
        self._whole, self._asked = memory.with_an_empty_row(), asked
        self._hidden = torch.stack([self._of(one) for one in asked])

    def _of(self, one: Remaining) -> Tensor:
        rows = self._whole.keys[0].shape[2] - 1
        return F.pad(one.hidden(rows), (0, 1), value=not one.nothing) | F.pad(torch.full((rows,), one.nothing), (0, 1))

    def read(self, texts: Tensor) -> None:
        """Take note of the words that texts (B, N), written so far, end with."""
        for b, one in enumerate(self._asked):
            if one.left and one.tells(texts[b].tolist()):
                self._hidden[b] = self._of(one)

    def nothing(self) -> Tensor:
        """Which texts are asked for nothing more.  → (B,) bool"""
        return torch.tensor([one.nothing for one in self._asked])

    def memory(self) -> Memory:
        """What the rows to come read."""
        return self._whole.without(self._hidden.to(self._whole.keys[0].device))
