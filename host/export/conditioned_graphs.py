"""The graphs of blocks whose rows read a memory of words and pictures, and those that make it; for the CPU.

What a block reads takes two products of D × D more: its queries, and its output. Both are multiplied into the memory's
keys and values once a request, so that a pass needs neither, and what it reads in their place is small and INT8.
H: heads, N: rows of the pass, R: memory rows, M: scored rows, K: candidates, D: width. Batch 1, as in
`host.export.step_graph`.
"""

from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from host.export.graph_builder import NEVER, Value
from host.export.row_builder import LEVELS_7BIT, LEVELS_U8, MICROSOFT, Ranges, RowBuilder
from host.export.step_graph import ROWS, CacheValue, cached_attention, last_keys_and_values, scored_rows, seen_bias
from host.model.conditions import DEPTH, MERGED, PICTURE_SIZE, merging
from host.model.network import Denoiser

PLAIN: Final = "plain_"
"""Prefix of the caches of rows that read no memory."""


class ReadingBuilder(RowBuilder):
    """Rows that read a memory, given as keys and values of each layer that the products are folded into."""

    def __init__(self, model: Denoiser, ranges: Ranges | None) -> None:
        super().__init__(model, ranges)
        known = ranges or {}
        self.int8 = [
            f"blocks.{i}.qkv" in known and f"conditions.reads.{i}.out" in known for i in range(self.config.layers)
        ]

    def read(self, normed: str, layer: int, readers: str = "") -> str:
        """What rows read of the memory, behind the product of their queries, keys and values.  (1, N, D) → (1, N, D)

        In INT8 they are rounded as for that product, and shares of the memory to 1/255. readers (1, N, 1, 1): 1 where a
        row reads, 0 where it reads nothing; all of them do if it is not given.
        """
        r, qkv, memory = f"conditions.reads.{layer}", f"blocks.{layer}.qkv", self._inputs(layer)
        keys, bias, values = (name for name, _, _ in memory[:3])
        if self.int8[layer]:
            inputs = [f"{qkv}.out.in", keys, f"{qkv}.in.scale", memory[3][0], f"{qkv}.in.zero", "", bias]
            scores = self.op("MatMulIntegerToFloat", f"{r}.scores", *inputs, domain=MICROSOFT)
        else:
            scores = self.op("Add", f"{r}.scores", self.op("MatMul", f"{r}.products", normed, keys), bias)
        apart = self.constant("by_head", np.array([0, 0, self.config.heads, -1]))
        shares = self.op("Softmax", f"{r}.shares", self.op("Reshape", f"{r}.scores.by_head", scores, apart), axis=-1)
        if readers:
            shares = self.op("Mul", f"{r}.shares.readers", shares, readers)
        shares = self.op("Reshape", f"{r}.shares.flat", shares, self.constant("side_by_side", np.array([0, 0, -1])))
        if not self.int8[layer]:
            return self.op("MatMul", f"{r}.out", shares, values)
        step = self.constant("share.scale", np.array(1 / LEVELS_U8, np.float32))
        zero = self.constant("share.zero", np.array(0, np.uint8))
        shares = self.op("QuantizeLinear", f"{r}.shares.in", shares, step, zero)
        return self.op("MatMulIntegerToFloat", f"{r}.out", shares, values, step, memory[4][0], zero, domain=MICROSOFT)

    def memory(self, layers: int) -> list[Value]:
        """What the first layers read."""
        return [value for i in range(layers) for value in self._inputs(i)]

    def _inputs(self, layer: int) -> list[Value]:
        kind, d = "int8" if self.int8[layer] else "float32", self.config.d_model
        read: list[Value] = [
            (f"memory_keys.{layer}", kind, (d, "readings")),
            (f"memory_bias.{layer}", "float32", ("readings",)),
            (f"memory_values.{layer}", kind, ("readings", d)),
        ]
        if self.int8[layer]:
            read.append((f"memory_key_scales.{layer}", "float32", ("readings",)))
            read.append((f"memory_value_scales.{layer}", "float32", (d,)))
        return read


