"""The step graph as ONNX, written node by node: what the runtimes see is what stands here.

Rejected: torch.onnx.export, whose graph changes with every release, and hides LayerNorm and attention from the
runtimes' fusions. A parity test holds this graph to `host.model`.
B: batch, L: length, D: width, V: vocabulary, M: masked positions of the whole batch, K: candidates.
"""

from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from host.model import Denoiser
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, MASK, PAD

NEVER = -1e4
"""Finite, so that FP16 holds it and no row of a softmax turns into NaN."""

Float = Literal["float32", "float16"]
AttentionKind = Literal["plain", "mixed", "whole"]
"""plain: standard operators. mixed: ONNX Runtime's MultiHeadAttention behind a QKV product. whole: its Attention."""
_ONNX_TYPE = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int32": TensorProto.INT32}


class GraphBuilder:
    """Collects nodes and constants; every method returns the name of the value it made."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """A named initializer; made once."""
        self.constants.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def op(self, kind: str, name: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> str:
        """Append a node; its outputs are `name`, or `name.0`, `name.1` … when there are several (returns `name`)."""
        names = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, domain=domain, **attributes))
        return name

    def model(self, name: str, inputs: list[Any], outputs: list[Any], opset: int, contrib: bool) -> onnx.ModelProto:
        """The finished, checked model."""
        graph = helper.make_graph(self.nodes, name, inputs, outputs, list(self.constants.values()))
        opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid("com.microsoft", 1)] if contrib else [])
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="diffusion-llm")
        onnx.checker.check_model(model)
        return model


def step_graph(
    model: Denoiser,
    target: Literal["cpu", "cuda"],
    top_k: int,
    whole_attention: bool = True,
    fp32_norms: bool = False,
) -> onnx.ModelProto:
    """The per-step graph of a trained network.

    canvas int32 (B, L), t float32 (B,) if timed →
    cpu (float32): ids int32 (M, K), logp float32 (M, K) over the full vocabulary, entropy float32 (M,); the masked
    positions row after row, because nobody reads the others and the head is a good part of a small network
    cuda (float16, opset 20 for TensorRT 10.3): logits float16 (B, L, V), since engines want fixed shapes

    whole_attention: on the CPU, ONNX Runtime's own Attention operator takes in the QKV product; False leaves that
    product a MatMul, which static quantization needs.
    fp32_norms: on CUDA, compute LayerNorm in float32, should a device's FP16 kernel prove too coarse.
    """
    g = GraphBuilder()
    dtype: Float = "float32" if target == "cpu" else "float16"
    inputs = [helper.make_tensor_value_info("canvas", TensorProto.INT32, ["batch", "length"])]
    if model.config.time_input:
        inputs.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, ["batch"]))
    weights = {n: p.detach().cpu() for n, p in model.named_parameters()}
    if target == "cpu":
        x = _body(g, model, weights, dtype, "whole" if whole_attention else "mixed", _read_from(g))
        outputs = _reduction(g, weights, x, top_k)
    else:
        outputs = _logits(g, weights, _body(g, model, weights, dtype, "plain", fp32_norms=fp32_norms), dtype)
    infos = [helper.make_tensor_value_info(n, _ONNX_TYPE[kind], shape) for n, kind, shape in outputs]
    return g.model("step", inputs, infos, opset=20, contrib=target == "cpu")


def _body(
    g: GraphBuilder,
    model: Denoiser,
    weights: dict[str, Tensor],
    dtype: Float,
    attention: AttentionKind,
    wanted: str | None = None,
    fp32_norms: bool = False,
) -> str:
    """Embeddings and blocks, through the last LayerNorm.

    wanted: (M, 2) indices of the states to compute; the others end with the last attention.  → (B, L, D), or (M, D)
    """
    config = model.config
    heads, width = config.heads, config.d_model // config.heads

    def weight(name: str, transpose: bool = False) -> str:
        value = weights[name].numpy()
        return g.constant(name, (value.T if transpose else value).astype(dtype))

    def linear(x: str, name: str, out: str) -> str:
        product = g.op("MatMul", f"{out}.matmul", x, weight(f"{name}.weight", transpose=True))
        return g.op("Add", out, product, weight(f"{name}.bias"))

    def norm(x: str, name: str) -> str:
        parts = [f"{name}.weight", f"{name}.bias"]
        if not fp32_norms:
            return g.op("LayerNormalization", f"{name}.out", x, *(weight(part) for part in parts), axis=-1)
        x = g.op("Cast", f"{name}.in32", x, to=TensorProto.FLOAT)
        gains = [g.constant(part, weights[part].numpy()) for part in parts]
        x = g.op("LayerNormalization", f"{name}.out32", x, *gains, axis=-1)
        return g.op("Cast", f"{name}.out", x, to=_ONNX_TYPE[dtype])

    length = g.op("Shape", "length", "canvas", start=1, end=2)
    zero, axis0 = g.constant("zero", np.array([0])), g.constant("axis_0", np.array([0]))
    positions = g.constant("all_positions", np.arange(config.canvas_len, dtype=np.int32))
    position = g.op("Slice", "position", positions, zero, length, axis0)  # (L,)
    attended = _attended(g, position, config.canvas_len)

    embedded = g.op("Gather", "tokens", weight("token_embedding.weight"), "canvas")
    where = g.op("Slice", "places", weight("position_embedding.weight"), zero, length, axis0)
    x = g.op("Add", "embedded", embedded, where)
    if config.time_input:
        x = g.op("Add", "timed", x, _time(g, linear, config.d_model, dtype))
    if attention == "plain":  # scores take a bias of 0 or NEVER, (B, 1, 1, L)
        bias = g.op(
            "Where",
            "bias",
            attended,
            g.constant("allow", np.zeros(1, dtype)),
            g.constant("never", np.full(1, NEVER, dtype)),
        )
        bias = g.op("Unsqueeze", "key_bias", bias, g.constant("axes_1_2", np.array([1, 2])))
    else:
        key_mask = g.op("Cast", "key_mask", attended, to=TensorProto.INT32)
    for i in range(config.layers):
        b = f"blocks.{i}"
        h = norm(x, f"{b}.norm1")
        if attention == "whole":
            mixed = g.op(
                "Attention",
                f"{b}.mixed",
                h,
                weight(f"{b}.qkv.weight", transpose=True),
                weight(f"{b}.qkv.bias"),
                key_mask,
                domain="com.microsoft",
                num_heads=heads,
                mask_filter_value=NEVER,
            )
        elif attention == "mixed":
            g.op("Split", f"{b}.qkv3", linear(h, f"{b}.qkv", f"{b}.qkv.out"), outputs=3, axis=-1, num_outputs=3)
            mixed = g.op(
                "MultiHeadAttention", f"{b}.mixed", f"{b}.qkv3.0", f"{b}.qkv3.1", f"{b}.qkv3.2", "", key_mask,
                domain="com.microsoft", num_heads=heads, mask_filter_value=NEVER,
            )  # fmt: skip
        else:
            mixed = _plain_attention(g, b, linear(h, f"{b}.qkv", f"{b}.qkv.out"), bias, heads, width, dtype)
        if wanted is not None and i == config.layers - 1:
            x, mixed = (g.op("GatherND", f"{n}.wanted", n, wanted) for n in (x, mixed))
        x = g.op("Add", f"{b}.x1", x, linear(mixed, f"{b}.attention_out", f"{b}.attention_out.out"))
        h = linear(norm(x, f"{b}.norm2"), f"{b}.up", f"{b}.up.out")
        h = g.op("Gelu", f"{b}.gelu", h, approximate="tanh")
        x = g.op("Add", f"{b}.x2", x, linear(h, f"{b}.down", f"{b}.down.out"))
    return norm(x, "norm")


def _read_from(g: GraphBuilder) -> str:
    """Indices (row, position) of the states that masked positions are scored from, one before each.  → (M, 2)"""
    is_masked = g.op("Equal", "is_masked", "canvas", g.constant("mask", np.array(MASK, np.int32)))
    g.op("Transpose", "masked", g.op("NonZero", "masked.T", is_masked), perm=[1, 0])
    return g.op("Sub", "read_from", "masked", g.constant("one_before", np.array([0, 1])))


def _attended(g: GraphBuilder, position: str, canvas_len: int) -> str:
    """True up to and with the first visible EOS or PAD; what follows is certain and nothing looks at it.  → (B, L)"""
    ends = g.op("Or", "ends", g.op("Equal", "is_eos", "canvas", g.constant("eos", np.array(EOS, np.int32))),
                g.op("Equal", "is_pad", "canvas", g.constant("pad", np.array(PAD, np.int32))))  # fmt: skip
    where = g.op("Where", "end_positions", ends, position, g.constant("canvas_len", np.array(canvas_len, np.int32)))
    first = g.op("ReduceMin", "first_end", where, g.constant("axis_1", np.array([1])), keepdims=1)
    return g.op("LessOrEqual", "attended", position, first)


def _ends_impossible(g: GraphBuilder) -> str:
    """True left of a visible text token, where neither EOS nor PAD can stand.  → (B, L)"""
    is_text = g.op(
        "GreaterOrEqual", "is_text", "canvas", g.constant("first_text_id", np.array(FIRST_TEXT_ID, np.int32))
    )
    where = g.op("Where", "text_positions", is_text, "position", g.constant("nowhere", np.array(-1, np.int32)))
    last = g.op("ReduceMax", "last_text", where, "axis_1", keepdims=1)
    return g.op("Less", "ends_impossible", "position", last)


def _time(g: GraphBuilder, linear: Any, d_model: int, dtype: Float) -> str:
    """Sinusoids in float32, then the two-layer MLP.  → (B, 1, D)"""
    half = d_model // 2
    frequency = 1000.0 * np.exp(-np.log(10_000.0) * np.arange(half, dtype=np.float32) / half)
    t = g.op("Unsqueeze", "t.column", "t", g.constant("axis_last", np.array([1])))
    phase = g.op("Mul", "t.phase", t, g.constant("t.frequency", frequency.astype(np.float32)[None]))
    waves = g.op("Concat", "t.waves", g.op("Sin", "t.sin", phase), g.op("Cos", "t.cos", phase), axis=1)
    if dtype == "float16":
        waves = g.op("Cast", "t.waves16", waves, to=TensorProto.FLOAT16)
    h = linear(waves, "time_mlp.0", "t.h")
    h = g.op("Mul", "t.silu", h, g.op("Sigmoid", "t.sigmoid", h))
    return g.op("Unsqueeze", "t.out", linear(h, "time_mlp.2", "t.embedded"), "axis_last")


def _plain_attention(g: GraphBuilder, b: str, qkv: str, bias: str, heads: int, width: int, dtype: Float) -> str:
    """Standard ops that TensorRT recognises as multi-head attention; the scale is folded into Q.  → (B, L, D)"""
    split = g.constant("heads_apart", np.array([0, 0, 3, heads, width]))
    apart = g.op("Transpose", f"{b}.apart", g.op("Reshape", f"{b}.split", qkv, split), perm=[2, 0, 3, 1, 4])
    g.op("Split", f"{b}.qkv3", apart, outputs=3, axis=0, num_outputs=3)
    first = g.constant("axis_0", np.array([0]))
    q, k, v = (g.op("Squeeze", f"{b}.{n}", f"{b}.qkv3.{i}", first) for i, n in enumerate("qkv"))  # (B, H, L, D/H)
    q = g.op("Mul", f"{b}.q.scaled", q, g.constant("scale", np.full(1, width**-0.5, dtype)))
    scores = g.op("MatMul", f"{b}.scores", q, g.op("Transpose", f"{b}.kT", k, perm=[0, 1, 3, 2]))
    weights = g.op("Softmax", f"{b}.weights", g.op("Add", f"{b}.masked", scores, bias), axis=-1)
    mixed = g.op("Transpose", f"{b}.together", g.op("MatMul", f"{b}.values", weights, v), perm=[0, 2, 1, 3])
    return g.op("Reshape", f"{b}.mixed", mixed, g.constant("heads_together", np.array([0, 0, heads * width])))


def _logits(
    g: GraphBuilder, weights: dict[str, Tensor], x: str, dtype: Float
) -> list[tuple[str, str, list[str | int]]]:
    """Scores of the whole vocabulary, NEVER where a token cannot stand; position i is read from the state at i − 1."""
    one, axis1 = g.constant("one", np.array([1])), g.constant("axis_1", np.array([1]))
    before = g.op("Slice", "states_before", x, "zero", g.constant("last", np.array([-1])), axis1)
    x = g.op("Concat", "shifted", g.op("Slice", "state_0", x, "zero", one, axis1), before, axis=1)
    bias = weights["head.bias"].numpy().copy()
    bias[[MASK, BOS]] = NEVER
    vocab = bias.size
    forbidden = np.zeros(vocab, dtype)
    forbidden[[EOS, PAD]] = NEVER
    product = g.op(
        "MatMul", "head.matmul", x, g.constant("head.weight", weights["head.weight"].numpy().T.astype(dtype))
    )
    scores = g.op("Add", "head.scores", product, g.constant("head.bias", bias.astype(dtype)))
    where = g.op("Cast", "impossible", _ends_impossible(g), to=_ONNX_TYPE[dtype])
    where = g.op("Unsqueeze", "impossible.column", where, g.constant("axis_2", np.array([2])))
    never = g.op("Mul", "forbidden", where, g.constant("forbidden_ends", forbidden))
    return [(g.op("Add", "logits", scores, never), dtype, ["batch", "length", vocab])]


def _reduction(
    g: GraphBuilder, weights: dict[str, Tensor], x: str, top_k: int
) -> list[tuple[str, str, list[str | int]]]:
    """States (M, D) → the K best ids, their log-probabilities over the full vocabulary, and the entropy; all exact.

    The head is split: control tokens apart from text, so that forbidding EOS and PAD touches four columns
    and copies no (M, V) array, and so that quantization leaves the four in float32.
    """
    head, bias = weights["head.weight"].numpy().T, weights["head.bias"].numpy().copy()
    bias[[MASK, BOS]] = NEVER
    n = FIRST_TEXT_ID
    text = g.op("MatMul", "head.matmul", x, g.constant("head.text.weight", head[:, n:]))
    text = g.op("Add", "head.text", text, g.constant("head.text.bias", bias[n:]))  # (M, V − 4)
    control = g.op("MatMul", "head.control.matmul", x, g.constant("head.control.weight", head[:, :n]))
    control = g.op("Add", "head.control.scores", control, g.constant("head.control.bias", bias[:n]))
    forbidden = np.zeros(n, np.float32)
    forbidden[[EOS, PAD]] = NEVER
    axis1 = g.constant("axis_1", np.array([1]))
    impossible = g.op("GatherND", "impossible", _ends_impossible(g), "masked")  # (M,)
    column = g.op("Unsqueeze", "impossible.column", g.op("Cast", "impossible.float", impossible, to=1), axis1)
    never = g.op("Mul", "forbidden", column, g.constant("forbidden_ends", forbidden))
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
    entropy = g.op("Squeeze", "entropy", reduce("Sub", "entropy", lse, mean), axis1)  # H = log Z − E[score]
    scores = reduce("Concat", "scores", control, "reduce.text.0", axis=1)  # (M, 4 + K): lower ids first on ties
    shape = reduce("Shape", "control_shape", control)
    control_ids = reduce("Expand", "control_ids", g.constant("control_ids", np.arange(n)[None]), shape)
    ids = reduce("Concat", "ids", control_ids, text_ids, axis=1)
    reduce("TopK", "all", scores, k, outputs=2, axis=-1)
    g.op("Cast", "ids", reduce("GatherElements", "chosen", ids, "reduce.all.1", axis=1), to=TensorProto.INT32)
    g.op("Sub", "logp", "reduce.all.0", lse)
    return [
        ("ids", "int32", ["masked", top_k]),
        ("logp", "float32", ["masked", top_k]),
        (entropy, "float32", ["masked"]),
    ]
