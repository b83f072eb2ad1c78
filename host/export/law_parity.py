"""How closely INT8 and FP16 graphs of blocks follow float32: the gate of the laws that texts are written by."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from host.evaluate.cuda_rows import CudaRows
from host.evaluate.infilling import held_out_gaps
from host.evaluate.likelihood import HeldOut, ratio
from host.evaluate.row_graphs import RowGraphs, left_to_right
from host.export.bundle_writer import BundleGraph
from host.export.row_builder import Ranges
from host.export.row_ranges import best_ranges, calibration_rows, observe
from host.model.conditions import Condition, Given
from host.model.network import Denoiser
from host.train.objectives import Example, Settings, ar
from shared.manifest import LawFigures, LawParity
from shared.tokens import PAD

MAX_LAW_CHANGE: Final = 0.005
MAX_INFILLING_CHANGE: Final = 0.01
MAX_MEMORY_ERROR: Final = 0.05
AnyRows = RowGraphs | CudaRows
GATE: Final = (
    f"left to right within {MAX_LAW_CHANGE:.1%} and infilling within {MAX_INFILLING_CHANGE:.0%} of float32, given a "
    f"condition within {MAX_LAW_CHANGE:.1%}, its memory within {MAX_MEMORY_ERROR:.0%}"
)
PROMPT_TOKENS: Final = 16
GREEDY_TEXTS: Final = 16
"""That a graph writes: a figure which the gate does not read."""


@dataclass(frozen=True, kw_only=True)
class LawReference:
    """float32 graphs, and few held-out stories to compare others with them on. What they say is computed once.

    text (n, L): stories of training, which choose the scales of INT8. For CUDA, of a network that takes conditions:
    conditioned: its float32 graphs; given: held-out stories, each with a condition; calibration: stories of training
    with conditions, which choose scales, too.
    """

    model: Denoiser
    learned: Collection[str]
    graphs: RowGraphs
    few: HeldOut
    text: NDArray[np.uint16]
    conditioned: RowGraphs | None = None
    given: Sequence[Example] = ()
    calibration: Sequence[Example] = ()

    @cached_property
    def ranges(self) -> tuple[Ranges, list[str]]:
        """Of the inputs of linear layers, and the layers, the worst in INT8 first."""
        return best_ranges(self.model, observe(self.model, calibration_rows(self.text, self.learned)))

    @cached_property
    def cuda_ranges(self) -> tuple[Ranges, list[str]]:
        """The same for CUDA's graphs, whose rows read conditions or not."""
        if not self.calibration:
            return self.ranges
        rows = [*calibration_rows(self.text, self.learned), *self.calibration]
        return best_ranges(self.model, observe(self.model, rows))

    @cached_property
    def nats_given(self) -> float:
        """Of all tokens of the stories with a condition."""
        assert self.conditioned is not None
        return total_nats(self.conditioned, self.given)

    @cached_property
    def stories(self) -> list[Example]:
        """Left to right."""
        return left_to_right(self.few)

    @cached_property
    def gaps(self) -> list[Example]:
        """The stories with gaps in them."""
        return held_out_gaps(self.few)[1] if "infill" in self.learned else []

    @cached_property
    def nats(self) -> tuple[float, float]:
        """Of all tokens left to right, and of all gap tokens."""
        return total_nats(self.graphs, self.stories), total_nats(self.graphs, self.gaps)

    @cached_property
    def texts(self) -> list[Example]:
        """Greedy continuations of the first tokens of the first stories."""
        long_enough = self.few.canvases[self.few.canvases[:, PROMPT_TOKENS] != PAD][:GREEDY_TEXTS]
        length = self.few.canvases.shape[1]
        return [read(self.graphs.greedy(story[: 1 + PROMPT_TOKENS].tolist(), length)) for story in long_enough]


def nats(graphs: AnyRows, example: Example) -> float:
    """Negative log-likelihood of an example's targets."""
    return float(F.cross_entropy(graphs.scores(example), example.target, reduction="sum"))


def total_nats(graphs: AnyRows, examples: Sequence[Example]) -> float:
    """Of all targets."""
    return sum(nats(graphs, one) for one in examples)


def read(text: Sequence[int], condition: Condition | None = None) -> Example:
    """A whole text, from left to right."""
    (example,) = ar.examples(torch.tensor([text]), np.random.default_rng(0), Settings())
    return replace(example, condition=condition)


