"""How closely INT8 and FP16 graphs of blocks follow float32: the gate of the laws that texts are written by."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from host.evaluate.cuda_rows import CudaRows
from host.evaluate.infilling import held_out_gaps
from host.evaluate.likelihood import HeldOut, ratio
from host.evaluate.row_graphs import RowGraphs, left_to_right
from host.export.bundle_writer import BundleGraph
from host.train.objectives import Example
from shared.manifest import LawFigures, LawParity
from shared.tokens import PAD

MAX_LAW_CHANGE: Final = 0.005
MAX_INFILLING_CHANGE: Final = 0.01
AnyRows = RowGraphs | CudaRows
GATE: Final = f"left to right within {MAX_LAW_CHANGE:.1%} and infilling within {MAX_INFILLING_CHANGE:.0%} of float32"
PROMPT_TOKENS: Final = 16
GREEDY_TEXTS: Final = 16
"""That a graph writes: a figure which the gate does not read."""


@dataclass(frozen=True)
class LawReference:
    """float32 graphs, and few held-out stories to compare others with them on. What they say is computed once.

    fills_gaps: whether the network learned to.
    """

    graphs: AnyRows
    few: HeldOut
    fills_gaps: bool

    @cached_property
    def stories(self) -> list[Example]:
        """Left to right."""
        return left_to_right(self.few)

    @cached_property
    def gaps(self) -> list[Example]:
        """The stories with gaps in them."""
        return held_out_gaps(self.few)[1] if self.fills_gaps else []

    @cached_property
    def nats(self) -> tuple[float, float]:
        """Of all tokens left to right, and of all gap tokens."""
        return total_nats(self.graphs, self.stories), total_nats(self.graphs, self.gaps)

    @cached_property
    def texts(self) -> list[list[int]]:
        """Greedy continuations."""
        return self.greedy(self.graphs)

    def greedy(self, graphs: AnyRows) -> list[list[int]]:
        """What graphs write after the first tokens of the first stories."""
        long_enough = self.few.canvases[self.few.canvases[:, PROMPT_TOKENS] != PAD][:GREEDY_TEXTS]
        length = self.few.canvases.shape[1]
        return graphs.greedy_texts([story[: 1 + PROMPT_TOKENS].tolist() for story in long_enough], length)


def total_nats(graphs: AnyRows, examples: Sequence[Example]) -> float:
    """Of all targets."""
    return sum(graphs.nats(one) for one in examples)


def row_graphs(graphs: Collection[BundleGraph]) -> AnyRows:
    """Step and prefill graph, to be measured; the step graph for CUDA reads evidence itself."""
    if cuda := [graph.model for graph in graphs if (graph.target, graph.role) == ("cuda", "step")]:
        return CudaRows(cuda[0])
    by_role = {graph.role: graph.model for graph in graphs}
    return RowGraphs(by_role["step"], by_role.get("prefill"))


def measure_law(
    reference: LawReference, graphs: Collection[BundleGraph], scheme: str, kept_float: Sequence[str] = ()
) -> LawParity:
    """Both laws' nats, graph over float32, and the share of greedy texts that are the same to the last token."""
    measured, (law, infilling) = row_graphs(graphs), reference.nats
    texts = zip(reference.greedy(measured), reference.texts, strict=True)
    same = [found == expected for found, expected in texts]
    return LawParity(
        graph=_step_file(graphs),
        scheme=scheme,
        law_ratio=total_nats(measured, reference.stories) / law,
        infilling_ratio=total_nats(measured, reference.gaps) / infilling if reference.gaps else None,
        texts_agreeing=sum(same) / max(1, len(same)),
        kept_float=tuple(kept_float),
    )


def graph_laws(graphs: Collection[BundleGraph], held_out: HeldOut) -> LawFigures:
    """The laws as the graphs have them, by the figures of `host.evaluate`."""
    measured, left = row_graphs(graphs), left_to_right(held_out)
    gaps = held_out_gaps(held_out)[1] if any(graph.role == "prefill" for graph in graphs) else []
    nats = np.array([[measured.nats(one) for one in left]])
    gap_nats = np.array([[measured.nats(one) for one in gaps]])
    return LawFigures(
        graph=_step_file(graphs),
        source=held_out.name,
        stories=len(left),
        left_to_right_nats_per_token=ratio(nats, _targets(left)),
        left_to_right_bits_per_byte=ratio(nats / np.log(2), held_out.text_bytes[None]),
        infilling_nats_per_gap_token=ratio(gap_nats, _targets(gaps)) if gaps else None,
    )


def _step_file(graphs: Collection[BundleGraph]) -> str:
    return next(graph.file for graph in graphs if graph.role == "step")


def _targets(examples: Sequence[Example]) -> NDArray[np.int64]:
    """→ (1, n)"""
    return np.array([[len(one.at) for one in examples]])


def passes_law(parity: LawParity) -> bool:
    """The law within 0.5 % and infilling within 1 %."""
    infilling = parity.infilling_ratio or 1.0
    return abs(parity.law_ratio - 1) <= MAX_LAW_CHANGE and abs(infilling - 1) <= MAX_INFILLING_CHANGE
