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
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization.calibrate import HistogramCollector

from host.evaluate.scorers import Canvases, input_names, step_feed

Range = Literal["largest", "percentile", "entropy"]
RANGES: Final[tuple[Range, ...]] = ("largest", "percentile", "entropy")
PERCENTILE: Final = 99.99
HISTOGRAM_BINS: Final = 1024
LEVELS: Final = 127
SMALLEST_SCALE: Final = 2.0**-14
"""FP16's smallest normal number: below it scales lose precision."""


def linear_nodes(graph: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The matrix products with constant weights: every linear layer, and nothing of attention."""
    constants = {tensor.name for tensor in graph.graph.initializer}
    return (n for n in graph.graph.node if n.op_type == "MatMul" and n.input[1] in constants)


def linear_inputs(graph: onnx.ModelProto, canvases: Canvases) -> Iterator[dict[str, NDArray[np.float32]]]:
    """What the linear layers of an FP16 graph read on each canvas.  → value name → (1, L, K)"""
    names = sorted({node.input[0] for node in linear_nodes(graph)})
    exposed = onnx.ModelProto()
    exposed.CopyFrom(graph)
    exposed.graph.output.extend(helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT16, None) for n in names)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(exposed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs = input_names(graph)
    for canvas, t in canvases:
        values = session.run(names, step_feed(inputs, canvas, t))
        yield {name: value.astype(np.float32) for name, value in zip(names, values, strict=True)}


def activation_ranges(graph: onnx.ModelProto, calibration: Canvases) -> dict[Range, dict[str, float]]:
    """How large each linear layer's input gets, by every rule.  → rule → value name → range

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
        with redirect_stdout(io.StringIO()):  # it reports every call
            entropy.collect(inputs)
    with redirect_stdout(io.StringIO()):
        found = entropy.compute_collection_result()
    return {
        "largest": {name: max(values) for name, values in largest.items()},
        "percentile": {name: float(np.mean(values)) for name, values in percentile.items()},
        "entropy": {name: float(max(-low, high)) for name, (low, high, *_) in found.items()},
    }


def quantize_linears(graph: onnx.ModelProto, ranges: dict[str, float], kept_float: Sequence[str]) -> onnx.ModelProto:
    """The FP16 graph with Q/DQ pairs before each linear layer's input and behind its weights.

    ranges: largest magnitude of each input. kept_float: names of MatMul nodes to leave alone.
    """
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    weights = {t.name: t for t in graph.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    added: dict[str, onnx.TensorProto] = {}
    paired: set[str] = set()
    quantized = {n.name for n in linear_nodes(graph)} - set(kept_float)

    def constant(name: str, value: NDArray[np.float16] | NDArray[np.int8]) -> str:
        added[name] = numpy_helper.from_array(value, name)
        return name

    for node in result.graph.node:
        if node.name not in quantized:
            nodes.append(node)
            continue
        x, weight = node.input
        if x not in paired:  # one pair serves every layer that reads this value
            paired.add(x)
            scale = constant(f"{x}.scale", np.array(max(ranges[x] / LEVELS, SMALLEST_SCALE), np.float16))
            zero = constant("zero.int8", np.array(0, np.int8))
            nodes.append(helper.make_node("QuantizeLinear", [x, scale, zero], [f"{x}.q"], name=f"{x}.quantize"))
            pair = helper.make_node("DequantizeLinear", [f"{x}.q", scale, zero], [f"{x}.dq"], name=f"{x}.dequantize")
            nodes.append(pair)
        value = numpy_helper.to_array(weights[weight]).astype(np.float32)  # (K, N)
        scales = np.maximum(np.abs(value).max(0) / LEVELS, SMALLEST_SCALE).astype(np.float16)  # (N,)
        whole = np.clip(np.rint(value / scales.astype(np.float32)), -LEVELS, LEVELS).astype(np.int8)
        parts = [
            constant(f"{weight}.int8", whole),
            constant(f"{weight}.scale", scales),
            constant(f"{weight}.zero", np.zeros(len(scales), np.int8)),
        ]
        nodes.append(helper.make_node("DequantizeLinear", parts, [f"{weight}.dq"], name=f"{weight}.dequantize", axis=1))
        node.input[0], node.input[1] = f"{x}.dq", f"{weight}.dq"
        nodes.append(node)
    read = {name for node in nodes for name in node.input}
    kept = [t for t in result.graph.initializer if t.name in read]
    del result.graph.node[:], result.graph.initializer[:]
    result.graph.node.extend(nodes)
    result.graph.initializer.extend([*kept, *added.values()])
    onnx.checker.check_model(result)
    return result
