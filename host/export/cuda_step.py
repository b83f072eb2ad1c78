"""The step graph of blocks for CUDA: half precision, rows of several requests, keys and values in slots of the device.

One graph serves every layout that blocks are written by: a row sees the cached rows of its request and the first `sees`
rows of the pass. Causal rows have sees = 1, 2, …; evidence, whose rows all see each other, has the number of its rows.
Kernels write the inputs and append the new keys and values (`edge/backends/trt/kernels/blocks.cu`). Rows of a network
that takes conditions also read a memory, see `host.export.cuda_memory`.
R: requests, N: rows of each in the pass, C: rows that a slot holds, M: scored rows of each, D: width, V: vocabulary.
"""

from typing import Final

import numpy as np
import onnx

from host.export.cuda_memory import MemoryReader
from host.export.graph_builder import NEVER, StepBuilder, Value
from host.model.network import Denoiser
from shared.messages import MAX_SEGMENTS
from shared.tokens import BOS, MASK, PAD

DRAFTER: Final = "drafter."
"""Prefix of constants that no node reads: kernels draft with them."""
LIKELY: Final = "drafter.likely"
"""Ids that a draft can be, int32 (F,)."""


def cuda_step_graph(model: Denoiser, fp32_norms: bool = False) -> onnx.ModelProto:
    """tokens, positions, sees int32 (R, N); cached int32 (R,): rows that its slot keeps; key_positions int32 (R, C): of
    those; scored int32 (R, M): rows counted over all requests, r·N + j; keys.i, values.i float16 (R, H, C, D/H) of each
    layer → logits float16 (R, M, V), states float16 (R, M, D), new_keys.i, new_values.i float16 (R, H, N, D/H). With
    conditions also reads int32 (R, S), memory_keys.i and memory_values.i float16 (R, H, S, D/H).

    Cached rows are never copied: their scores are computed beside those of the new rows, and one softmax spans both.
    A slot's values after its `cached` rows are read with weight 0: they must be finite.
    The drafter's weights, and the tokens that it drafts among, are constants beside the graph.
    """
    g = StepBuilder(model, "float16", fp32_norms)
    config, capacity = model.config, model.config.canvas_len + MAX_SEGMENTS
    tokens = g.op("Gather", "embedding", g.weight("token_embedding.weight"), "tokens")
    x = g.op("Add", "embedded", tokens, g.op("Gather", "places", g.weight("position_embedding.weight"), "positions"))
    biases = _biases(g, capacity)
    memory = None if model.conditions is None else MemoryReader(g)
    made: list[Value] = []
    read: list[Value] = [(name, "int32", ("requests", "rows")) for name in ("tokens", "positions", "sees")]
    read += [("cached", "int32", ("requests",)), ("key_positions", "int32", ("requests", capacity))]
    read += [("scored", "int32", ("requests", config.draft_depth + 1))]
    heads, width = config.heads, config.d_model // config.heads
    for i in range(config.layers):
        b = f"blocks.{i}"
        h = g.norm(x, f"{b}.norm1")
        mixed = _attention(g, i, g.linear(h, f"{b}.qkv", f"{b}.qkv.out"), biases)
        if i == config.layers - 1:  # rows that are not scored are done: their keys and values are made
            flat = g.constant("flat", np.array([-1, config.d_model]))
            x, mixed, *rest = (
                g.op("Gather", f"{name}.scored", g.op("Reshape", f"{name}.flat", name, flat), "scored", axis=0)
                for name in (x, mixed, *[h] * (memory is not None))
            )
            h = rest[0] if rest else h
        x = g.attention_out(x, mixed, b)
        if memory is not None:
            x = g.op("Add", f"{b}.x1.and_read", x, memory.read(h, i))
        x = g.feed_forward(x, b)
        for kind in ("keys", "values"):
            read.append((f"{kind}.{i}", "float16", ("requests", heads, capacity, width)))
            made.append((f"new_{kind}.{i}", "float16", ("requests", heads, "rows", width)))
    read += [] if memory is None else memory.inputs()
    states = g.norm(x, "norm", out="states")
    bias = g.weights["head.bias"].copy()
    bias[[PAD, BOS, MASK]] = NEVER  # no row scores them left to right
    g.weights["head.bias"] = bias
    weight = g.constant("head.weight", g.weights["head.weight"].T.astype(np.float16))
    shift = g.constant("head.bias.rows", bias.astype(np.float16))
    g.op("Add", "logits", g.op("MatMul", "head.matmul", states, weight), shift)
    if model.drafter is not None:
        g.constant(LIKELY, model.drafter.likely.cpu().numpy().astype(np.int32))
    for name in (name for name in g.weights if name.startswith(DRAFTER)):
        if name.endswith((".up.weight", ".down.weight")):
            g.parameters(name.removesuffix(".weight"))  # inputs × outputs, as the kernels read them
        elif not name.endswith((".up.bias", ".down.bias")):
            g.weight(name)
    scored = ("requests", config.draft_depth + 1)
    made += [("logits", "float16", (*scored, config.vocab_size)), ("states", "float16", (*scored, config.d_model))]
    return g.model(read, made, contrib=False)


