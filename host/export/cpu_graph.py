"""The step graph for the CPU: float32, ONNX Runtime's own attention, and a reduction to the K best tokens at the end.

All logits (8 MB a step at 256 × 8,192) never come to Python.
"""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from host.export.graph_builder import NEVER, StepBuilder, Value
from host.model.network import Denoiser
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, MASK, PAD


def cpu_graph(model: Denoiser, top_k: int) -> onnx.ModelProto:
    """One canvas, scored at the wanted positions only: the LM head is a good part of a small network.

    canvas int32 (1, L), t float32 (1,) if timed, wanted int32 (M,) positions, ascending →
    ids int32 (M, K), logp float32 (M, K) over the full vocabulary, entropy float32 (M,)
    """
    g = StepBuilder(model, "float32")
    config = model.config
    x = g.embed()
    bias = g.attention_bias(_relative_bias(g))  # (1, H, L, L)
    attention: dict[str, Any] = {"domain": "com.microsoft", "num_heads": config.heads}
    for i in range(config.layers):
        b = f"blocks.{i}"
        h = g.norm(x, f"{b}.norm1")
        if i == config.layers - 1:  # from here on only the states that wanted positions are read from, one before each
            read_from = g.op("Sub", "read_from", "wanted", g.constant("one_before", np.array(1, np.int32)))
            x, few = (g.op("Gather", f"{n}.wanted", n, read_from, axis=1) for n in (x, h))
            q = g.linear(few, f"{b}.qkv", f"{b}.q.out", slice(0, config.d_model))
            kv = g.linear(h, f"{b}.qkv", f"{b}.kv.out", slice(config.d_model, 3 * config.d_model))
            g.op("Split", f"{b}.kv2", kv, outputs=2, axis=-1, num_outputs=2)
            bias = g.op("Gather", "attention_bias.wanted", bias, read_from, axis=2)
            inputs = (q, f"{b}.kv2.0", f"{b}.kv2.1")
        else:
            g.op("Split", f"{b}.qkv3", g.linear(h, f"{b}.qkv", f"{b}.qkv.out"), outputs=3, axis=-1, num_outputs=3)
            inputs = (f"{b}.qkv3.0", f"{b}.qkv3.1", f"{b}.qkv3.2")
        mixed = g.op("MultiHeadAttention", f"{b}.mixed", *inputs, "", "", bias, **attention)
        x = g.feed_forward(g.attention_out(x, mixed, b), b)
    _reduction(g, g.op("Squeeze", "states", g.norm(x, "norm"), "axis_0"), top_k)
    read: list[Value] = [("canvas", "int32", (1, "length")), ("t", "float32", (1,)), ("wanted", "int32", ("wanted",))]
    if not config.time_input:
        del read[1]
    outputs: list[Value] = [
        ("ids", "int32", ("wanted", top_k)),
        ("logp", "float32", ("wanted", top_k)),
        ("entropy", "float32", ("wanted",)),
    ]
    return g.model(read, outputs, contrib=True)


def _relative_bias(g: StepBuilder) -> str:
    """The table spread over all pairs of positions: by ONNX Runtime when it loads the graph, whose file stays small.

    → (1, H, canvas, canvas)
    """
    ahead = g.constant("farthest", np.array(g.config.canvas_len - 1, np.int32))
    row = g.op("Unsqueeze", "query_position", "all_positions", g.constant("axis_1", np.array([1])))
    column = g.op("Add", "distance_column", g.op("Sub", "distance", "all_positions", row), ahead)
    whole = g.op("Gather", "bias_of_pairs", g.weight("relative_bias"), column, axis=1)
    return g.op("Unsqueeze", "bias_of_pairs.4d", whole, "axis_0")


def _reduction(g: StepBuilder, x: str, top_k: int) -> None:
    """States (M, D) → the K best ids, their log-probabilities over the full vocabulary, and the entropy; all exact.

    The head is split: control tokens apart from text, so that forbidding EOS and PAD touches four columns
    and copies no (M, V) array, and so that quantization leaves the four in float32.
    """
    head, bias = g.weights["head.weight"].T, g.weights["head.bias"].copy()
    bias[[MASK, BOS]] = NEVER
    n = FIRST_TEXT_ID
    text = g.op("MatMul", "head.matmul", x, g.constant("head.text.weight", head[:, n:]))
    text = g.op("Add", "head.text", text, g.constant("head.text.bias", bias[n:]))  # (M, V − 4)
    control = g.op("MatMul", "head.control.matmul", x, g.constant("head.control.weight", head[:, :n]))
    control = g.op("Add", "head.control.scores", control, g.constant("head.control.bias", bias[:n]))
    forbidden = np.zeros(n, np.float32)
    forbidden[[EOS, PAD]] = NEVER
    axis1 = g.constant("axis_1", np.array([1]))
    column = g.op("Unsqueeze", "wanted.column", "wanted", axis1)
    impossible = g.op(
        "Cast", "impossible", g.op("Less", "ends_impossible", column, g.last_text()), to=TensorProto.FLOAT
    )
    never = g.op("Mul", "forbidden", impossible, g.constant("forbidden_ends", forbidden))
    control = g.op("Add", "head.control", control, never)  # (M, 4)

    def reduce(kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        return g.op(kind, f"reduce.{name}", *inputs, **attributes)

    k = g.constant("k", np.array([top_k]))
    reduce("TopK", "text", text, k, outputs=2, axis=-1)
    text_ids = reduce("Add", "text_ids", "reduce.text.1", g.constant("text_offset", np.array(n)))
    best = reduce("Slice", "best_text", "reduce.text.0", "zero", g.constant("one", np.array([1])), axis1)
    # Softmax is the runtime's fastest pass over (M, V): its largest value is 1/Σexp(x − max), so it gives the log-sum.
    p = reduce("Softmax", "p", text, axis=-1)
    log_top = reduce("Log", "log_top", reduce("ReduceMax", "p_max", p, axis1, keepdims=1))
    text_lse = reduce("Sub", "text_lse", best, log_top)
    mean_score = reduce("ReduceSum", "mean_score", reduce("Mul", "p_x", p, text), axis1, keepdims=1)
    control_lse = reduce("ReduceLogSumExp", "control_lse", control, axis1, keepdims=1)
    both = reduce("Concat", "lse_parts", text_lse, control_lse, axis=1)
    lse = reduce("ReduceLogSumExp", "lse", both, axis1, keepdims=1)
    text_share = reduce("Exp", "text_share", reduce("Sub", "text_log_share", text_lse, lse))
    control_p = reduce("Exp", "control_p", reduce("Sub", "control_logp", control, lse))
    control_mean = reduce("ReduceSum", "control_mean", reduce("Mul", "control_px", control_p, control), axis1)
    mean = reduce("Add", "mean", reduce("Mul", "text_mean", text_share, mean_score), control_mean)
    g.op("Squeeze", "entropy", reduce("Sub", "entropy", lse, mean), axis1)  # H = log Z − E[score]
    scores = reduce("Concat", "scores", control, "reduce.text.0", axis=1)  # (M, 4 + K): lower ids first on ties
    shape = reduce("Shape", "control_shape", control)
    control_ids = reduce("Expand", "control_ids", g.constant("control_ids", np.arange(n)[None]), shape)
    ids = reduce("Concat", "ids", control_ids, text_ids, axis=1)
    reduce("TopK", "all", scores, k, outputs=2, axis=-1)
    g.op("Cast", "ids", reduce("GatherElements", "chosen", ids, "reduce.all.1", axis=1), to=TensorProto.INT32)
    g.op("Sub", "logp", "reduce.all.0", lse)
