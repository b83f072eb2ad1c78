"""Self-attention as the graphs for CUDA have it, where its keys are the rows themselves."""

import numpy as np

from host.export.graph_builder import StepBuilder


def attention(g: StepBuilder, b: str, qkv: str, bias: str = "") -> str:
    """Standard ops that TensorRT recognises as multi-head attention; the scale is folded into Q. qkv (B, L, 3·D).

    → (B, L, D)
    """
    heads, width = g.config.heads, g.config.d_model // g.config.heads
    split = g.constant("heads_apart", np.array([0, 0, 3, heads, width]))
    apart = g.op("Transpose", f"{b}.apart", g.op("Reshape", f"{b}.split", qkv, split), perm=[2, 0, 3, 1, 4])
    g.op("Split", f"{b}.qkv3", apart, outputs=3, axis=0, num_outputs=3)
    q, k, v = (g.op("Squeeze", f"{b}.{n}", f"{b}.qkv3.{i}", "axis_0") for i, n in enumerate("qkv"))  # (B, H, L, D/H)
    q = g.op("Mul", f"{b}.q.scaled", q, g.constant("scale", np.full(1, width**-0.5, np.float16)))
    scores = g.op("MatMul", f"{b}.scores", q, g.op("Transpose", f"{b}.kT", k, perm=[0, 1, 3, 2]))
    scores = g.op("Add", f"{b}.biased", scores, bias) if bias else scores
    weights = g.op("Softmax", f"{b}.weights", scores, axis=-1)
    mixed = g.op("Transpose", f"{b}.together", g.op("MatMul", f"{b}.values", weights, v), perm=[0, 2, 1, 3])
    return g.op("Reshape", f"{b}.mixed", mixed, g.constant("heads_together", np.array([0, 0, heads * width])))