def _biases(g: StepBuilder, capacity: int) -> tuple[str, str]:
    """What attention adds to the scores of cached and of new rows: the bias of the distance, NEVER where not visible.

    → (R, H, N, C), (R, H, N, N)
    """
    axes = {n: g.constant(f"axis_{n}", np.array([n])) for n in (0, 1, 2)}
    length = g.op("Shape", "length", "tokens", start=1, end=2)
    count = g.constant("count", np.arange(max(capacity, g.config.canvas_len), dtype=np.int32))
    zero = g.constant("zero", np.array([0]))
    kept = g.op("Slice", "count.cached", count, zero, g.constant("capacity", np.array([capacity])), axes[0])
    passed = g.op("Slice", "count.new", count, zero, length, axes[0])
    visible_cached = g.op(
        "Less", "visible.cached", kept, g.op("Unsqueeze", "cached.bound", "cached", axes[1])
    )  # (R, C)
    visible_new = g.op("Less", "visible.new", passed, g.op("Unsqueeze", "sees.bound", "sees", axes[2]))  # (R, N, N)
    column = g.op("Unsqueeze", "positions.column", "positions", axes[2])
    ahead = g.constant("farthest", np.array(g.config.canvas_len - 1, np.int32))
    table = g.constant("bias_table", np.ascontiguousarray(g.weights["relative_bias"].T).astype(np.float16))
    seen, never = (g.constant(n, np.full(1, v, np.float16)) for n, v in (("visible", 0), ("never", NEVER)))
    made = []
    for name, keys, visible in (
        ("cached", "key_positions", g.op("Unsqueeze", "visible.cached.row", visible_cached, axes[1])),
        ("new", "positions", visible_new),
    ):
        row = g.op("Unsqueeze", f"{name}.key_row", keys, axes[1])
        distance = g.op("Add", f"{name}.column", g.op("Sub", f"{name}.distance", row, column), ahead)  # (R, N, keys)
        bias = g.op("Transpose", f"{name}.bias", g.op("Gather", f"{name}.by_pair", table, distance), perm=[0, 3, 1, 2])
        hidden = g.op("Unsqueeze", f"{name}.hidden", g.op("Where", f"{name}.mask", visible, seen, never), axes[1])
        made.append(g.op("Add", f"{name}.attention_bias", bias, hidden))
    return made[0], made[1]


def _attention(g: StepBuilder, layer: int, qkv: str, biases: tuple[str, str]) -> str:
    """→ (R, N, D)"""
    b, heads, width = f"blocks.{layer}", g.config.heads, g.config.d_model // g.config.heads
    split = g.constant("heads_apart", np.array([0, 0, 3, heads, width]))
    apart = g.op("Transpose", f"{b}.apart", g.op("Reshape", f"{b}.split", qkv, split), perm=[2, 0, 3, 1, 4])
    g.op("Split", f"{b}.qkv3", apart, outputs=3, axis=0, num_outputs=3)
    k_new, v_new = f"new_keys.{layer}", f"new_values.{layer}"
    q, k, v = (g.op("Squeeze", n, f"{b}.qkv3.{i}", "axis_0") for i, n in enumerate((f"{b}.q", k_new, v_new)))
    q = g.op("Mul", f"{b}.q.scaled", q, g.constant("scale", np.full(1, width**-0.5, np.float16)))
    scores = []
    for name, keys, bias in (("cached", f"keys.{layer}", biases[0]), ("new", k, biases[1])):
        product = g.op("MatMul", f"{b}.{name}.scores", q, g.op("Transpose", f"{b}.{name}.kT", keys, perm=[0, 1, 3, 2]))
        scores.append(g.op("Add", f"{b}.{name}.biased", product, bias))
    weights = g.op("Softmax", f"{b}.weights", g.op("Concat", f"{b}.all_scores", *scores, axis=-1), axis=-1)
    end, axis = g.constant("end", np.array([2**31 - 1])), g.constant("axis_3", np.array([3]))
    old = g.op("Slice", f"{b}.cached.weights", weights, "zero", "capacity", axis)
    new = g.op("Slice", f"{b}.new.weights", weights, "capacity", end, axis)
    mixed = g.op(
        "Add",
        f"{b}.values",
        g.op("MatMul", f"{b}.cached.values", old, f"values.{layer}"),
        g.op("MatMul", f"{b}.new.values", new, v),
    )
    together = g.op("Transpose", f"{b}.together", mixed, perm=[0, 2, 1, 3])
    return g.op("Reshape", f"{b}.mixed", together, g.constant("heads_together", np.array([0, 0, heads * width])))
