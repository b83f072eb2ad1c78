"""`host.export --report`: where INT8 loses precision, and how often whole texts come out the same."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from edge.decoding.canvas import unmask
from edge.decoding.types import Ids, Positions, Row, Sampling, StepResult
from host.evaluate.scorers import GraphScorer, TorchScorer
from host.export.bundle_writer import BundleGraph
from host.export.reference import PARITY_SEED, Reference
from host.sampling.reference import TOP_K
from shared.tokens import BOS, MASK, PAD

STEPS: Final = 32
SEEDS: Final = 4


def print_report(reference: Reference, graphs: Sequence[BundleGraph]) -> None:
    """The error of each layer alone, and how whole generations agree with float32."""
    print("\nerror of each linear layer alone in INT8, worst first")
    for error in reference.worst_first:
        print(f"  {error.layer.removesuffix('.matmul'):30} {error.error:7.2%}")
    print(f"\nwhole texts of {STEPS} steps, {SEEDS} seeds: positions with the same token as torch fp32")
    expected = _texts(reference, TorchScorer(reference.model))
    for graph in graphs:
        found = _texts(reference, GraphScorer(graph.file, graph.model))
        written = (expected != PAD) | (found != PAD)
        print(f"  {graph.file:30} {(expected == found)[written].mean():7.1%}")


def _texts(reference: Reference, scorer: TorchScorer | GraphScorer) -> NDArray[np.int32]:
    """One sampled canvas a seed, by the edge's loop.  → (SEEDS, L)

    For information: one near tie decided otherwise sends the rest of a text elsewhere.
    """
    config = reference.model.config
    top_k = min(TOP_K, config.vocab_size)
    backend = _Backend(scorer, top_k)
    texts = np.full((SEEDS, config.canvas_len), MASK, np.int32)
    texts[:, 0] = BOS
    for seed, canvas in enumerate(texts, PARITY_SEED):
        sampling = Sampling(seed, STEPS, "random", temperature=1.0, top_k=top_k, top_p=1.0)
        unmask(backend, reference.progress.schedule, Row(canvas, canvas == MASK, sampling))
    return texts


class _Backend:
    """What the edge's loop asks of a backend, answered from all scores of the masked positions."""

    lanes = 1

    def __init__(self, scorer: TorchScorer | GraphScorer, top_k: int) -> None:
        self._scorer = scorer
        self._top_k = top_k

    def score(self, canvas: Ids, t: float, positions: Positions, rows: int = 1) -> StepResult:
        wanted = np.isin(np.flatnonzero(canvas == MASK), positions)
        logp = torch.from_numpy(self._scorer.logits(canvas, t)[wanted]).log_softmax(-1)  # (M, V)
        best = logp.sort(dim=-1, descending=True, stable=True)
        ids, values = best.indices[:, : self._top_k], best.values[:, : self._top_k]
        return StepResult(ids.int().numpy(), values.numpy(), torch.special.entr(logp.exp()).sum(-1).numpy())

    def close(self) -> None:
        pass
