"""The graphs of blocks that ship, of what a network has learned."""

from collections.abc import Collection

from host.export.bundle_writer import BundleGraph
from host.export.row_builder import Ranges
from host.export.step_graph import draft_graph, prefill_graph, step_graph
from host.model.network import Denoiser
from host.sampling.reference import TOP_K
from shared.manifest import Precision


def blocks_graphs(model: Denoiser, learned: Collection[str], ranges: Ranges | None = None) -> list[BundleGraph]:
    """None without the objective ar; prefill with infill, draft with a drafter. ranges: for INT8."""
    if "ar" not in learned:
        return []
    precision: Precision = "fp32" if ranges is None else "int8"
    step = step_graph(model, min(TOP_K, model.config.vocab_size), ranges)
    graphs = [BundleGraph(step, "step", precision, "cpu")]
    if "infill" in learned:
        graphs.append(BundleGraph(prefill_graph(model, ranges), "prefill", precision, "cpu"))
    if model.drafter is not None:
        draft = draft_graph(model, None if ranges is None else "dynamic")
        graphs.append(BundleGraph(draft, "draft", precision, "cpu"))
    return graphs
