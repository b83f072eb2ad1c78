"""What a CUDA step graph must look like, so that every TensorRT from 10.3 to 11 builds it, and builds it fast."""

from collections.abc import Iterator
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper, shape_inference

from host.export.graph_builder import IR_VERSION, OPSET

ALLOWED_OPS: Final = frozenset(
    {
        *("Add", "Cast", "Concat", "Conv", "Cos", "DequantizeLinear", "Equal", "Gather", "Gelu", "GreaterOrEqual"),
        *("LayerNormalization", "Less", "LessOrEqual", "MatMul", "Mul", "Or", "QuantizeLinear", "ReduceMax"),
        *("ReduceMin", "Reshape", "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Squeeze", "Sub"),
        *("Transpose", "Unsqueeze", "Where"),
    }
)
STEP_INPUTS: Final = ("tokens", "positions", "sees", "cached", "key_positions", "scored")
ENCODER_INPUTS: Final = {
    "text": dict.fromkeys(("tokens", "places", "words", "count"), TensorProto.INT32),
    "image": {"pixels": TensorProto.FLOAT16},
}
LARGEST_FP16: Final = 65504.0
MULTIPLE: Final = 64  # of a linear layer's sides, for whole tensor-core tiles


def violations(graph: onnx.ModelProto) -> list[str]:
    """One sentence for each rule that a CUDA graph breaks; empty when all hold."""
    return [*_frame(graph), *_operators(graph), *_constants(graph), *_types(graph), *_quantization(graph)]


def slow_shapes(graph: onnx.ModelProto) -> list[str]:
    """One sentence for each linear layer whose sides waste part of a tile: it builds, but runs slower than it need."""
    weights = _constants_by_name(graph)
    return [
        f"{node.name}: its weights are {' × '.join(map(str, shape))}; multiples of {MULTIPLE} are faster"
        for node in graph.graph.node
        if node.op_type == "MatMul" and (shape := _weight_shape(graph, weights, node.input[1])) is not None
        if any(side % MULTIPLE for side in shape)
    ]


def _constants_by_name(graph: onnx.ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in graph.graph.initializer}


def _weight_shape(graph: onnx.ModelProto, weights: dict[str, TensorProto], name: str) -> tuple[int, ...] | None:
    """Shape of a constant, or of the constant that a DequantizeLinear restores; None for a computed value."""
    for node in graph.graph.node:
        if node.op_type == "DequantizeLinear" and node.output[0] == name:
            name = node.input[0]
    return tuple(weights[name].dims) if name in weights else None


def _frame(graph: onnx.ModelProto) -> Iterator[str]:
    domains = {opset.domain: opset.version for opset in graph.opset_import}
    if domains != {"": OPSET}:
        yield f"the graph uses operator sets {domains}; TensorRT 10.3 reads ONNX's own at {OPSET} and no other"
    if graph.ir_version > IR_VERSION:
        yield f"the graph has IR version {graph.ir_version}; at most {IR_VERSION} is read everywhere"
    read, made = (
        {value.name: value.type.tensor_type.elem_type for value in values}
        for values in (graph.graph.input, graph.graph.output)
    )
    if "positions" in read:
        yield from _step_frame(read, made)
        return
    if "words" in read or "pixels" in read:
        yield from _encoder_frame(read, made)
        return
    wanted = {"canvas": TensorProto.INT32, "t": TensorProto.FLOAT}
    for name, kind in read.items():
        if wanted.get(name) != kind:
            yield f"input {name} is {_dtype(kind)}; inputs are canvas (int32) and t (float)"
    if made != {"logits": TensorProto.FLOAT16}:
        yield f"the outputs are {[(n, _dtype(k)) for n, k in made.items()]}; the only one is logits (float16)"


