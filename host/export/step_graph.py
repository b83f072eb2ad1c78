"""The graphs of blocks for the CPU: one pass of causal rows over a cache, evidence that is encoded once, and drafts.

One request a pass (batch 1). H: heads, S: cached rows, N: rows of the pass, T = S + N, C: rows that a cache has room
for, M: scored rows, D: width, V: vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray

from host.export.graph_builder import Value
from host.export.row_builder import Quantization, Ranges, RowBuilder
from host.model.network import Denoiser, ModelConfig

CacheValue = tuple[Value, Value]
"""An input of cached rows, with the output that it becomes."""
ROWS: Final[tuple[Value, ...]] = (
    *((name, "int32", (1, "rows")) for name in ("tokens", "positions")),
    ("key_positions", "int32", ("places",)),
    *((name, "int32", (1,)) for name in ("last", "total")),
    ("scored", "int32", ("scored",)),
)
"""What step graphs read beside the caches."""


def step_graph(model: Denoiser, ranges: Ranges | None = None) -> onnx.ModelProto:
    """Causal rows behind S cached ones, each seeing itself and all before it in the cache's order.

    tokens, positions int32 (1, N); key_positions int32 (at least T,): of the cached rows, then the new; last int32
    (1,): T − 1; total int32 (1,): T; scored int32 (M,): row numbers; keys.i, values.i float32 (1, H, C, D/H), of each
    layer → scores float32 (M, V), before the softmax; states float32 (M, D); new_keys.i, new_values.i (1, H, C, D/H):
    the caches with rows S … T − 1 written. Bound to the memory of keys.i and values.i they are written in place, and
    nothing is copied. Rows from T on are never read: a row that is taken back is overwritten by the next.

    The best K are not computed here: that costs 10 µs a row, and few draws need them.

    A pass needs two rows: give a lone one twice, score the first, and write the next over the second. For N = 1 ONNX
    Runtime sums attention in another order, which INT8's rounding turns into other scores (of 128,000 tokens 158 were
    drawn otherwise); from two rows on, a row's scores are the same to the bit whatever the pass holds.
    """
    g, config = RowBuilder(model, ranges), model.config
    x = g.embed_rows()
    bias = seen_bias(g)
    h = g.norm(x, "blocks.0.norm1")
    cache: list[CacheValue] = []
    for i in range(config.layers):
        b = f"blocks.{i}"
        mixed, layer_cache = cached_attention(g, [g.product(h, f"{b}.qkv", bias=True), "", ""], layer=i, bias=bias)
        cache += layer_cache
        if i == config.layers - 1:  # rows that are not scored are done: their keys and values are made
            x, mixed = (g.op("Gather", f"{name}.scored", name, "scored", axis=1) for name in (x, mixed))
        following = f"blocks.{i + 1}.norm1" if i < config.layers - 1 else "norm"
        h, x = g.rest_of_block(x, mixed, block=b, next_norm=following)
    g.scores(g.op("Squeeze", "states", h, "axis_0"), out="scores")
    made = scored_rows(config)
    return g.model([*ROWS, *(old for old, _ in cache)], made + [new for _, new in cache], contrib=True)


def seen_bias(g: RowBuilder) -> str:
    """What attention adds to the scores of cached and new rows, by distance.  → (1, H, N, T)"""
    first = g.constant("first_row", np.array([0], np.int32))
    return g.distance_bias(g.op("Slice", "seen_positions", "key_positions", first, "total"))


def scored_rows(config: ModelConfig) -> list[Value]:
    """What step graphs return beside the caches."""
    return [("scores", "float32", ("scored", config.vocab_size)), ("states", "float32", ("scored", config.d_model))]


def cached_attention(
    g: RowBuilder, qkv: Sequence[str], *, layer: int, bias: str, kind: str = ""
) -> tuple[str, list[CacheValue]]:
    """qkv: each (1, N, D), or one (1, N, 3·D) and twice "". kind: before the names of these rows' caches

    → attention's result (1, N, D), the caches
    """
    heads = g.config.heads
    old, new = ([f"{age}{kind}{part}.{layer}" for part in ("keys", "values")] for age in ("", "new_"))
    inputs, mixed = [*qkv, *old, "last", "total", "", "", "", bias], f"blocks.{layer}.{kind}mixed"  # no rotary tables
    g.fused("GroupQueryAttention", inputs, [mixed, *new], num_heads=heads, kv_num_heads=heads)
    shape = (1, heads, "room", g.config.d_model // heads)
    return mixed, [((a, "float32", shape), (z, "float32", shape)) for a, z in zip(old, new, strict=True)]


def prefill_graph(model: Denoiser, ranges: Ranges | None = None) -> onnx.ModelProto:
    """The evidence of a text with gaps: rows that all see each other.

    tokens, positions int32 (1, N) → new_keys.i, new_values.i float32 (1, H, N, D/H), of each layer
    """
    g, config = RowBuilder(model, ranges), model.config
    x = g.embed_rows()
    bias = g.distance_bias("positions")
    h = g.norm(x, "blocks.0.norm1")
    made: list[Value] = []
    for i in range(config.layers):
        b = f"blocks.{i}"
        if i == config.layers - 1:
            k, v = last_keys_and_values(g, h, b)
        else:
            q, k, v = g.qkv(h, b)
            inputs = [q, k, v, "", "", bias]
            g.fused("MultiHeadAttention", inputs, [f"{b}.mixed"], num_heads=config.heads)
            h, x = g.rest_of_block(x, f"{b}.mixed", block=b, next_norm=f"blocks.{i + 1}.norm1")
        made += g.heads_apart(k, v, i)
    return g.model(list(ROWS[:2]), made, contrib=True)


def last_keys_and_values(g: RowBuilder, h: str, block: str) -> tuple[str, str]:
    """Of rows whose attention is not needed.  → twice (1, N, D)"""
    kv = g.product(h, f"{block}.qkv", columns=slice(g.config.d_model, 3 * g.config.d_model), bias=True)
    g.op("Split", f"{block}.kv2", kv, outputs=2, axis=-1, num_outputs=2)
    return f"{block}.kv2.0", f"{block}.kv2.1"


def draft_graph(model: Denoiser, quantization: Quantization = None) -> onnx.ModelProto:
    """The chain drafter, all its drafts; each is the arg max of score + temperature · noise of the likely tokens.

    No top-k: it would cost more than the drafts that it mends. What a step's first layer makes of the token before is a
    table, so that half of that layer is never computed.

    state float32 (1, D): of the last kept row; token int32 (1,): drawn from it; noise float32 (drafts, V),
    temperature float32 () → drafts int32 (drafts,).
    """
    g, config = RowBuilder(model, quantization), model.config
    assert model.drafter is not None
    likely = model.drafter.likely.cpu().numpy()
    ids_of = g.constant("likely", likely.astype(np.int32))
    noise = g.op("Mul", "warm_noise", g.op("Gather", "likely_noise", "noise", ids_of, axis=1), "temperature")
    state, row, drafts = "state", "token", []
    for i in range(config.draft_depth):
        b = f"drafter.depths.{i}"
        known = g.table_rows(f"{b}.known", token_part(g.weights, b)[slice(None) if i == 0 else likely], row)
        up = g.product(g.norm(state, f"{b}.norm_state"), f"{b}.up", bias=False, inputs=slice(config.d_model))
        up = g.op("Gelu", f"{b}.gelu", g.op("Add", f"{b}.both", up, known), approximate="none")
        state = g.op("Add", f"{b}.state", state, g.product(up, f"{b}.down", bias=True))
        scores = g.scores(state, f"{b}.head.scores", likely)
        own_noise = g.op("Gather", f"{b}.own_noise", noise, g.constant(f"{b}.number", np.array([i])))
        row = g.op("ArgMax", f"{b}.winner", g.op("Add", f"{b}.noisy", scores, own_noise), axis=-1, keepdims=0)
        drafts.append(row)
    g.op("Gather", "drafts", ids_of, g.op("Concat", "winners", *drafts, axis=0))
    read: list[Value] = [
        ("state", "float32", (1, config.d_model)),
        ("token", "int32", (1,)),
        ("noise", "float32", (config.draft_depth, config.vocab_size)),
        ("temperature", "float32", ()),
    ]
    return g.model(read, [("drafts", "int32", (config.draft_depth,))], contrib=True)


def token_part(weights: Mapping[str, NDArray[np.float32]], step: str) -> NDArray[np.float32]:
    """What each token adds to a step of the chain before its GELU, the bias included.  → (V, hidden)"""
    x = weights["token_embedding.weight"]
    x = x - x.mean(1, keepdims=True)
    x /= np.sqrt((x * x).mean(1, keepdims=True) + np.float32(1e-5))
    x = x * weights[f"{step}.norm_token.weight"] + weights[f"{step}.norm_token.bias"]
    table: NDArray[np.float32] = x @ weights[f"{step}.up.weight"][:, x.shape[1] :].T + weights[f"{step}.up.bias"]
    return table
