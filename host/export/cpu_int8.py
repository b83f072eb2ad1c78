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
import onnx_graphsurgeon as gs
import onnxruntime as ort
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from host.evaluate.scorers import Canvases, Feed, session_of, step_feed

Scheme = Literal["dynamic", "static"]
SCHEMES: Final[tuple[Scheme, ...]] = ("dynamic", "static")
KEPT_FLOAT: Final = ["head.control.matmul"]  # four columns that decide where a story ends: nothing to gain


class Calibration(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no annotations
    """Feeds calibration canvases to ONNX Runtime."""

    def __init__(self, canvases: Canvases, session: ort.InferenceSession) -> None:
        self._feeds: Iterator[Feed] = iter([step_feed(session, canvas, t) for canvas, t in canvases])

    def get_next(self) -> Feed | None:
        """The next feed, None at the end."""
        return next(self._feeds, None)


def nodes_of(layer: str) -> list[str]:
    """The CPU graph's nodes for a linear layer, named as in the CUDA graph: the last block's QKV comes in two parts."""
    return [layer.replace(".qkv.out.matmul", part) for part in (".qkv.out.matmul", ".q.out.matmul", ".kv.out.matmul")]


def quantize(
    graph: onnx.ModelProto, scheme: Scheme, calibration: Canvases, kept_float: Sequence[str] = ()
) -> onnx.ModelProto:
    """The graph with INT8 matrix products.

    dynamic: activations scaled per tensor at run time, so a run must hold one request. static: scales fixed by the
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
                    Calibration(calibration, session_of(graph)),
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
    return _with_int8_embedding(quantized)


def _with_int8_embedding(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The token embedding in INT8 with one scale a row, dequantized after the lookup: a quarter of the bytes.

    ONNX Runtime's own tool would take one scale for all rows.
    """
    surgeon = gs.import_onnx(graph)
    lookup = next(node for node in surgeon.nodes if node.name == "tokens")
    (table, ids), restored = lookup.inputs, list(lookup.outputs)
    lookup.outputs.clear()
    scale = np.maximum(np.abs(table.values).max(1, keepdims=True) / 127, np.float32(1e-12))  # (V, 1)
    whole = np.rint(table.values / scale).astype(np.int8)  # (V, D)

    def layer(op: str, name: str, *inputs: gs.Tensor, **attributes: int) -> gs.Variable:
        return surgeon.layer(op=op, name=name, inputs=inputs, outputs=[gs.Variable(name)], attrs=attributes)[0]

    rows = layer("Gather", "tokens.int8", gs.Constant(f"{table.name}.int8", whole), ids)
    rows = layer("Cast", "tokens.whole", rows, to=onnx.TensorProto.FLOAT)
    scales = layer("Gather", "tokens.scale", gs.Constant(f"{table.name}.scale", scale), ids)
    surgeon.layer(op="Mul", name="tokens", inputs=[rows, scales], outputs=restored)
    result: onnx.ModelProto = gs.export_onnx(surgeon.cleanup().toposort())
    return result