def _step_frame(read: dict[str, int], made: dict[str, int]) -> Iterator[str]:
    """Whole numbers come in, slots too, and a memory if any; logits, states and each slot's new rows go out."""
    slots, memory = ({n for n in read if n.startswith(kinds)} for kinds in (("keys.", "values."), "memory_"))
    wanted = dict.fromkeys((*STEP_INPUTS, *["reads"] * bool(memory)), TensorProto.INT32)
    wanted |= dict.fromkeys(slots | memory, TensorProto.FLOAT16)
    if not slots or read != wanted or (memory and memory != {f"memory_{name}" for name in slots}):
        found = ", ".join(f"{name} ({_dtype(kind)})" for name, kind in read.items())
        yield f"the inputs are {found}, not {', '.join(STEP_INPUTS)} (int32), keys.i and values.i (float16)"
    if made != dict.fromkeys(("logits", "states", *(f"new_{name}" for name in slots)), TensorProto.FLOAT16):
        found = ", ".join(f"{name} ({_dtype(kind)})" for name, kind in made.items())
        yield f"the outputs are {found}, not logits, states, new_keys.i and new_values.i (float16)"


def _encoder_frame(read: dict[str, int], made: dict[str, int]) -> Iterator[str]:
    """Words or pictures come in; a memory of each layer goes out."""
    if read not in ENCODER_INPUTS.values():
        yield f"an encoder has the inputs {', '.join(f'{name} ({_dtype(kind)})' for name, kind in read.items())}"
    layers = range(len(made) // 2)
    if made != {f"memory_{kind}.{i}": TensorProto.FLOAT16 for i in layers for kind in ("keys", "values")}:
        found = ", ".join(f"{name} ({_dtype(kind)})" for name, kind in made.items())
        yield f"an encoder's outputs are {found}, not memory_keys.i and memory_values.i (float16)"


def _operators(graph: onnx.ModelProto) -> Iterator[str]:
    for node in graph.graph.node:
        if node.domain or node.op_type not in ALLOWED_OPS:
            yield f"{node.name}: the operator {node.domain and node.domain + '.'}{node.op_type} is not allowed"


def _constants(graph: onnx.ModelProto) -> Iterator[str]:
    for tensor in graph.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            yield f"{tensor.name}: its values lie in another file"
            continue
        value = numpy_helper.to_array(tensor)
        if value.dtype.kind == "f" and not (np.abs(value.astype(np.float64)) <= LARGEST_FP16).all():
            yield f"{tensor.name}: it holds values that FP16 cannot, or infinities, which turn softmax into NaN"


def _types(graph: onnx.ModelProto) -> Iterator[str]:
    """Engines are strongly typed: what ONNX's own type inference refuses, they refuse."""
    try:
        shape_inference.infer_shapes(graph, check_type=True, strict_mode=True)
    except shape_inference.InferenceError as error:
        yield f"the types do not fit together: {' '.join(str(error).split())}"


def _quantization(graph: onnx.ModelProto) -> Iterator[str]:
    weights = _constants_by_name(graph)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in graph.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        yield from _scale_and_zero(node, weights)
        if node.op_type == "DequantizeLinear":
            for reader in readers.get(node.output[0], []):
                is_linear = reader.op_type == "MatMul" and _weight_shape(graph, weights, reader.input[1]) is not None
                if not is_linear:
                    yield f"{node.name}: it feeds {reader.name} ({reader.op_type}); only linear layers are quantized"


def _scale_and_zero(node: onnx.NodeProto, weights: dict[str, TensorProto]) -> Iterator[str]:
    if len(node.input) < 3 or any(name not in weights for name in node.input[1:3]):
        yield f"{node.name}: it lacks a constant scale and zero point"
        return
    scale, zero = weights[node.input[1]], weights[node.input[2]]
    if scale.data_type != TensorProto.FLOAT16:
        yield f"{node.name}: its scale is {_dtype(scale.data_type)}, not the graph's float16"
    if zero.data_type != TensorProto.INT8 or numpy_helper.to_array(zero).any():
        yield f"{node.name}: its zero point is not an int8 of 0; TensorRT quantizes symmetrically"
    if not (numpy_helper.to_array(scale) > 0).all():
        yield f"{node.name}: a scale is not above 0"
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    if node.input[0] in weights:
        shape = tuple(weights[node.input[0]].dims)
        if axis != 1 or tuple(scale.dims) != shape[1:]:
            yield f"{node.name}: weights take one scale a column, along axis 1"
    elif scale.dims:
        yield f"{node.name}: activations take one scale a tensor"


def _dtype(kind: int) -> str:
    name: str = TensorProto.DataType.Name(kind)
    return name.lower()
