"""Constants that the CUDA graphs of one precision have in common, in one file instead of in each.

A bundle with canvas and step graphs would else hold the network twice, and one with encoders its tables.
`shared.manifest.graph_bytes` puts a graph and its constants together again by concatenation, so that no runtime reads a
second file.
"""

from collections.abc import Sequence
from typing import Final

import onnx

from host.export.bundle_writer import BundleGraph

LEAST_BYTES: Final = 4096
"""Smaller constants stay in their graph."""
ENCODERS: Final = ("encode.text", "encode.image")


def with_shared_weights(graphs: Sequence[BundleGraph]) -> list[BundleGraph]:
    """The graphs, those for CUDA without the constants of their precision's step graph, and those that both encoders
    have, which follow in a last one.
    """
    apart = list(graphs)
    for step in (graph for graph in graphs if (graph.target, graph.role) == ("cuda", "step")):
        large = _large(step)
        encoders = [g for g in graphs if (g.target, g.precision) == ("cuda", step.precision) and g.role in ENCODERS]
        if encoders:
            text, image = map(_large, encoders)
            large = {name: c for name, c in text.items() if image.get(name) == c} | large
        for i, graph in enumerate(apart):
            if (graph.target, graph.precision) == ("cuda", step.precision):
                apart[i] = BundleGraph(_without(graph.model, large), graph.role, graph.precision, graph.target)
        weights = onnx.ModelProto()
        weights.graph.initializer.extend(large.values())
        apart.append(BundleGraph(weights, "weights", step.precision, "cuda"))
    return apart


def _large(graph: BundleGraph) -> dict[str, onnx.TensorProto]:
    return {c.name: c for c in graph.model.graph.initializer if len(c.raw_data) >= LEAST_BYTES}


def _without(model: onnx.ModelProto, shared: dict[str, onnx.TensorProto]) -> onnx.ModelProto:
    """The model without its constants that are among `shared`, value and name."""
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    del rest.graph.initializer[:]
    rest.graph.initializer.extend(c for c in model.graph.initializer if shared.get(c.name) != c)
    return rest