def agreeing(graphs: AnyRows, texts: Sequence[Example], given: int) -> float:
    """Share of greedy texts that graphs would write, too, after their first `given` tokens: one pass over each.

    A text is theirs to the last token if each of its tokens is their likeliest after the tokens before it.
    """
    same = [bool((graphs.scores(one).argmax(-1) == one.target)[given - 1 :].all()) for one in texts]
    return sum(same) / max(1, len(same))


def row_graphs(graphs: Collection[BundleGraph]) -> RowGraphs:
    """Step and prefill graph for the CPU, to be measured."""
    by_role = {graph.role: graph.model for graph in graphs}
    return RowGraphs(by_role["step"], by_role.get("prefill"))


def any_rows(graphs: Collection[BundleGraph]) -> AnyRows:
    """The same, or the step graph for CUDA, which reads evidence itself, with its encoders."""
    cuda: dict[str, onnx.ModelProto] = {graph.role: graph.model for graph in graphs if graph.target == "cuda"}
    return CudaRows(cuda.pop("step"), cuda) if cuda else row_graphs(graphs)


def measure_law(
    reference: LawReference, graphs: Collection[BundleGraph], scheme: str, kept_float: Sequence[str] = ()
) -> LawParity:
    """Both laws' nats, graph over float32, and the share of greedy texts that are the same to the last token."""
    measured, (law, infilling) = any_rows(graphs), reference.nats
    given, error = None, None
    if isinstance(measured, CudaRows) and reference.given:
        given, error = total_nats(measured, reference.given) / reference.nats_given, memory_error(measured, reference)
    return LawParity(
        graph=_step_file(graphs),
        scheme=scheme,
        law_ratio=total_nats(measured, reference.stories) / law,
        infilling_ratio=total_nats(measured, reference.gaps) / infilling if reference.gaps else None,
        texts_agreeing=agreeing(measured, reference.texts, 1 + PROMPT_TOKENS),
        kept_float=tuple(kept_float),
        conditioned_ratio=given,
        memory_error=error,
    )


def memory_error(measured: CudaRows, reference: LawReference) -> float:
    """Of what the encoders make of the conditions, in the rows that are there: ‖graph − float32‖ / ‖float32‖."""
    wrong = size = 0.0
    for condition in (one.condition for one in reference.given if one.condition is not None):
        measured.empty(1)
        measured.remember(condition)
        there = measured.given["reads"][0] > 0
        with torch.no_grad():
            memory = reference.model.remember(Given.of([condition]).to(reference.model.device))
        for kind, layers in (("keys", memory.keys), ("values", memory.values)):
            for i, exact in enumerate(layer.cpu().numpy() for layer in layers):
                made = measured.given[f"memory_{kind}.{i}"][:, :, there].astype(np.float32)
                wrong, size = wrong + float(np.square(made - exact).sum()), size + float(np.square(exact).sum())
    return float(np.sqrt(wrong / size))


def graph_laws(graphs: Collection[BundleGraph], held_out: HeldOut) -> LawFigures:
    """The laws as the graphs have them, by the figures of `host.evaluate`."""
    measured, left = row_graphs(graphs), left_to_right(held_out)
    gaps = held_out_gaps(held_out)[1] if any(graph.role == "prefill" for graph in graphs) else []
    left_nats = np.array([[nats(measured, one) for one in left]])
    gap_nats = np.array([[nats(measured, one) for one in gaps]])
    return LawFigures(
        graph=_step_file(graphs),
        source=held_out.name,
        stories=len(left),
        left_to_right_nats_per_token=ratio(left_nats, _targets(left)),
        left_to_right_bits_per_byte=ratio(left_nats / np.log(2), held_out.text_bytes[None]),
        infilling_nats_per_gap_token=ratio(gap_nats, _targets(gaps)) if gaps else None,
    )


def _step_file(graphs: Collection[BundleGraph]) -> str:
    return next(graph.file for graph in graphs if graph.role == "step")


def _targets(examples: Sequence[Example]) -> NDArray[np.int64]:
    """→ (1, n)"""
    return np.array([[len(one.at) for one in examples]])


def passes_law(parity: LawParity) -> bool:
    """The law within 0.5 %, given a condition, too, infilling within 1 %, and a memory off by no more than 5 %."""
    laws = [ratio for ratio in (parity.law_ratio, parity.conditioned_ratio) if ratio is not None]
    within = all(abs(ratio - 1) <= MAX_LAW_CHANGE for ratio in laws)
    within = within and abs((parity.infilling_ratio or 1.0) - 1) <= MAX_INFILLING_CHANGE
    return within and (parity.memory_error or 0.0) <= MAX_MEMORY_ERROR
