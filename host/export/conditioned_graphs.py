"""The graphs of blocks whose rows read a memory of words and pictures, and the encoders that make it; for the CPU.

Self-attention's products and the queries of cross-attention are one product, as both read the same normed rows. H:
heads, N: rows of the pass, R: memory rows, M: scored rows, K: candidates, D: width. Batch 1, as in
`host.export.step_graph`.
"""

from typing import Final

import numpy as np
import onnx
from onnx import TensorProto

from host.export.graph_builder import NEVER, Value
from host.export.row_builder import Ranges, RowBuilder
from host.export.step_graph import ROWS, CacheValue, cached_attention, last_keys_and_values, scored_rows, seen_bias
from host.model.conditions import DEPTH, PICTURE_SIZE
from host.model.network import Denoiser

PLAIN: Final = "plain_"
"""Prefix of the caches of rows that read no memory."""


class ReadingBuilder(RowBuilder):
    """Rows that read a memory, given as keys and values of each layer."""

    def __init__(self, model: Denoiser, ranges: Ranges | None) -> None:
        layers = range(model.config.layers)
        if ranges is not None:
            ranges = {**ranges, **{f"blocks.{i}.all": ranges[q] for i in layers if (q := f"blocks.{i}.qkv") in ranges}}
        super().__init__(model, ranges)
        for i in layers:
            r = f"conditions.reads.{i}"
            self.weights[f"{r}.out.weight"] = self.weights[f"{r}.out.weight"] + np.diag(self.weights[f"{r}.gain"])
            for kind in ("weight", "bias"):
                parts = [self.weights[f"{name}.{kind}"] for name in (f"blocks.{i}.qkv", f"conditions.reads.{i}.q")]
                self.weights[f"blocks.{i}.all.{kind}"] = np.concatenate(parts)

    def all_products(self, h: str, layer: int) -> str:
        """Queries, keys and values of self-attention, and queries of the memory, side by side.  → (1, N, 4·D)"""
        return self.product(h, f"blocks.{layer}.all", bias=True)

    def apart(self, products: str, name: str) -> list[str]:
        """→ four times (1, N, D)"""
        self.op("Split", name, products, outputs=4, axis=-1, num_outputs=4)
        return [f"{name}.{part}" for part in range(4)]

    def read(self, queries: str, layer: int, scored: str = "") -> str:
        """What rows read of the memory, or only the scored ones.  → (1, N, D)

        All of them attend: ONNX Runtime sums a lone row in another order, so that one scored row would not be the same
        to the bit as among others.
        """
        r = f"conditions.reads.{layer}"
        inputs = [queries, f"memory_keys.{layer}", f"memory_values.{layer}"]
        self.fused("MultiHeadAttention", inputs, [f"{r}.mixed"], num_heads=self.config.heads)
        mixed = self.op("Gather", f"{r}.mixed.scored", f"{r}.mixed", scored, axis=1) if scored else f"{r}.mixed"
        return self.product(mixed, f"{r}.out", bias=False)

    def memory(self, layers: int) -> list[Value]:
        """The inputs of the first layers."""
        shape = (1, self.config.heads, "memory", self.config.d_model // self.config.heads)
        names = [f"memory_{kind}.{i}" for i in range(layers) for kind in ("keys", "values")]
        return [(name, "float32", shape) for name in names]


def conditioned_step_graph(
    model: Denoiser, top_k: int, ranges: Ranges | None = None, *, guided: bool = False
) -> onnx.ModelProto:
    """`step_graph` with rows that read a memory: memory_keys.i, memory_values.i float32 (1, H, R, D/H), of each layer.

    guided: the same rows run a second time, without the memory, in the same pass, over caches of their own:
    plain_keys.i and plain_values.i, which become new_plain_…; guidance float32 (): w. The scores of the K best tokens
    of a row that reads become (1 + w) · s − w · s of the plain row, all others NEVER (classifier-free guidance, Ho and
    Salimans, arXiv 2207.12598). states: of the rows that read.
    """
    g, config = ReadingBuilder(model, ranges), model.config
    x, bias, scored = g.embed_rows(), seen_bias(g), "scored"
    if guided:
        count = g.op("Cast", "rows.count", g.op("Shape", "rows.shape", "positions", start=1), to=TensorProto.INT32)
        scored = g.op("Concat", "scored.both", "scored", g.op("Add", "scored.plain", "scored", count), axis=0)
        x = g.op("Concat", "embedded.both", x, x, axis=1)
    h = g.norm(x, "blocks.0.norm1")
    cache: list[CacheValue] = []
    for i in range(config.layers):
        b, last = f"blocks.{i}", i == config.layers - 1
        products = g.all_products(h, i)
        if guided:
            both = g.op("Split", f"{b}.both", products, outputs=2, axis=1, num_outputs=2)
            products = f"{both}.0"
        *qkv, queries = g.apart(products, f"{b}.parts")
        mixed, layer_cache = cached_attention(g, qkv, layer=i, bias=bias)
        cache += layer_cache
        if guided:
            qkv = g.apart(f"{both}.1", f"{b}.plain_parts")[:3]
            plain, layer_cache = cached_attention(g, qkv, layer=i, bias=bias, kind=PLAIN)
            cache += layer_cache
            mixed = g.op("Concat", f"{b}.mixed.both", mixed, plain, axis=1)
        if last:  # rows that are not scored are done: their keys and values are made
            x, mixed = (g.op("Gather", f"{name}.scored", name, scored, axis=1) for name in (x, mixed))
        read = g.read(queries, i, "scored" if last else "")
        if guided:
            nothing = g.op("ConstantOfShape", f"{read}.nothing", g.op("Shape", f"{read}.shape", read))
            read = g.op("Concat", f"{read}.both", read, nothing, axis=1)
        following = "norm" if last else f"blocks.{i + 1}.norm1"
        h, x = g.rest_of_block(x, mixed, block=b, next_norm=following, more=read)
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
    """`prefill_graph` with rows that read a memory, in all layers but the last: memory_keys.i, memory_values.i."""
    g, config = ReadingBuilder(model, ranges), model.config
    x, bias = g.embed_rows(), g.distance_bias("positions")
    h = g.norm(x, "blocks.0.norm1")
    made: list[Value] = []
    for i in range(config.layers):
        b = f"blocks.{i}"
        if i == config.layers - 1:
            k, v = last_keys_and_values(g, h, b)
        else:
            q, k, v, queries = g.apart(g.all_products(h, i), f"{b}.parts")
            g.fused("MultiHeadAttention", [q, k, v, "", "", bias], [f"{b}.mixed"], num_heads=config.heads)
            read, following = g.read(queries, i), f"blocks.{i + 1}.norm1"
            h, x = g.rest_of_block(x, f"{b}.mixed", block=b, next_norm=following, more=read)
        made += g.heads_apart(k, v, i)
    return g.model([*ROWS[:2], *g.memory(config.layers - 1)], made, contrib=True)


def encode_text_graph(model: Denoiser, ranges: Ranges | None = None) -> onnx.ModelProto:
    """The memory of words.

    tokens, places, words int32 (1, N): tokens of the words, one word after another; their place in the word; the
    number of the word → memory_keys.i, memory_values.i float32 (1, H, 1 + N, D/H), of each layer: a row that stands for
    no word, then the tokens'
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
    return g.model(inputs, _remembered(g, _encoded(g, x, e)), contrib=True)


def encode_image_graph(model: Denoiser, ranges: Ranges | None = None) -> onnx.ModelProto:
    """The memory of pictures.

    pixels float32 (n, 3, 64, 64), RGB in 0 … 1 → memory_keys.i, memory_values.i float32 (1, H, 16 · n, D/H), of each
    layer, picture after picture
    """
    g, e, d = RowBuilder(model, ranges), "conditions.pictures", model.config.d_model
    one, two = (g.constant(name, np.array(value, np.float32)) for name, value in (("one", 1), ("two", 2)))
    x = g.op("Sub", "pixels.centred", g.op("Mul", "pixels.twice", "pixels", two), one)
    parts = [f"{e}.patches.weight", f"{e}.patches.bias"]
    x = g.op("Conv", f"{e}.patches.out", x, *map(g.weight, parts), strides=[4, 4])
    for i in range(2):
        x = g.op("Gelu", f"{e}.halves.{i}.in", x, approximate="none")
        parts = [f"{e}.halves.{i}.weight", f"{e}.halves.{i}.bias"]
        x = g.op("Conv", f"{e}.halves.{i}.out", x, *map(g.weight, parts), strides=[2, 2], pads=[1, 1, 1, 1])
    x = g.op("Reshape", "grid.flat", x, g.constant("grid", np.array([0, d, -1])))
    x = g.op("Transpose", "grid.rows", x, perm=[0, 2, 1])
    x = g.op("Add", "embedded", x, g.weight(f"{e}.position_embedding.weight"))
    rows = g.op("Reshape", "memory.rows", _encoded(g, x, e), g.constant("one_sequence", np.array([1, -1, d])))
    inputs: list[Value] = [("pixels", "float32", ("pictures", 3, PICTURE_SIZE, PICTURE_SIZE))]
    return g.model(inputs, _remembered(g, rows), contrib=True)


def _encoded(g: RowBuilder, x: str, encoder: str) -> str:
    """Through the encoder's blocks and its last LayerNorm.  (n, R, D) → the same"""
    h = g.norm(x, f"{encoder}.blocks.0.norm1")
    for i in range(DEPTH):
        b = f"{encoder}.blocks.{i}"
        g.fused("MultiHeadAttention", [*g.qkv(h, b)], [f"{b}.mixed"], num_heads=g.config.heads)
        following = f"{encoder}.blocks.{i + 1}.norm1" if i < DEPTH - 1 else f"{encoder}.norm"
        h, x = g.rest_of_block(x, f"{b}.mixed", block=b, next_norm=following)
    return h


def _remembered(g: RowBuilder, memory: str) -> list[Value]:
    """Keys and values of each layer of memory (1, R, D): the graph's outputs."""
    made: list[Value] = []
    for i in range(g.config.layers):
        kv = f"conditions.reads.{i}.kv"
        g.op("Split", f"{kv}.parts", g.product(memory, kv, bias=True), outputs=2, axis=-1, num_outputs=2)
        made += g.heads_apart(f"{kv}.parts.0", f"{kv}.parts.1", i, "memory_")
    return [(name, kind, (*shape[:2], "memory", shape[3])) for name, kind, shape in made]
