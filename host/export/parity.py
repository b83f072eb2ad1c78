"""How closely a quantized graph follows float32: the gate a bundle must pass."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from host.evaluate.likelihood import nelbo_per_token
from host.evaluate.scorers import Canvases, GraphScorer, TorchScorer
from host.export.reference import Reference
from host.model.network import Denoiser
from shared.manifest import Parity

MAX_NELBO_CHANGE: Final = 0.01
MIN_TOP1_AGREEMENT: Final = 0.95


def measure(reference: Reference, graph: GraphScorer, scheme: str, kept_float: Sequence[str] = ()) -> Parity:
    """NELBO on the same noise, and the share of masked positions whose likeliest token is the same in both."""
    nelbo = nelbo_per_token(graph, reference.few, reference.progress.schedule)
    pairs = zip(reference.canvases, reference.likeliest, strict=True)
    same = np.concatenate([graph.logits(canvas, t).argmax(-1) == best for (canvas, t), best in pairs])
    return Parity(
        graph=graph.name,
        scheme=scheme,
        nelbo_ratio=nelbo / reference.nelbo,
        top1_agreement=float(same.mean()),
        kept_float=tuple(kept_float),
    )


def passes(parity: Parity) -> bool:
    """NELBO within 1 % and at least 95 % of the likeliest tokens the same."""
    return nelbo_change(parity) <= MAX_NELBO_CHANGE and parity.top1_agreement >= MIN_TOP1_AGREEMENT


def nelbo_change(parity: Parity) -> float:
    """How far the NELBO moved, as a part of it."""
    return abs(parity.nelbo_ratio - 1)


def dropped_mass(model: Denoiser, canvases: Canvases, top_k: int, temperature: float) -> float:
    """Probability that sampling over the whole vocabulary would leave the top K; mean over masked positions."""
    network, dropped = TorchScorer(model), []
    for canvas, t in canvases:
        p = (torch.from_numpy(network.logits(canvas, t)) / temperature).softmax(-1)  # (M, V)
        dropped.append(1 - p.topk(top_k).values.double().sum(-1))
    return float(torch.cat(dropped).mean())