def conditioned_step_graph(
    model: Denoiser, top_k: int, ranges: Ranges | None = None, *, guided: bool = False
) -> onnx.ModelProto:
    """`step_graph` with rows that read a memory: what `memory_graph` makes, of each layer.

    guided: the same rows run a second time, without the memory, in the same pass, over caches of their own:
    plain_keys.i and plain_values.i, which become new_plain_…; guidance float32 (): w. The scores of the K best tokens
    of a row that reads become (1 + w) · s − w · s of the plain row, all others NEVER (classifier-free guidance, Ho and
    Salimans, arXiv 2207.12598). states: of the rows that read.
    """
    g, config = ReadingBuilder(model, ranges), model.config
    x, bias, scored, readers = g.embed_rows(), seen_bias(g), "scored", ""
    if guided:
        rows = g.op("Shape", "rows.shape", "positions")
        count = g.op("Cast", "rows.count", g.op("Shape", "rows.number", "positions", start=1), to=TensorProto.INT32)
        scored = g.op("Concat", "scored.both", "scored", g.op("Add", "scored.plain", "scored", count), axis=0)
        x = g.op("Concat", "embedded.both", x, x, axis=1)
        one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
        parts = g.op("ConstantOfShape", "reads", rows, value=one), g.op("ConstantOfShape", "reads_not", rows)
        readers = g.op("Concat", "readers.row", *parts, axis=1)
        readers = g.op("Unsqueeze", "readers", readers, g.constant("axes_2_3", np.array([2, 3])))
    h = g.norm(x, "blocks.0.norm1")
    cache: list[CacheValue] = []
    for i in range(config.layers):
        b, last = f"blocks.{i}", i == config.layers - 1
        products, mixed = [g.product(h, f"{b}.qkv", bias=True)], list[str]()
        if guided:
            both = g.op("Split", f"{b}.both", products[0], outputs=2, axis=1, num_outputs=2)
            products = [f"{both}.0", f"{both}.1"]
        for kind, qkv in zip(("", PLAIN), products, strict=False):
            result, layer_cache = cached_attention(g, [qkv, "", ""], layer=i, bias=bias, kind=kind)
            mixed.append(result)
            cache += layer_cache
        attended = g.op("Concat", f"{b}.mixed.both", *mixed, axis=1) if guided else mixed[0]
        read = g.read(h, i, readers)
        if last:  # rows that are not scored are done: their keys and values are made
            x, attended, read = (g.op("Gather", f"{name}.scored", name, scored, axis=1) for name in (x, attended, read))
        following = "norm" if last else f"blocks.{i + 1}.norm1"
        h, x = g.rest_of_block(x, attended, block=b, next_norm=following, more=read)
    if guided:
        _guided_scores(g, h, top_k)
    else:
        g.scores(g.op("Squeeze", "states", h, "axis_0"), out="scores")
    read_values = [*ROWS, *g.memory(config.layers), *[("guidance", "float32", ())] * guided]
    made = scored_rows(config)
    return g.model(read_values + [old for old, _ in cache], made + [new for _, new in cache], contrib=True)


def _guided_scores(g: RowBuilder, h: str, top_k: int) -> None:
    """Of the rows that read and then the plain ones.  h (1, 2·M, D)"""
    g.op("Squeeze", "states.both", h, "axis_0")
    g.op("Split", "scores.both", g.scores("states.both", out="head.scores"), outputs=2, axis=0, num_outputs=2)
    g.op("Split", "states.apart", "states.both", outputs=2, axis=0, num_outputs=2)
    g.op("Identity", "states", "states.apart.0")
    g.op("TopK", "best", "scores.both.0", g.constant("k", np.array([top_k])), outputs=2, axis=-1)
    least = g.op("Gather", "best.least", "best.0", g.constant("last_of_best", np.array([top_k - 1])), axis=1)
    apart = g.op("Mul", "scores.gained", g.op("Sub", "scores.apart", "scores.both.0", "scores.both.1"), "guidance")
    kept = g.op("GreaterOrEqual", "scores.kept", "scores.both.0", least)
    never = g.constant("never", np.array(NEVER, np.float32))
    g.op("Where", "scores", kept, g.op("Add", "scores.guided", "scores.both.0", apart), never)


