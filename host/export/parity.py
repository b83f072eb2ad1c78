"""How closely a quantized graph follows float32: the gate a bundle must pass."""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from host.evaluate.likelihood import HeldOut, evaluate
from host.evaluate.scorers import Canvases, GraphScorer, TorchScorer
from host.model.network import Denoiser, ends_impossible
from host.sampling.reference import TOP_K, Settings, sample
from shared.manifest import Parity
from shared.schedule import ScheduleName, time_of_masked_fraction
from shared.tokens import BOS, FIRST_TEXT_ID, MASK

MAX_NELBO_CHANGE: Final = 0.01
MIN_TOP1_AGREEMENT: Final = 0.95
PROMPT_TOKENS: Final = 8


def trajectories(
    model: Denoiser, schedule: ScheduleName, stories: NDArray[np.uint16], seed: int, steps: int = 16
) -> list[tuple[NDArray[np.int32], float]]:
    """Canvases that sampling really visits: runs the reference sampler from story beginnings.

    stories (n, L): the first half of them give 8 tokens as a prompt, the rest only BOS.  → (canvas (L,), t) pairs
    """
    visited: list[tuple[NDArray[np.int32], float]] = []
    length = stories.shape[1]

    def remember(canvas: torch.Tensor) -> None:
        t = time_of_masked_fraction(schedule, float((canvas == MASK).sum()) / (length - 1))
        visited.append((canvas.numpy().astype(np.int32), t))

    for i, story in enumerate(stories):
        canvas = torch.full((length,), MASK)
        canvas[0] = BOS
        if i < len(stories) // 2:
            prompt = story[1 : 1 + PROMPT_TOKENS]
            canvas[1 : 1 + len(prompt)] = torch.from_numpy(np.maximum(prompt, FIRST_TEXT_ID).astype(np.int64))
        settings = Settings(seed=seed + i, steps=steps, top_k=min(TOP_K, model.config.vocab_size))
        sample(model, schedule, canvas, canvas == MASK, settings, on_pass=remember)
    return visited


def stratified(visited: Canvases, strata: int, each: int, seed: int) -> Canvases:
    """Of canvases that sampling visits, `each` from every band of mask rates, drawn by chance.

    Trajectories spend many passes where nearly all is masked, and leap over whole bands when an end is drawn. A band
    with fewer canvases gives some of them more than once; one that was never visited gives none.
    """
    bands: list[list[tuple[NDArray[np.int32], float]]] = [[] for _ in range(strata)]
    for canvas, t in visited:
        masked = np.count_nonzero(canvas == MASK) / (canvas.size - 1)  # above 0, to 1
        bands[math.ceil(masked * strata) - 1].append((canvas, t))
    rng = np.random.default_rng(seed)
    return [band[i] for band in bands if band for i in rng.choice(len(band), each, replace=len(band) < each)]


@torch.no_grad()
def top1_agreement(model: Denoiser, graph: GraphScorer, canvases: Canvases) -> float:
    """Share of masked positions whose likeliest token is the same in both."""
    same, total = 0, 0
    for canvas, t in canvases:
        row = torch.from_numpy(canvas.astype(np.int64))[None]
        masked = row[0] == MASK
        hidden = model.score_canvas(row, torch.tensor([t]) if model.config.time_input else None)[0, masked]
        reference = model.logits(hidden, ends_impossible(row)[0, masked]).argmax(-1).numpy()
        same += int((graph.logits(canvas, t).argmax(-1) == reference).sum())
        total += int(masked.sum())
    return same / total


@torch.no_grad()
def dropped_mass(model: Denoiser, canvases: Canvases, top_k: int, temperature: float) -> float:
    """Probability that sampling over the whole vocabulary would leave the top K; mean over masked positions."""
    dropped = []
    for canvas, t in canvases:
        row = torch.from_numpy(canvas.astype(np.int64))[None]
        masked = row[0] == MASK
        hidden = model.score_canvas(row, torch.tensor([t]) if model.config.time_input else None)[0, masked]
        p = (model.logits(hidden, ends_impossible(row)[0, masked]) / temperature).softmax(-1)  # (M, V)
        dropped.append(1 - p.topk(top_k).values.double().sum(-1))
    return float(torch.cat(dropped).mean())


def measure(
    model: Denoiser,
    schedule: ScheduleName,
    graph: GraphScorer,
    scheme: str,
    held_out: HeldOut,
    canvases: Canvases,
    kept_float: Sequence[str] = (),
) -> Parity:
    """NELBO on the same noise, and agreement on the reference's own canvases."""
    reference = evaluate(TorchScorer(model), held_out, schedule, draws=1).nelbo_nats_per_token.value
    found = evaluate(graph, held_out, schedule, draws=1).nelbo_nats_per_token.value
    return Parity(
        graph=graph.name,
        scheme=scheme,
        nelbo_ratio=found / reference,
        top1_agreement=top1_agreement(model, graph, canvases),
        kept_float=tuple(kept_float),
    )


def passes(parity: Parity) -> bool:
    """NELBO within 1 % and at least 95 % of the likeliest tokens the same."""
    return abs(parity.nelbo_ratio - 1) <= MAX_NELBO_CHANGE and parity.top1_agreement >= MIN_TOP1_AGREEMENT
