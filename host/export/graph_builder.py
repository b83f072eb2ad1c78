"""Step graphs as ONNX, written node by node: what the runtimes see is what stands here. This is what
`host.export.cpu_graph` and `host.export.cuda_graph` share.

Rejected: torch.onnx.export, whose graph changes with every release, and hides LayerNorm and attention from the
runtimes' fusions. A parity test holds both graphs to `host.model`.
B: batch, L: length, D: width, V: vocabulary, M: wanted positions, K: candidates.
"""

from typing import Any, Final, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from host.model.network import BIAS_FLOOR, RELATIVE_UNIT, Denoiser
from shared.tokens import EOS, FIRST_TEXT_ID, PAD

NEVER = -1e4
"""Finite, so that FP16 holds it and no row of a softmax turns into NaN."""

Float = Literal["float32", "float16"]
ONNX_TYPE = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}
OPSET: Final = 20  # the most that TensorRT 10.3 parses
IR_VERSION: Final = 10


Value = tuple[str, str, tuple[str | int, ...]]
"""Name, type and shape of an input or output."""


class GraphBuilder:
    """Collects nodes and constants; every method returns the name of the value it made."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """A named initializer. Requested again it is made once; ValueError when the value is another one."""
        tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
        if self.constants.setdefault(name, tensor) != tensor:
            raise ValueError(f"two constants under the name {name}")
        return name

    def op(self, kind: str, name: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> str:
        """Append a node; its outputs are `name`, or `name.0`, `name.1` … when there are several (returns `name`)."""
        names = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, domain=domain, **attributes))
        return name

    def fused(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        """Append one of ONNX Runtime's own nodes, named as its first output; "" stands for what it need not make."""
        node = helper.make_node(kind, inputs, outputs, name=outputs[0], domain="com.microsoft", **attributes)
        self.nodes.append(node)

    def model(self, inputs: list[Value], outputs: list[Value], contrib: bool) -> onnx.ModelProto:
        """The finished, checked model. contrib: it uses ONNX Runtime's own operators."""
        read, made = ([helper.make_tensor_value_info(n, ONNX_TYPE[t], s) for n, t, s in v] for v in (inputs, outputs))
        graph = helper.make_graph(self.nodes, "step", read, made, list(self.constants.values()))
        opsets = [helper.make_opsetid("", OPSET)] + ([helper.make_opsetid("com.microsoft", 1)] if contrib else [])
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="diffusion-llm")
        onnx.checker.check_model(model)
        return model


