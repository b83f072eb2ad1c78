"""INT8 for the CPU graph, by ONNX Runtime's quantization tools.

Weights are symmetric, per output channel, and use 7 of the 8 bits: x86 chips without VNNI multiply pairs of u8·s8
into a saturating 16-bit sum, which two full-range products overflow. With 7 bits the integer arithmetic is the same
on every chip.
"""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from host.evaluate.scorers import Canvases, Feed, input_names, step_feed

Scheme = Literal["dynamic", "static"]
SCHEMES: Final[tuple[Scheme, ...]] = ("dynamic", "static")
KEPT_FLOAT: Final = ["head.control.matmul"]  # four columns that decide where a story ends: nothing to gain


class Calibration(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no annotations
    """Feeds calibration canvases to ONNX Runtime."""

    def __init__(self, canvases: Canvases, inputs: Sequence[str]) -> None:
        self._feeds: Iterator[Feed] = iter([step_feed(inputs, canvas, t) for canvas, t in canvases])

    def get_next(self) -> Feed | None:
        """The next feed, None at the end."""
        return next(self._feeds, None)


def nodes_of(layer: str) -> list[str]:
    """The CPU graph's nodes for a linear layer, named as in the CUDA graph: the last block's QKV comes in two parts."""
    return [layer.replace(".qkv.out.matmul", part) for part in (".qkv.out.matmul", ".q.out.matmul", ".kv.out.matmul")]


def quantize(
    graph: onnx.ModelProto,
    scheme: Scheme,
    calibration: Canvases,
    kept_float: Sequence[str] = (),
) -> onnx.ModelProto:
    """The graph with INT8 matrix products.

    dynamic: activations scaled per tensor at run time, so a pass must hold one request. static: scales fixed by the
    calibration canvases, taken from where sampling really goes. kept_float: layers to leave as they are.
    """
    kept = [*KEPT_FLOAT, *(node for layer in kept_float for node in nodes_of(layer))]
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(graph, before)
        quiet = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)  # the tools warn about each optional preprocessing step
        try:
            if scheme == "dynamic":
                quantize_dynamic(
                    before,
                    after,
                    op_types_to_quantize=["MatMul"],
                    per_channel=True,
                    reduce_range=True,
                    weight_type=QuantType.QInt8,
                    nodes_to_exclude=kept,
                    extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
                )
            else:
                quantize_static(
                    before,
                    after,
                    Calibration(calibration, input_names(graph)),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=["MatMul"],
                    per_channel=True,
                    reduce_range=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    nodes_to_exclude=kept,
                    calibrate_method=CalibrationMethod.MinMax,
                    extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
                )
        finally:
            logging.getLogger().setLevel(quiet)
        quantized = onnx.load(after)
    _quantize_embedding(quantized)
    return quantized


def _quantize_embedding(graph: onnx.ModelProto) -> None:
    """Store the token embedding in INT8 with one scale a row, restored after the lookup; a quarter of the bytes.

    ONNX Runtime's own tool would take one scale for all rows.
    """
    lookup = next(node for node in graph.graph.node if node.name == "tokens")
    table = next(t for t in graph.graph.initializer if t.name == lookup.input[0])
    value = numpy_helper.to_array(table)  # (V, D)
    scale = np.maximum(np.abs(value).max(1, keepdims=True) / 127, np.float32(1e-12))  # (V, 1)
    name, at = table.name, list(graph.graph.node).index(lookup)
    graph.graph.initializer.remove(table)
    graph.graph.initializer.append(numpy_helper.from_array(np.rint(value / scale).astype(np.int8), f"{name}.int8"))
    graph.graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
    graph.graph.node.remove(lookup)
    ids = lookup.input[1]
    restored = (
        helper.make_node("Gather", [f"{name}.int8", ids], ["tokens.int8"], name="tokens.int8"),
        helper.make_node("Cast", ["tokens.int8"], ["tokens.whole"], name="tokens.whole", to=onnx.TensorProto.FLOAT),
        helper.make_node("Gather", [f"{name}.scale", ids], ["tokens.scale"], name="tokens.scale"),
        helper.make_node("Mul", ["tokens.whole", "tokens.scale"], list(lookup.output), name="tokens"),
    )
    for offset, node in enumerate(restored):
        graph.graph.node.insert(at + offset, node)
