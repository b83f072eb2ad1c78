"""`host.export --report`: where INT8 loses precision, and how often whole texts come out the same."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from edge.backends import StepResult
from edge.decoding.canvas import Sampling, unmask
from host.evaluate.likelihood import evaluate, print_table
from host.evaluate.scorers import GraphScorer
from host.export.bundle_writer import StepGraph
from host.export.cuda_graph import cuda_graph
from host.export.pipeline import FP16, PARITY_SEED, PARITY_STORIES, Yardstick, held_to
from host.export.sensitivity import layer_errors
from host.model.network import Denoiser, ends_impossible
from host.sampling.reference import TOP_K
from shared.manifest import Evaluation
from shared.tokens import BOS, MASK, PAD

STEPS: Final = 64


def print_report(yardstick: Yardstick, graphs: Sequence[StepGraph], evaluations: Sequence[Evaluation]) -> None:
    """The figures of every graph, the error of each layer alone, and how whole generations agree with float32.

    Half precision is measured too where it is not shipped: it tells what INT8 itself costs.
    """
    top_k = min(TOP_K, yardstick.model.config.vocab_size)
    if all(graph.precision != "fp16" for graph in graphs):
        graphs = [*graphs, held_to(yardstick, StepGraph(cuda_graph(yardstick.model), "fp16", "cuda"), FP16).graph]
        scorer = GraphScorer(f"{graphs[-1].file}, not shipped", graphs[-1].model)
        evaluations = [*evaluations, evaluate(scorer, yardstick.held_out, yardstick.progress.schedule)]
    print_table(evaluations)
    print("\nerror of each linear layer alone in INT8, worst first")
    for error in layer_errors(cuda_graph(yardstick.model), yardstick.calibration[::8]):
        print(f"  {error.layer.removesuffix('.matmul'):30} {error.error:7.2%}")
    print(f"\nwhole texts of {STEPS} steps, {PARITY_STORIES} seeds: positions with the same token as torch fp32")
    for graph in graphs:
        agreement = generation_agreement(yardstick, GraphScorer(graph.file, graph.model), top_k)
        print(f"  {graph.file:30} {agreement:7.1%}")


def generation_agreement(yardstick: Yardstick, graph: GraphScorer, top_k: int) -> float:
    """Share of written positions that hold the same token when a whole text is sampled with the same seed.

    For information: one near tie decided otherwise sends the rest of a text elsewhere.
    """
    same, written = 0, 0
    for seed in range(PARITY_SEED, PARITY_SEED + PARITY_STORIES):
        texts = [_text(yardstick, scorer, top_k, seed) for scorer in (_Torch(yardstick.model), graph)]
        either = (texts[0] != PAD) | (texts[1] != PAD)
        same += int((texts[0] == texts[1])[either].sum())
        written += int(either.sum())
    return same / written


class _Torch:
    """The network as GraphScorer answers."""

    def __init__(self, model: Denoiser) -> None:
        self.model = model

    @torch.no_grad()
    def logits(self, canvas: NDArray[np.int32], t: float) -> NDArray[np.float32]:
        row = torch.from_numpy(canvas.astype(np.int64))[None]
        masked = row[0] == MASK
        hidden = self.model.score_canvas(row, torch.tensor([t]) if self.model.config.time_input else None)[0, masked]
        scores: NDArray[np.float32] = self.model.logits(hidden, ends_impossible(row)[0, masked]).numpy()
        return scores


class _Backend:
    """What the edge's loop asks of a backend, answered from all scores of the masked positions."""

    def __init__(self, scorer: "_Torch | GraphScorer", length: int, top_k: int) -> None:
        self.lengths: tuple[int, ...] = (length,)
        self.batches: tuple[int, ...] = (1,)
        self._scorer = scorer
        self._top_k = top_k

    def step(self, canvas: NDArray[np.int32], t: NDArray[np.float32], wanted: NDArray[np.bool_]) -> StepResult:
        logp = torch.from_numpy(self._scorer.logits(canvas[0], float(t[0]))).log_softmax(-1)  # (M, V)
        best = logp.sort(dim=-1, descending=True, stable=True)
        masked = canvas == MASK
        ids = np.zeros((*canvas.shape, self._top_k), np.int32)
        values = np.zeros(ids.shape, np.float32)
        entropy = np.zeros(canvas.shape, np.float32)
        ids[masked] = best.indices[:, : self._top_k].numpy()
        values[masked] = best.values[:, : self._top_k].numpy()
        entropy[masked] = torch.special.entr(logp.exp()).sum(-1).numpy()
        return StepResult(ids, values, entropy)

    def close(self) -> None:
        pass


def _text(yardstick: Yardstick, scorer: "_Torch | GraphScorer", top_k: int, seed: int) -> NDArray[np.int32]:
    canvas = np.full(yardstick.model.config.canvas_len, MASK, np.int32)
    canvas[0] = BOS
    backend = _Backend(scorer, len(canvas), top_k)
    sampling = Sampling(seed, STEPS, "random", temperature=1.0, top_k=top_k, top_p=1.0)
    unmask(backend, yardstick.progress.schedule, canvas, canvas == MASK, sampling, lambda step, now: None)
    return canvas