class StepBuilder(GraphBuilder):
    """Knows a network too: its layers in one float type, and what every graph computes of the canvas."""

    def __init__(self, model: Denoiser, dtype: Float, fp32_norms: bool = False) -> None:
        super().__init__()
        self.config = model.config
        self.weights = {n: p.detach().cpu().numpy() for n, p in model.named_parameters()}
        bias = RELATIVE_UNIT * self.weights["relative_bias"]  # (H, 2·L − 1), in scores
        self.weights["relative_bias"] = np.maximum(bias, np.float32(BIAS_FLOOR))
        self._dtype: Float = dtype
        self._fp32_norms = fp32_norms

    def weight(self, name: str) -> str:
        """A parameter as it is."""
        return self.constant(name, self.weights[name].astype(self._dtype))

    def parameters(self, name: str, columns: slice = slice(None)) -> tuple[str, str]:
        """Weight (inputs × outputs) and bias of a linear layer, or those of some columns of its result."""
        part = "" if columns == slice(None) else f".{columns.start}"
        weight, bias = (self.weights[f"{name}.{kind}"][columns].T.astype(self._dtype) for kind in ("weight", "bias"))
        return self.constant(f"{name}.weight{part}", weight), self.constant(f"{name}.bias{part}", bias)

    def linear(self, x: str, name: str, out: str, columns: slice = slice(None)) -> str:
        """A linear layer, or some columns of its result."""
        weight, bias = self.parameters(name, columns)
        return self.op("Add", out, self.op("MatMul", f"{out}.matmul", x, weight), bias)

    def norm(self, x: str, name: str, out: str = "") -> str:
        """A LayerNorm. out: what to call its result."""
        parts, out = [f"{name}.weight", f"{name}.bias"], out or f"{name}.out"
        if not self._fp32_norms:
            return self.op("LayerNormalization", out, x, *map(self.weight, parts), axis=-1)
        x = self.op("Cast", f"{name}.in32", x, to=TensorProto.FLOAT)
        gains = [self.constant(part, self.weights[part]) for part in parts]
        x = self.op("LayerNormalization", f"{name}.out32", x, *gains, axis=-1)
        return self.op("Cast", out, x, to=ONNX_TYPE[self._dtype])

    def embed(self) -> str:
        """Embeddings of tokens, positions and time; also the value `position` (L,).  → (B, L, D)"""
        config = self.config
        length = self.op("Shape", "length", "canvas", start=1, end=2)
        zero, axis0 = self.constant("zero", np.array([0])), self.constant("axis_0", np.array([0]))
        positions = self.constant("all_positions", np.arange(config.canvas_len, dtype=np.int32))
        self.op("Slice", "position", positions, zero, length, axis0)
        tokens = self.op("Gather", "tokens", self.weight("token_embedding.weight"), "canvas")
        places = self.op("Slice", "places", self.weight("position_embedding.weight"), zero, length, axis0)
        x = self.op("Add", "embedded", tokens, places)
        return self.op("Add", "timed", x, self._time()) if config.time_input else x

    def embed_pictures(self, encoder: str) -> str:
        """Patches of `pixels` (n, 3, 64, 64) in 0 … 1, through the encoder's convolutions.  → (n, 16, D)"""
        e, d = encoder, self.config.d_model
        one, two = (self.constant(n, np.full(1, v, self._dtype)) for n, v in (("one", 1), ("two", 2)))
        x = self.op("Sub", "pixels.centred", self.op("Mul", "pixels.twice", "pixels", two), one)
        parts = [f"{e}.patches.weight", f"{e}.patches.bias"]
        x = self.op("Conv", f"{e}.patches.out", x, *map(self.weight, parts), strides=[4, 4])
        for i in range(2):
            x = self.op("Gelu", f"{e}.halves.{i}.in", x, approximate="none")
            parts = [f"{e}.halves.{i}.weight", f"{e}.halves.{i}.bias"]
            x = self.op("Conv", f"{e}.halves.{i}.out", x, *map(self.weight, parts), strides=[2, 2], pads=[1, 1, 1, 1])
        x = self.op("Reshape", "grid.flat", x, self.constant("grid", np.array([0, d, -1])))
        x = self.op("Transpose", "grid.rows", x, perm=[0, 2, 1])
        return self.op("Add", "embedded", x, self.weight(f"{e}.position_embedding.weight"))

    def attention_bias(self, relative: str) -> str:
        """Relative position bias (1, H, canvas, canvas) cut to the length, plus NEVER at keys after the end.

        → (B, H, L, L)
        """
        starts, axes = self.constant("zeros", np.array([0, 0])), self.constant("axes_2_3", np.array([2, 3]))
        ends = self.op("Concat", "length_twice", "length", "length", axis=0)
        cut = self.op("Slice", "bias_by_distance", relative, starts, ends, axes)
        visible, never = (self.constant(n, np.full(1, v, self._dtype)) for n, v in (("visible", 0), ("never", NEVER)))
        keys = self.op("Where", "key_bias", self.attended(), visible, never)
        keys = self.op("Unsqueeze", "key_bias.row", keys, self.constant("axes_1_2", np.array([1, 2])))
        return self.op("Add", "attention_bias", cut, keys)

    def attention_out(self, x: str, mixed: str, block: str) -> str:
        """Output projection of attention, added to the residual stream."""
        return self.op(
            "Add", f"{block}.x1", x, self.linear(mixed, f"{block}.attention_out", f"{block}.attention_out.out")
        )

    def feed_forward(self, x: str, block: str) -> str:
        """LayerNorm, feed-forward with GELU by erf, added to the residual stream."""
        h = self.linear(self.norm(x, f"{block}.norm2"), f"{block}.up", f"{block}.up.out")
        h = self.op("Gelu", f"{block}.gelu", h, approximate="none")
        return self.op("Add", f"{block}.x2", x, self.linear(h, f"{block}.down", f"{block}.down.out"))

    def attended(self) -> str:
        """True up to and including the first visible EOS or PAD: later keys are masked.  → (B, L)"""
        visible = [
            self.op("Equal", f"is_{name}", "canvas", self.constant(name, np.array(token, np.int32)))
            for name, token in (("eos", EOS), ("pad", PAD))
        ]
        nowhere = self.constant("canvas_len", np.array(self.config.canvas_len, np.int32))
        where = self.op("Where", "end_positions", self.op("Or", "ends", *visible), "position", nowhere)
        first = self.op("ReduceMin", "first_end", where, self.constant("axis_1", np.array([1])), keepdims=1)
        return self.op("LessOrEqual", "attended", "position", first)

    def last_text(self) -> str:
        """Where the last visible text token stands; left of it neither EOS nor PAD can.  → (B, 1)"""
        first_id = self.constant("first_text_id", np.array(FIRST_TEXT_ID, np.int32))
        is_text = self.op("GreaterOrEqual", "is_text", "canvas", first_id)
        nowhere = self.constant("nowhere", np.array(-1, np.int32))
        where = self.op("Where", "text_positions", is_text, "position", nowhere)
        return self.op("ReduceMax", "last_text", where, self.constant("axis_1", np.array([1])), keepdims=1)

    def _time(self) -> str:
        """Sinusoids in float32, then the two-layer MLP.  → (B, 1, D)"""
        half = self.config.d_model // 2
        frequency = 1000.0 * np.exp(-np.log(10_000.0) * np.arange(half, dtype=np.float32) / half)
        axis1 = self.constant("axis_1", np.array([1]))
        t = self.op("Unsqueeze", "t.column", "t", axis1)
        phase = self.op("Mul", "t.phase", t, self.constant("t.frequency", frequency.astype(np.float32)[None]))
        waves = self.op("Concat", "t.waves", self.op("Sin", "t.sin", phase), self.op("Cos", "t.cos", phase), axis=1)
        if self._dtype == "float16":
            waves = self.op("Cast", "t.waves16", waves, to=TensorProto.FLOAT16)
        h = self.linear(waves, "time_mlp.0", "t.h")
        h = self.op("Mul", "t.silu", h, self.op("Sigmoid", "t.sigmoid", h))
        return self.op("Unsqueeze", "t.out", self.linear(h, "time_mlp.2", "t.embedded"), axis1)
