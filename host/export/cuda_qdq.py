"""INT8 for the CUDA graph: explicit Q/DQ pairs around the linear layers, everything else stays FP16.

TensorRT 11 takes no other kind of quantization. Its rules, which `host.export.lint` holds: symmetric, zero points of 0,
one scale a tensor for activations and one a column for weights, scales in the graph's float type, nothing inside
attention.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from typing import Final, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import HistogramCollector

from host.evaluate.scorers import Canvases, session_of, step_feed

Range = Literal["largest", "percentile", "entropy"]
RANGES: Final[tuple[Range, ...]] = ("largest", "percentile", "entropy")
PERCENTILE: Final = 99.99
HISTOGRAM_BINS: Final = 1024
LEVELS: Final = 127
SMALLEST_SCALE: Final = 2.0**-14
"""FP16's smallest normal number: below it scales lose precision."""


def linear_layers(graph: gs.Graph) -> list[gs.Node]:
    """The matrix products with constant weights: every linear layer, and nothing of attention."""
    return [node for node in graph.nodes if node.op == "MatMul" and isinstance(node.inputs[1], gs.Constant)]


def linear_inputs(graph: onnx.ModelProto, canvases: Canvases) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Inputs of an FP16 graph's linear layers on each canvas.  → value name → (1, L, K)"""
    names = sorted({layer.inputs[0].name for layer in linear_layers(gs.import_onnx(graph))})
    session = session_of(graph, dict.fromkeys(names, np.float16))
    for canvas, t in canvases:
        values = session.run(names, step_feed(session, canvas, t))
        yield {name: value.astype(np.float32) for name, value in zip(names, values, strict=True)}


def activation_ranges(graph: onnx.ModelProto, calibration: Canvases) -> dict[Range, dict[str, float]]:
    """The range of each linear layer's input by every rule.  → rule → value name → range

    The percentile is taken of each canvas and averaged: a single outlier should not cost every other value precision.
    Entropy is ONNX Runtime's: of all ranges, that whose 255 levels lose least of the histogram (Kullback-Leibler).
    """
    entropy = HistogramCollector("entropy", True, HISTOGRAM_BINS, 2 * LEVELS + 1, PERCENTILE, "same")
    largest: dict[str, list[float]] = {}
    percentile: dict[str, list[float]] = {}
    for inputs in linear_inputs(graph, calibration):
        for name, value in inputs.items():
            largest.setdefault(name, []).append(float(np.abs(value).max()))
            percentile.setdefault(name, []).append(float(np.percentile(np.abs(value), PERCENTILE)))
        with redirect_stdout(io.StringIO()):  # it prints at every call
            entropy.collect(inputs)
    with redirect_stdout(io.StringIO()):
        collected = entropy.compute_collection_result()
    return {
        "largest": {name: max(values) for name, values in largest.items()},
        "percentile": {name: float(np.mean(values)) for name, values in percentile.items()},
        "entropy": {name: float(max(-low, high)) for name, (low, high, *_) in collected.items()},
    }


def quantize_linears(graph: onnx.ModelProto, ranges: dict[str, float], kept_float: Sequence[str]) -> onnx.ModelProto:
    """The FP16 graph with Q/DQ pairs before each linear layer's input and a DequantizeLinear after its INT8 weights.

    ranges: largest magnitude of each input. kept_float: names of MatMul nodes to leave alone.
    """
    surgeon = gs.import_onnx(graph)
    zero = gs.Constant("zero.int8", np.array(0, np.int8))
    inputs: dict[str, gs.Variable] = {}  # one pair serves every layer that reads a value
    for layer in linear_layers(surgeon):
        if layer.name in kept_float:
            continue
        x, weight = layer.inputs
        if x.name not in inputs:
            scale = gs.Constant(f"{x.name}.scale", np.array(max(ranges[x.name] / LEVELS, SMALLEST_SCALE), np.float16))
            whole = _added(surgeon, "QuantizeLinear", f"{x.name}.q", [x, scale, zero])
            inputs[x.name] = _added(surgeon, "DequantizeLinear", f"{x.name}.dq", [whole, scale, zero])
        layer.inputs = [inputs[x.name], _int8_weight(surgeon, weight)]
    result: onnx.ModelProto = gs.export_onnx(surgeon.cleanup().toposort())
    onnx.checker.check_model(result)
    return result


def _int8_weight(surgeon: gs.Graph, weight: gs.Constant) -> gs.Variable:
    """A weight (K, N) in INT8, one scale a column, dequantized where it is read."""
    value = weight.values.astype(np.float32)
    scales = np.maximum(np.abs(value).max(0) / LEVELS, SMALLEST_SCALE).astype(np.float16)  # (N,)
    whole = np.clip(np.rint(value / scales.astype(np.float32)), -LEVELS, LEVELS).astype(np.int8)
    parts = {"int8": whole, "scale": scales, "zero": np.zeros(len(scales), np.int8)}
    constants = [gs.Constant(f"{weight.name}.{kind}", part) for kind, part in parts.items()]
    return _added(surgeon, "DequantizeLinear", f"{weight.name}.dq", constants, axis=1)


def _added(surgeon: gs.Graph, op: str, name: str, inputs: list[gs.Tensor], **attributes: int) -> gs.Variable:
    """A node and its output, both of that name."""
    (output,) = surgeon.layer(op=op, name=name, inputs=inputs, outputs=[gs.Variable(name)], attrs=attributes)
    return output
