"""The graphs of blocks for the CPU: one pass of causal rows over a cache, evidence that is encoded once, and drafts.

One request a pass (batch 1): on a CPU, passes of several requests gain nothing over one after another. H: heads, S:
cached rows, N: rows of the pass, T = S + N, C: rows that a cache has room for, M: scored rows, K: candidates, D: width.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto

from host.export.graph_builder import Value
from host.export.row_builder import MICROSOFT, Quantization, Ranges, RowBuilder
from host.model.network import Denoiser

CacheValue = tuple[Value, Value]
"""An input of cached rows, with the output that it becomes."""
ROWS: Final[tuple[Value, ...]] = (
    *((name, "int32", (1, "rows")) for name in ("tokens", "positions")),
    ("key_positions", "int32", ("keys",)),
    ("last", "int32", (1,)),
    ("total", "int32", ()),
    ("scored", "int32", ("scored",)),
)
"""What step graphs read beside the caches."""


def step_graph(model: Denoiser, top_k: int, ranges: Ranges | None = None) -> onnx.ModelProto:
    """Causal rows behind S cached ones, each seeing itself and all before it in the cache's order.

    tokens, positions int32 (1, N); key_positions int32 (T,): of the cached rows, then the new; last int32 (1,): T − 1;
    total int32 (): T; scored int32 (M,): row numbers; keys.i, values.i float32 (1, H, C, D/H), of each layer →
    ids int32 (M, K), scores float32 (M, K): the head's, best first, equal ones by the lower id; states float32 (M, D);
    new_keys.i, new_values.i (1, H, C, D/H): the caches with rows S … T − 1 written. Bound to the memory of keys.i and
    values.i they are written in place, and nothing is copied. Rows from T on are never read: whoever takes back a row
    writes the next one over it.

    A pass needs two rows: give a lone one twice, score the first, and write the next over the second. For N = 1 ONNX
    Runtime sums attention in another order, which INT8's rounding turns into other scores (of 128,000 tokens 158 were
    drawn otherwise); from two rows on, a row's scores are the same to the bit whatever the pass holds.
    """
    g, config = RowBuilder(model, ranges), model.config
    x = g.embed_rows()
    bias = g.distance_bias("key_positions")
    h = g.norm(x, "blocks.0.norm1")
    cache: list[CacheValue] = []
    for i in range(config.layers):
        b = f"blocks.{i}"
        mixed, layer_cache = cached_attention(g, g.qkv(h, b), layer=i, bias=bias)
        cache += layer_cache
        if i == config.layers - 1:  # the rows that nobody scores are done: their keys and values are made
            x, mixed = (g.op("Gather", f"{name}.scored", name, "scored", axis=1) for name in (x, mixed))
        following = f"blocks.{i + 1}.norm1" if i < config.layers - 1 else "norm"
        h, x = g.rest_of_block(x, mixed, block=b, next_norm=following)
    candidates(g, h, top_k)
    made = scored_rows(top_k, config.d_model)
    return g.model([*ROWS, *(old for old, _ in cache)], made + [new for _, new in cache], contrib=True)


def candidates(g: RowBuilder, h: str, top_k: int) -> None:
    """The outputs `ids`, `scores` and `states` of rows after the last LayerNorm (1, M, D)."""
    g.op("Squeeze", "states", h, "axis_0")
    best = g.op("TopK", "best", g.scores("states"), g.constant("k", np.array([top_k])), outputs=2, axis=-1)
    g.op("Identity", "scores", f"{best}.0")
    g.op("Cast", "ids", f"{best}.1", to=TensorProto.INT32)


def scored_rows(top_k: int, d_model: int) -> list[Value]:
    """What step graphs return beside the caches."""
    return [
        ("ids", "int32", ("scored", top_k)),
        ("scores", "float32", ("scored", top_k)),
        ("states", "float32", ("scored", d_model)),
    ]


def cached_attention(
    g: RowBuilder, qkv: Sequence[str], *, layer: int, bias: str, kind: str = ""
) -> tuple[str, list[CacheValue]]:
    """qkv: each (1, N, D). kind: before the names of these rows' caches → attention's result (1, N, D), the caches"""
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
    """Of rows that nothing more is asked of.  → twice (1, N, D)"""
    kv = g.product(h, f"{block}.qkv", columns=slice(g.config.d_model, 3 * g.config.d_model), bias=True)
    g.op("Split", f"{block}.kv2", kv, outputs=2, axis=-1, num_outputs=2)
    return f"{block}.kv2.0", f"{block}.kv2.1"


def draft_graph(model: Denoiser, quantization: Quantization = None) -> onnx.ModelProto:
    """The chain drafter, all its drafts; each is the arg max of score · inverse_temperature + noise among the top_k.

    state float32 (1, D): of the last kept row; token int32 (1,): drawn from it; noise float32 (drafts, V),
    inverse_temperature float32 (), top_k int64 (1,) → drafts int32 (drafts,). Temperature 0 is top_k 1.
    """
    g, config = RowBuilder(model, quantization), model.config
    g.constant("axis_0", np.array([0]))
    assert model.drafter is not None
    likely = model.drafter.likely.cpu().numpy()
    ids_of = g.constant("likely", likely)
    state, token, drafts = "state", "token", []
    for i in range(config.draft_depth):
        b = f"drafter.depths.{i}"
        known = g.norm(g.token_rows(f"{b}.embedding", token), f"{b}.norm_token")
        both = g.op("Concat", f"{b}.both", g.norm(state, f"{b}.norm_state"), known, axis=-1)
        up = g.product(both, f"{b}.up", bias=False)
        up = g.op("BiasGelu", f"{b}.gelu", up, g.weight(f"{b}.up.bias"), domain=MICROSOFT)
        state = g.op("Add", f"{b}.state", state, g.product(up, f"{b}.down", bias=True))
        g.op("TopK", f"{b}.best", g.scores(state, f"{b}.", likely), "top_k", outputs=2, axis=-1)
        ids = g.op("Gather", f"{b}.ids", ids_of, f"{b}.best.1")
        own_noise = g.op("Gather", f"{b}.own_noise", "noise", g.constant(f"{b}.number", np.array([i])))
        noise = g.op("GatherElements", f"{b}.noise", own_noise, ids, axis=-1)
        warm = g.op("Mul", f"{b}.warm", f"{b}.best.0", "inverse_temperature")
        winner = g.op("ArgMax", f"{b}.winner", g.op("Add", f"{b}.noisy", warm, noise), axis=-1, keepdims=1)
        drawn = g.op("GatherElements", f"{b}.drawn", ids, winner, axis=-1)
        token = g.op("Cast", f"{b}.draft", g.op("Squeeze", f"{b}.drawn.flat", drawn, "axis_0"), to=TensorProto.INT32)
        drafts.append(token)
    g.op("Concat", "drafts", *drafts, axis=0)
    read: list[Value] = [
        ("state", "float32", (1, config.d_model)),
        ("token", "int32", (1,)),
        ("noise", "float32", (config.draft_depth, config.vocab_size)),
        ("inverse_temperature", "float32", ()),
        ("top_k", "int64", (1,)),
    ]
    return g.model(read, [("drafts", "int32", (config.draft_depth,))], contrib=True)