def conditioned_prefill_graph(model: Denoiser, ranges: Ranges | None = None) -> onnx.ModelProto:
    """`prefill_graph` with rows that read a memory, in all layers but the last."""
    g, config = ReadingBuilder(model, ranges), model.config
    x, bias = g.embed_rows(), g.distance_bias("positions")
    h = g.norm(x, "blocks.0.norm1")
    made: list[Value] = []
    for i in range(config.layers):
        b = f"blocks.{i}"
        if i == config.layers - 1:
            k, v = last_keys_and_values(g, h, b)
        else:
            q, k, v = g.qkv(h, b)
            g.fused("MultiHeadAttention", [q, k, v, "", "", bias], [f"{b}.mixed"], num_heads=config.heads)
            read, following = g.read(h, i), f"blocks.{i + 1}.norm1"
            h, x = g.rest_of_block(x, f"{b}.mixed", block=b, next_norm=following, more=read)
        made += g.heads_apart(k, v, i)
    return g.model([*ROWS[:2], *g.memory(config.layers - 1)], made, contrib=True)


def encode_text_graph(model: Denoiser, ranges: Ranges | None = None) -> onnx.ModelProto:
    """The memory of words.

    tokens, places, words int32 (1, N): tokens of the words, one word after another; their place in the word; the
    number of the word → memory float32 (1, 1 + N, D + 1): a row that stands for no word, then the tokens'
    """
    g, e = RowBuilder(model, ranges), "conditions.words"
    tables = ("token_embedding.weight", "head.weight")
    rows = [g.token_rows(f"tokens.{table}", "tokens", table) for table in tables]
    x = g.product(g.op("Concat", "tokens.rows", *rows, axis=-1), f"{e}.token", bias=True)
    for kind, ids in (("place", "places"), ("word", "words")):
        more = g.op("Gather", f"{kind}.embedding", g.weight(f"{e}.{kind}_embedding.weight"), ids)
        x = g.op("Add", f"{kind}.embedded", x, more)
    nothing = g.constant("nothing", g.weights[f"{e}.nothing"][None])
    x = g.op("Concat", "embedded", nothing, x, axis=1)
    inputs: list[Value] = [(name, "int32", (1, "rows")) for name in ("tokens", "places", "words")]
    return g.model(inputs, _with_bias(g, _encoded(g, x, e), 0.0), contrib=True)


def encode_image_graph(model: Denoiser, ranges: Ranges | None = None) -> onnx.ModelProto:
    """The memory of pictures.

    pixels float32 (n, 3, 64, 64), RGB in 0 … 1 → memory float32 (1, 4 · n, D + 1), picture after picture
    """
    g, e, d = RowBuilder(model, ranges), "conditions.pictures", model.config.d_model
    x = g.embed_pictures(e)
    merged = g.op("MatMul", "grid.merged", g.constant("merging", merging()), _encoded(g, x, e))
    merged = g.op("Reshape", "grid.row", merged, g.constant("one_sequence", np.array([1, -1, d])))
    inputs: list[Value] = [("pixels", "float32", ("pictures", 3, PICTURE_SIZE, PICTURE_SIZE))]
    return g.model(inputs, _with_bias(g, merged, float(np.log(MERGED))), contrib=True)


def _with_bias(g: RowBuilder, rows: str, bias: float) -> list[Value]:
    """Rows of a memory (1, R, D) as the graph's output, what is added to their scores in a last column (`encode`)."""
    column, added = g.constant("column_behind", np.array([0, 0, 0, 0, 0, 1])), np.array(bias, np.float32)
    g.op("Pad", "memory", rows, column, g.constant("added", added))
    return [("memory", "float32", (1, "memory", g.config.d_model + 1))]


def _encoded(g: RowBuilder, x: str, encoder: str) -> str:
    """Through the encoder's blocks and its last LayerNorm.  (n, R, D) → the same"""
    h = g.norm(x, f"{encoder}.blocks.0.norm1")
    for i in range(DEPTH):
        b = f"{encoder}.blocks.{i}"
        g.fused("MultiHeadAttention", [*g.qkv(h, b)], [f"{b}.mixed"], num_heads=g.config.heads)
        following = f"{encoder}.blocks.{i + 1}.norm1" if i < DEPTH - 1 else f"{encoder}.norm"
        h, x = g.rest_of_block(x, f"{b}.mixed", block=b, next_norm=following)
    return h


