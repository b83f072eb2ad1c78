"""What the graphs of rows share: embeddings, bias of the distance, blocks of fused operators, in float32 or INT8.

H: heads, N: rows of the pass, T: keys that they see, D: width, V: vocabulary, L: canvas length.
"""

from collections.abc import Mapping
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from host.export.graph_builder import NEVER, StepBuilder, Value
from host.model.network import Denoiser
from shared.tokens import BOS, MASK, PAD

MICROSOFT: Final = "com.microsoft"
LEVELS_U8: Final = 255
LEVELS_7BIT: Final = 63
"""Of a weight on each side of 0, as in `host.export.cpu_int8`: no sum of products saturates on any x86 chip."""

Ranges = Mapping[str, tuple[float, float]]
"""Least and largest input of each linear layer, by the layer's name; those that are not listed stay in float32."""
Columns = slice | NDArray[np.int64]
"""Of a linear layer's result."""
Quantization = Ranges | Literal["dynamic"] | None
"""INT8 with static scales; with scales of each product, for graphs whose products have one row; or none."""


class RowBuilder(StepBuilder):
    """Rows (1, N, D) through blocks. Activation scales are constants: a row's result does not depend on its neighbours.

    A product adds its own bias. Not SkipLayerNormalization: at one to four rows it takes 1.5 to 2.5 times as long as
    Add and LayerNormalization. Not BiasGelu: 1.5 to 1.7 times as long as Gelu.
    """

    def __init__(self, model: Denoiser, quantization: Quantization) -> None:
        super().__init__(model, "float32")
        self._quantization: Quantization = quantization
        bias = self.weights["head.bias"].copy()
        bias[[PAD, BOS, MASK]] = NEVER  # no row scores them left to right
        self.weights["head.bias"] = bias

    def embed_rows(self) -> str:
        """Of `tokens` and `positions`.  → (1, N, D)"""
        places = self.op("Gather", "places", self.weight("position_embedding.weight"), "positions")
        return self.op("Add", "embedded", self.token_rows("embedding", "tokens"), places)

    def token_rows(self, name: str, ids: str, table: str = "token_embedding.weight") -> str:
        """Rows of a table, the embedding, by tokens: in a quantized graph INT8 with one scale a row, a quarter of the
        bytes.
        """
        if self._quantization is None:
            return self.op("Gather", name, self.weight(table), ids)
        (whole, scale), short = int8_rows(self.weights[table]), table.removesuffix(".weight")
        rows = self.op("Gather", f"{name}.int8", self.constant(f"{short}.int8", whole), ids)
        scales = self.op("Gather", f"{name}.scale", self.constant(f"{short}.scale", scale), ids)
        return self.op("Mul", name, self.op("Cast", f"{name}.whole", rows, to=TensorProto.FLOAT), scales)

    def table_rows(self, name: str, table: NDArray[np.float32], rows: str) -> str:
        """Rows of a table (n, D): in a quantized graph INT8 with one scale a column."""
        if self._quantization is None:
            return self.op("Gather", name, self.constant(f"{name}.table", table), rows)
        whole, scale = int8_rows(table.T)
        picked = self.op("Gather", f"{name}.picked", self.constant(f"{name}.int8", whole.T), rows)
        return self.op("DequantizeLinear", name, picked, self.constant(f"{name}.scale", scale[:, 0]), axis=-1)

    def distance_bias(self, key_positions: str) -> str:
        """What attention adds to a score, by the distance of key and row alone.  → (1, H, N, T)"""
        column = self.op("Reshape", "positions.column", "positions", self.constant("column", np.array([-1, 1])))
        distance = self.op("Sub", "distance", key_positions, column)
        ahead = self.constant("farthest", np.array(self.config.canvas_len - 1, np.int32))
        where = self.op("Add", "distance.column", distance, ahead)
        where = self.op("Unsqueeze", "distance.pairs", where, self.constant("axis_0", np.array([0])))
        # All heads of a distance side by side: a Gather of single numbers takes three times as long.
        table = self.constant("relative_bias.columns", self.weights["relative_bias"].T)
        return self.op("Transpose", "bias", self.op("Gather", "bias_of_pairs", table, where, axis=0), perm=[0, 3, 1, 2])

    def qkv(self, x: str, block: str) -> tuple[str, str, str]:
        """Queries, keys and values of rows, heads side by side.  → three times (1, N, D)"""
        product = self.product(x, f"{block}.qkv", bias=True)
        self.op("Split", f"{block}.qkv3", product, outputs=3, axis=-1, num_outputs=3)
        return f"{block}.qkv3.0", f"{block}.qkv3.1", f"{block}.qkv3.2"

    def heads_apart(self, keys: str, values: str, layer: int, prefix: str = "new_") -> list[Value]:
        """Keys and values (1, N, D) as outputs of the graph, each (1, H, N, D/H)."""
        heads, made = self.config.heads, list[Value]()
        width = self.config.d_model // heads
        apart = self.constant("heads_apart", np.array([0, 0, heads, width]))
        for name, value in ((f"{prefix}keys.{layer}", keys), (f"{prefix}values.{layer}", values)):
            self.op("Transpose", name, self.op("Reshape", f"{name}.apart", value, apart), perm=[0, 2, 1, 3])
            made.append((name, "float32", (1, heads, "rows", width)))
        return made

    def rest_of_block(self, x: str, mixed: str, *, block: str, next_norm: str, more: str = "") -> tuple[str, str]:
        """From attention's result on; the LayerNorm that follows the block is made here, with its last addition.

        more: what else is added to the residual stream → rows after the LayerNorm, residual stream
        """
        result = self.product(mixed, f"{block}.attention_out", bias=True)
        x = self.op("Sum", f"{block}.x1", x, result, more) if more else self.op("Add", f"{block}.x1", x, result)
        up = self.product(self.norm(x, f"{block}.norm2"), f"{block}.up", bias=True)
        up = self.op("Gelu", f"{block}.gelu", up, approximate="none")
        x = self.op("Add", f"{block}.x2", x, self.product(up, f"{block}.down", bias=True))
        return self.norm(x, next_norm), x

    def scores(self, states: str, out: str, tokens: Columns = slice(None)) -> str:
        """The LM head, of all tokens or of some.  (M, D) → (M, V)"""
        return self.product(states, "head", bias=True, columns=tokens, out=out)

    def product(
        self,
        x: str,
        name: str,
        *,
        bias: bool,
        columns: Columns = slice(None),
        inputs: slice = slice(None),
        out: str = "",
    ) -> str:
        """A linear layer, or some columns of it, or of some of its inputs, with its bias or without.

        out: its name, if not the layer's
        """
        out = out or f"{name}.out"
        weight = self.weights[f"{name}.weight"][columns, inputs].T  # (inputs, outputs)
        shift = self.constant(f"{name}.bias", self.weights[f"{name}.bias"][columns]) if bias else ""
        ranges = self._quantization
        if ranges is None or (ranges != "dynamic" and name not in ranges):
            made = self.op("MatMul", f"{out}.matmul" if bias else out, x, self.constant(f"{name}.weight", weight))
            return self.op("Add", out, made, shift) if bias else made
        whole, scale = int8_columns(weight)
        zeros = self.constant(f"{name}.zero", np.zeros(len(scale), np.int8))
        b = self.constant(f"{name}.int8", whole), self.constant(f"{name}.scale", scale)
        if ranges == "dynamic":
            return self.op("DynamicQuantizeMatMul", out, x, *b, zeros, shift, domain=MICROSOFT)
        step, zero = activation_scale(*ranges[name])
        a = self.constant(f"{name}.in.scale", step), self.constant(f"{name}.in.zero", zero)
        x = self.op("QuantizeLinear", f"{out}.in", x, *a)
        return self.op("MatMulIntegerToFloat", out, x, b[0], a[0], b[1], a[1], zeros, *[shift] * bias, domain=MICROSOFT)


def int8_columns(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Weights (K, N) with one scale a column, symmetric, 7 bits."""
    scale = np.maximum(np.abs(weight).max(0) / LEVELS_7BIT, np.float32(1e-12)).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


def int8_rows(table: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A table (V, D) of rows that are looked up, not multiplied: one scale a row, 8 bits.  → (V, D), (V, 1)"""
    scale = np.maximum(np.abs(table).max(1, keepdims=True) / 127, np.float32(1e-12))
    return np.rint(table / scale).astype(np.int8), scale


def activation_scale(low: float, high: float) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Scale and zero point that spread 0 … 255 over low … high, 0 being exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / LEVELS_U8, 1e-12)
    return np.array(scale, np.float32), np.array(round(-low / scale), np.uint8)
