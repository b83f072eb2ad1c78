"""Many samples at once, for measuring: the passes of `host.sampling.reference`, their network calls shared."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from host.model.layouts import causal, first_end
from host.model.network import NO_PADDING, Denoiser, ends_impossible
from host.sampling.reference import Sampled, Settings, commit_pass, drawn
from shared.schedule import ScheduleName, time_of_masked_fraction
from shared.tokens import BOS, EOS, MASK, PAD

ROWS: Final = 16  # canvases in a network call


def open_canvas(length: int) -> Tensor:
    """BOS, and everything else to be filled.  → (L,) int64"""
    canvas = torch.full((length,), MASK)
    canvas[0] = BOS
    return canvas


@torch.no_grad()
def sample_many(
    model: Denoiser, schedule: ScheduleName, settings: Sequence[Settings], dtype: torch.dtype | None = None
) -> list[Sampled]:
    """One whole canvas for each of `settings`, as `sample` fills it up to rounding; dtype: autocast to it.

    What lies behind a committed end is certain, so canvases are cut there.
    """
    length = model.config.canvas_len
    canvases = [open_canvas(length) for _ in settings]
    passes, margins = [0] * len(settings), [float("inf")] * len(settings)
    while unfinished := [i for i, canvas in enumerate(canvases) if bool((canvas == MASK).any())]:
        unfinished.sort(key=lambda i: int(first_end(canvases[i][None])))
        for start in range(0, len(unfinished), ROWS):
            rows = unfinished[start : start + ROWS]
            for i, logp in zip(rows, _scores(model, schedule, [canvases[i] for i in rows], dtype), strict=True):
                open_positions = (canvases[i] == MASK).nonzero()[:, 0]
                margin = commit_pass(canvases[i], open_positions, logp, passes[i], settings[i])
                passes[i], margins[i] = passes[i] + 1, min(margins[i], margin)
    return [Sampled(*found) for found in zip(canvases, passes, margins, strict=True)]


def _scores(
    model: Denoiser, schedule: ScheduleName, canvases: list[Tensor], dtype: torch.dtype | None
) -> tuple[Tensor, ...]:
    """Log-probabilities at the masked positions of each canvas.  → (M, V) for each"""
    whole = torch.stack(canvases)
    length = whole.shape[1]
    cut = whole[:, : min(length, int(first_end(whole).max()) + 1)]
    masked = cut == MASK
    at = masked.flatten().nonzero()[:, 0]
    times = [time_of_masked_fraction(schedule, float(row.sum()) / (length - 1)) for row in masked]
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        hidden = model.score_canvas(cut, torch.tensor(times) if model.config.time_input else None, at)
        logp = model.logits(hidden, ends_impossible(cut).flatten()[at]).log_softmax(-1)
    parts: tuple[Tensor, ...] = logp.split(masked.sum(1).tolist())
    return parts


@torch.no_grad()
def sample_autoregressive(
    model: Denoiser, settings: Sequence[Settings], dtype: torch.dtype | None = None, prompt: Sequence[int] = ()
) -> Tensor:
    """One canvas for each of `settings`, token by token after `prompt`; with the same seed, temperature, top-k and
    top-p that `sample` draws with.  → (len(settings), L)
    """
    length = model.config.canvas_len
    canvases = torch.full((len(settings), length), PAD)
    canvases[:, : 1 + len(prompt)] = torch.tensor([BOS, *prompt])
    for i in range(1 + len(prompt), length):
        rows = (canvases != EOS).all(1).nonzero()[:, 0]
        for part in rows.split(ROWS):
            at = torch.arange(len(part)) * i + i - 1
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                hidden = model(*causal(canvases[part, :i]), at=at)
                logp = model.logits(hidden, torch.full_like(at, NO_PADDING)).log_softmax(-1)
            for row, scores in zip(part.tolist(), logp, strict=True):
                canvases[row, i] = drawn(scores[None], torch.tensor([i]), settings[row])[0]
    return canvases
