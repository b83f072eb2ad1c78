"""The step graph for CUDA: half precision, for TensorRT from 10.3 on, and held to its rules by `host.export.lint`."""

import numpy as np
import onnx

from host.export.cuda_attention import attention
from host.export.graph_builder import NEVER, ONNX_TYPE, StepBuilder, Value
from host.model.network import Denoiser
from shared.tokens import BOS, EOS, MASK, PAD


def cuda_graph(model: Denoiser, fp32_norms: bool = False) -> onnx.ModelProto:
    """canvas int32 (B, L), t float32 (B,) if timed → logits float16 (B, L, V), since engines want fixed shapes.

    fp32_norms: compute LayerNorm in float32, should a device's FP16 kernel prove too coarse.
    """
    g = StepBuilder(model, "float16", fp32_norms)
    config = model.config
    x = g.embed()
    position = np.arange(config.canvas_len)
    whole = g.weights["relative_bias"][None, :, position - position[:, None] + config.canvas_len - 1]
    bias = g.attention_bias(g.constant("relative_bias", whole.astype(np.float16)))  # (B, H, L, L)
    for i in range(config.layers):
        b = f"blocks.{i}"
        qkv = g.linear(g.norm(x, f"{b}.norm1"), f"{b}.qkv", f"{b}.qkv.out")
        x = g.attention_out(x, attention(g, b, qkv, bias), b)
        x = g.feed_forward(x, b)
    _logits(g, g.norm(x, "norm"))
    inputs: list[Value] = [("canvas", "int32", ("batch", "length")), ("t", "float32", ("batch",))]
    logits: Value = ("logits", "float16", ("batch", "length", config.vocab_size))
    return g.model(inputs[: 1 + config.time_input], [logits], contrib=False)


def _logits(g: StepBuilder, x: str) -> None:
    """Scores of the whole vocabulary, NEVER where a token cannot stand; position i is read from the state at i − 1."""
    one, axis1 = g.constant("one", np.array([1])), g.constant("axis_1", np.array([1]))
    before = g.op("Slice", "states_before", x, "zero", g.constant("last", np.array([-1])), axis1)
    x = g.op("Concat", "shifted", g.op("Slice", "state_0", x, "zero", one, axis1), before, axis=1)
    head, bias = g.weights["head.weight"].T.astype(np.float16), g.weights["head.bias"].copy()
    bias[[MASK, BOS]] = NEVER
    forbidden = np.zeros(bias.size, np.float16)
    forbidden[[EOS, PAD]] = NEVER
    product = g.op("MatMul", "head.matmul", x, g.constant("head.weight", head))
    scores = g.op("Add", "head.scores", product, g.constant("head.bias", bias.astype(np.float16)))
    where = g.op(
        "Cast", "impossible", g.op("Less", "ends_impossible", "position", g.last_text()), to=ONNX_TYPE["float16"]
    )
    column = g.op("Unsqueeze", "impossible.column", where, g.constant("axis_2", np.array([2])))
    g.op("Add", "logits", scores, g.op("Mul", "forbidden", column, g.constant("forbidden_ends", forbidden)))
