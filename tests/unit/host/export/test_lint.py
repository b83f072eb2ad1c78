"""The lint finds nothing in our graphs, and finds each thing that was broken on purpose."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from host.export.cuda_graph import cuda_graph
from host.export.cuda_qdq import activation_ranges, linear_layers, quantize_linears
from host.export.lint import slow_shapes, violations
from host.export.random_weights import untrained
from host.model.network import CONFIGS
from shared.tokens import BOS, MASK


@pytest.fixture(scope="module")
def fp16() -> onnx.ModelProto:
    return cuda_graph(untrained(CONFIGS["debug"])[0])


@pytest.fixture(scope="module")
def ranges(fp16: onnx.ModelProto) -> dict[str, float]:
    canvas = np.full(64, MASK, np.int32)
    canvas[0] = BOS
    return activation_ranges(fp16, [(canvas, 1.0)])["largest"]


@pytest.fixture(scope="module")
def int8(fp16: onnx.ModelProto, ranges: dict[str, float]) -> onnx.ModelProto:
    return quantize_linears(fp16, ranges, [])


@pytest.mark.parametrize("name", ["FP16", "INT8", "FP32 norms", "without time"])
def test_lint_finds_nothing_in_our_graphs(name: str, fp16: onnx.ModelProto, int8: onnx.ModelProto) -> None:
    if name in ("FP16", "INT8"):
        graph = int8 if name == "INT8" else fp16
    else:
        timed = name == "FP32 norms"
        graph = cuda_graph(untrained(replace(CONFIGS["debug"], time_input=timed))[0], fp32_norms=timed)
    assert violations(graph) == []
    assert slow_shapes(graph) == []


def tensor(graph: onnx.ModelProto, name: str) -> TensorProto:
    found: TensorProto = next(t for t in graph.graph.initializer if t.name == name)
    return found


def node(graph: onnx.ModelProto, name: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(n for n in graph.graph.node if n.name == name)
    return found


def another_opset(graph: onnx.ModelProto) -> None:
    graph.opset_import[0].version = 23


def a_newer_ir(graph: onnx.ModelProto) -> None:
    graph.ir_version = 11


def wide_ids(graph: onnx.ModelProto) -> None:
    graph.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64


def float_logits(graph: onnx.ModelProto) -> None:
    graph.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT


def a_random_operator(graph: onnx.ModelProto) -> None:
    graph.graph.node.append(helper.make_node("RandomUniformLike", ["canvas"], ["noise"], name="noise"))


def an_infinite_mask(graph: onnx.ModelProto) -> None:
    tensor(graph, "never").CopyFrom(numpy_helper.from_array(np.array([-np.inf], np.float16), "never"))


def a_float_scale(graph: onnx.ModelProto) -> None:
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "shifted.scale")
    tensor(graph, "shifted.scale").CopyFrom(scale)


def a_zero_point(graph: onnx.ModelProto) -> None:
    tensor(graph, "zero.int8").CopyFrom(numpy_helper.from_array(np.array(3, np.int8), "zero.int8"))


def a_row_axis(graph: onnx.ModelProto) -> None:
    node(graph, "blocks.0.up.weight.dq").attribute[0].i = 0


def quantized_attention(graph: onnx.ModelProto) -> None:
    scores = node(graph, "blocks.0.scores")
    pair = [scores.input[0], "zero.scale", "zero.int8"]
    graph.graph.initializer.append(numpy_helper.from_array(np.array(0.1, np.float16), "zero.scale"))
    at = list(graph.graph.node).index(scores)
    graph.graph.node.insert(at, helper.make_node("QuantizeLinear", pair, ["s.q"], name="s.quantize"))
    pair = ["s.q", *pair[1:]]
    graph.graph.node.insert(at + 1, helper.make_node("DequantizeLinear", pair, ["s.dq"], name="s.dequantize"))
    node(graph, "blocks.0.scores").input[0] = "s.dq"


def outside_weights(graph: onnx.ModelProto) -> None:
    tensor(graph, "head.weight.int8").data_location = TensorProto.EXTERNAL


BROKEN: dict[Callable[[onnx.ModelProto], None], str] = {
    another_opset: "operator sets {'': 23}",
    a_newer_ir: "IR version 11",
    wide_ids: "input canvas is int64",
    float_logits: "the only one is logits (float16)",
    a_random_operator: "noise: the operator RandomUniformLike is not allowed",
    an_infinite_mask: "never: it holds values that FP16 cannot",
    a_float_scale: "its scale is float, not the graph's float16",
    a_zero_point: "its zero point is not an int8 of 0",
    a_row_axis: "blocks.0.up.weight.dq: weights take one scale a column, along axis 1",
    quantized_attention: "s.dequantize: it feeds blocks.0.scores (MatMul); only linear layers are quantized",
    outside_weights: "head.weight.int8: its values lie in another file",
}


@pytest.mark.parametrize("spoil", BROKEN, ids=lambda spoil: spoil.__name__)
def test_lint_names_each_broken_rule(spoil: Callable[[onnx.ModelProto], None], int8: onnx.ModelProto) -> None:
    graph = onnx.ModelProto()
    graph.CopyFrom(int8)
    spoil(graph)
    assert any(BROKEN[spoil] in sentence for sentence in violations(graph)), violations(graph)


def test_lint_names_sides_that_waste_tiles() -> None:
    graph = cuda_graph(untrained(replace(CONFIGS["debug"], vocab_size=300))[0])
    assert slow_shapes(graph) == ["head.matmul: its weights are 64 × 300; multiples of 64 are faster"]


def test_cuda_int8_graph_leaves_kept_layers_in_float(fp16: onnx.ModelProto, ranges: dict[str, float]) -> None:
    kept = ["head.matmul", "blocks.1.up.out.matmul"]
    graph = quantize_linears(fp16, ranges, kept)
    still = {layer.name for layer in linear_layers(gs.import_onnx(graph))}
    assert still == set(kept)
    assert violations(graph) == []