def memory_graph(model: Denoiser, ranges: Ranges | None = None) -> onnx.ModelProto:
    """What blocks read of a memory: keys behind the weights of the queries, values before those of the output.

    memory float32 (1, R, D + 1), last what is added to the row's scores → of each layer memory_keys.i (D, H · R),
    memory_bias.i (H · R,), memory_values.i (H · R, D): a row x (1, D) scores the memory by x · keys + bias, and reads
    the softmax of each head's scores, times the values. In INT8 keys and values have one scale a column,
    memory_key_scales.i and memory_value_scales.i, measured of this memory; else they are float32.
    """
    g, config = ReadingBuilder(model, ranges), model.config
    heads, d = config.heads, config.d_model
    g.op("Split", "memory.parts", "memory", g.constant("width", np.array([d, 1])), outputs=2, axis=-1)
    for i in range(config.layers):
        r = f"conditions.reads.{i}"
        _fold(g, r)
        sizes = g.constant("sizes", np.array([2 * heads * d, heads]))
        g.op("Split", f"{r}.parts", g.product("memory.parts.0", f"{r}.kv", bias=True), sizes, outputs=2, axis=-1)
        apart = g.constant("apart", np.array([-1, 2 * heads, d]))
        rows = g.op("Reshape", f"{r}.rows", f"{r}.parts.0", apart)
        by_head = g.op("Transpose", f"{r}.by_head", rows, perm=[1, 0, 2])
        g.op("Split", f"{r}.folded", by_head, outputs=2, axis=0, num_outputs=2)
        keys, values = f"{r}.folded.0", f"{r}.folded.1"  # (H, R, D)
        if g.int8[i]:
            keys = _levels(g, f"memory_key_scales.{i}", keys, [2])
            values = _levels(g, f"memory_value_scales.{i}", values, [0, 1])
        keys = g.op("Transpose", f"{r}.keys.columns", keys, perm=[2, 0, 1])
        g.op("Reshape", f"memory_keys.{i}", keys, g.constant("columns", np.array([d, -1])))
        g.op("Reshape", f"memory_values.{i}", values, g.constant("rows", np.array([-1, d])))
        bias = g.op("Add", f"{r}.bias", f"{r}.parts.1", "memory.parts.1")
        bias = g.op("Transpose", f"{r}.bias.by_head", bias, perm=[0, 2, 1])
        g.op("Reshape", f"memory_bias.{i}", bias, g.constant("flat", np.array([-1])))
    return g.model([("memory", "float32", (1, "memory", d + 1))], g.memory(config.layers), contrib=True)


def _fold(g: RowBuilder, read: str) -> None:
    """Make `kv` of a layer one product of the memory: its keys behind the queries' weights and its values before the
    output's, of each head (D,); and what the queries' bias adds to the scores, of each head one number.
    """
    w, d, heads = g.weights, g.config.d_model, g.config.heads
    shape = heads, d // heads, -1  # the last: inputs, and the bias
    kv = np.concatenate([w[f"{read}.kv.weight"], w[f"{read}.kv.bias"][:, None]], 1)
    keys, values = kv[:d].reshape(shape), kv[d:].reshape(shape)
    sharp = np.float32((d // heads) ** -0.5)
    queries, shift = (sharp * w[f"{read}.q.{kind}"].reshape(shape) for kind in ("weight", "bias"))
    out = (w[f"{read}.out.weight"] + np.diag(w[f"{read}.gain"])).reshape(d, heads, -1)
    folded = [
        np.einsum("hwo,hwi->hoi", queries, keys).reshape(heads * d, -1),
        np.einsum("ohw,hwi->hoi", out, values).reshape(heads * d, -1),
        np.einsum("hwo,hwi->hoi", shift, keys).reshape(heads, -1),
    ]
    both = np.concatenate(folded).astype(np.float32)
    w[f"{read}.kv.weight"], w[f"{read}.kv.bias"] = both[:, :-1], both[:, -1]


def _levels(g: RowBuilder, scale: str, x: str, axes: list[int]) -> str:
    """INT8 with one scale for all numbers along the axes; the scales, side by side, are a result of that name."""
    over = g.constant("axes_" + "_".join(map(str, axes)), np.array(axes))
    largest = g.op("ReduceMax", f"{x}.largest", g.op("Abs", f"{x}.sizes", x), over, keepdims=1)
    step = g.op("Mul", f"{x}.step", largest, g.constant("level", np.array(1 / LEVELS_7BIT, np.float32)))
    step = g.op("Max", f"{x}.scale", step, g.constant("least_scale", np.array(1e-12, np.float32)))
    g.op("Reshape", scale, step, g.constant("flat", np.array([-1])))
    levels = g.op("Round", f"{x}.levels", g.op("Div", f"{x}.scaled", x, step))
    return g.op("Cast", f"{x}.int8", levels, to=TensorProto.INT8)
