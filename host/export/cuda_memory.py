"""Conditions in the graphs for CUDA: how rows read a memory of fixed size, and the encoders that make it.

A memory has room for a bundle's most words and pictures, and `reads` says which of its rows a request has. Its last
row, whose values are zero, is that of requests without a condition: what they read is zero, so that one engine serves
both side by side, and scores the latter as if there was no memory. The encoders take as much as a request can have,
and are engines of their own that run once a request.
R: requests, N: rows of each, S: memory rows, H: heads, D: width.
"""

from typing import Final

import numpy as np
import onnx

from host.export.cuda_attention import attention
from host.export.graph_builder import NEVER, StepBuilder, Value
from host.model.conditions import DEPTH, MERGED, PICTURE_ROWS, PICTURE_SIZE, PICTURES, WORD_TOKENS, WORDS, merging
from host.model.network import Denoiser

WORD_ROWS: Final = 1 + WORDS * WORD_TOKENS
"""Of the memory, the first; then come those of pictures."""
MEMORY_ROWS: Final = -(-(WORD_ROWS + PICTURES * PICTURE_ROWS + 1) // 8) * 8
"""With the last one, which is always empty, and a multiple of 8, as tensor cores compute."""


class MemoryReader:
    """Cross-attention of a step graph's rows. Queries are a product of their own: only scored rows of the last layer
    have any.
    """

    def __init__(self, g: StepBuilder) -> None:
        self._g, self._heads, self._width = g, g.config.heads, g.config.d_model // g.config.heads
        one = g.constant("one.int32", np.array(1, np.int32))
        counted, pictures = np.zeros(MEMORY_ROWS, np.float16), slice(WORD_ROWS, WORD_ROWS + PICTURES * PICTURE_ROWS)
        counted[pictures] = np.log(MERGED)  # see `host.model.conditions.Conditions.encode`
        seen, never = g.constant("reads.visible", counted), g.constant("never", np.full(1, NEVER, np.float16))
        hidden = g.op("Where", "reads.mask", g.op("Less", "reads.not", "reads", one), never, seen)  # (R, S)
        self._bias = g.op("Unsqueeze", "reads.bias", hidden, g.constant("axes_1_2", np.array([1, 2])))

    def inputs(self) -> list[Value]:
        """The step graph's, beside those of its rows."""
        shape = ("requests", self._heads, MEMORY_ROWS, self._width)
        names = [f"memory_{kind}.{i}" for i in range(self._g.config.layers) for kind in ("keys", "values")]
        return [("reads", "int32", ("requests", MEMORY_ROWS)), *((name, "float16", shape) for name in names)]

    def read(self, normed: str, layer: int) -> str:
        """What rows read in a layer, given those after its first LayerNorm.  (R, N, D) → the same"""
        g, r, heads, width = self._g, f"conditions.reads.{layer}", self._heads, self._width
        apart = g.constant("queries_apart", np.array([0, 0, heads, width]))
        q = g.op("Reshape", f"{r}.q.apart", g.linear(normed, f"{r}.q", f"{r}.q.out"), apart)
        q = g.op("Transpose", f"{r}.q.heads", q, perm=[0, 2, 1, 3])
        q = g.op("Mul", f"{r}.q.scaled", q, g.constant("scale", np.full(1, width**-0.5, np.float16)))
        keys = g.op("Transpose", f"{r}.kT", f"memory_keys.{layer}", perm=[0, 1, 3, 2])
        scores = g.op("Add", f"{r}.biased", g.op("MatMul", f"{r}.scores", q, keys), self._bias)
        weights = g.op("Softmax", f"{r}.weights", scores, axis=-1)
        mixed = g.op("MatMul", f"{r}.values", weights, f"memory_values.{layer}")
        mixed = g.op("Transpose", f"{r}.together", mixed, perm=[0, 2, 1, 3])
        mixed = g.op("Reshape", f"{r}.mixed", mixed, g.constant("heads_together", np.array([0, 0, heads * width])))
        out = g.weights[f"{r}.out.weight"].T + np.diag(g.weights[f"{r}.gain"])
        return g.op("MatMul", f"{r}.out.out.matmul", mixed, g.constant(f"{r}.out.weight", out.astype(np.float16)))


def cuda_encode_text_graph(model: Denoiser, fp32_norms: bool = False) -> onnx.ModelProto:
    """tokens, places, words int32 (1, T): of all words one after another, anything behind them; count int32 (1,): how
    many there are → memory_keys.i, memory_values.i float16 (1, H, 1 + T, D/H) of each layer. The rows behind 1 + count
    are finite, and nothing sees them.
    """
    g, e = StepBuilder(model, "float16", fp32_norms), "conditions.words"
    embedding = g.op("Gather", "tokens.embedding", g.weight("token_embedding.weight"), "tokens")
    head = g.constant("head.weight", g.weights["head.weight"].T.astype(np.float16))  # as the step graph has it
    scored = g.op("Transpose", "tokens.head", g.op("Gather", "tokens.columns", head, "tokens", axis=1), perm=[1, 2, 0])
    x = g.linear(g.op("Concat", "tokens.rows", embedding, scored, axis=-1), f"{e}.token", f"{e}.token.out")
    for kind, ids in (("place", "places"), ("word", "words")):
        more = g.op("Gather", f"{kind}.embedding", g.weight(f"{e}.{kind}_embedding.weight"), ids)
        x = g.op("Add", f"{kind}.embedded", x, more)
    nothing = g.constant("nothing", g.weights[f"{e}.nothing"][None].astype(np.float16))
    x = g.op("Concat", "embedded", nothing, x, axis=1)
    row = g.constant("row", np.arange(WORD_ROWS, dtype=np.int32))
    seen, never = (g.constant(n, np.full(1, v, np.float16)) for n, v in (("visible", 0), ("never", NEVER)))
    hidden = g.op("Where", "rows.mask", g.op("LessOrEqual", "rows.there", row, "count"), seen, never)  # (1 + T,)
    bias = g.op("Unsqueeze", "rows.bias", hidden, g.constant("axes_0_1_2", np.array([0, 1, 2])))
    inputs: list[Value] = [(name, "int32", (1, WORD_ROWS - 1)) for name in ("tokens", "places", "words")]
    inputs.append(("count", "int32", (1,)))
    return g.model(inputs, _remembered(g, _encoded(g, x, e, bias), WORD_ROWS), contrib=False)


def cuda_encode_image_graph(model: Denoiser, fp32_norms: bool = False) -> onnx.ModelProto:
    """pixels float16 (n, 3, 64, 64), RGB in 0 … 1, of as many pictures as a request can have → memory_keys.i,
    memory_values.i float16 (1, H, 4 · n, D/H) of each layer, picture after picture
    """
    g, e, d = StepBuilder(model, "float16", fp32_norms), "conditions.pictures", model.config.d_model
    x, merged = g.embed_pictures(e), g.constant("merging", merging().astype(np.float16))
    rows = g.op("MatMul", "grid.merged", merged, _encoded(g, x, e))
    one_sequence = g.constant("one_sequence", np.array([1, PICTURES * PICTURE_ROWS, d]))
    rows = g.op("Reshape", "memory.rows", rows, one_sequence)
    inputs: list[Value] = [("pixels", "float16", (PICTURES, 3, PICTURE_SIZE, PICTURE_SIZE))]
    return g.model(inputs, _remembered(g, rows, PICTURES * PICTURE_ROWS), contrib=False)


def _encoded(g: StepBuilder, x: str, encoder: str, bias: str = "") -> str:
    """Through the encoder's blocks and its last LayerNorm.  (n, S, D) → the same"""
    g.constant("axis_0", np.array([0]))
    for i in range(DEPTH):
        b = f"{encoder}.blocks.{i}"
        qkv = g.linear(g.norm(x, f"{b}.norm1"), f"{b}.qkv", f"{b}.qkv.out")
        x = g.feed_forward(g.attention_out(x, attention(g, b, qkv, bias), b), b)
    return g.norm(x, f"{encoder}.norm")


def _remembered(g: StepBuilder, memory: str, rows: int) -> list[Value]:
    """Keys and values of each layer of memory (1, S, D): the graph's outputs."""
    heads, width, made = g.config.heads, g.config.d_model // g.config.heads, list[Value]()
    apart = g.constant("keys_apart", np.array([1, rows, 2, heads, width]))
    for i in range(g.config.layers):
        kv = f"conditions.reads.{i}.kv"
        both = g.op("Reshape", f"{kv}.apart", g.linear(memory, kv, f"{kv}.out"), apart)
        both = g.op("Transpose", f"{kv}.heads", both, perm=[2, 0, 3, 1, 4])
        g.op("Split", f"{kv}.parts", both, outputs=2, axis=0, num_outputs=2)
        for part, kind in enumerate(("keys", "values")):
            g.op("Squeeze", f"memory_{kind}.{i}", f"{kv}.parts.{part}", "axis_0")
            made.append((f"memory_{kind}.{i}", "float16", (1, heads, rows, width)))
    return made
