"""Attention with the learned relative bias, as training computes it and through FlexAttention: `python -m
tests.gpu.attention` times both on this machine's GPU, forward and backward, compiled, and compares their gradients.

The bias is a tensor of (B, H, N, N) scores now, which the fastest kernels do not take and which is read by every layer.
FlexAttention looks it up by distance, and sums its gradient by atomic additions, which may cost more than is saved: so
it is measured here before it is used.
"""

import statistics
import time
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from host.device import best_device, wait_for
from host.model.block import attend
from host.model.layouts import Rows, causal
from host.model.network import BIAS_FLOOR, RELATIVE_UNIT, Denoiser, ModelConfig, config_named
from shared.errors import ConfigError, run_main

REPEATS: Final = 20
SEQUENCES: Final = 64
Attention = Callable[[Denoiser, Rows, Tensor], Tensor]


def by_tensor(model: Denoiser, rows: Rows, qkv: Tensor) -> Tensor:
    """As the network does.  qkv (3, B, H, N, D/H) → (B, H, N, D/H)"""
    q, k, v = qkv.unbind()
    return attend(q, k, v, model.attention_bias(rows.positions, rows.visible).to(q.dtype))


def by_distance(model: Denoiser, rows: Rows, qkv: Tensor) -> Tensor:
    """The same, the bias looked up in the kernel."""
    q, k, v = qkv.unbind()
    table = (RELATIVE_UNIT * model.relative_bias).clamp(min=BIAS_FLOOR)  # (H, 2·L − 1)
    b, n = rows.tokens.shape
    place, visible = rows.positions.expand(b, n), rows.visible.expand(b, n, n)

    def score(value: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = place[batch, key] - place[batch, query] + model.config.canvas_len - 1
        return torch.where(visible[batch, query, key], value + table[head, distance], -torch.inf)

    mixed = flex_attention(q, k, v, score_mod=score)
    assert isinstance(mixed, Tensor)
    return mixed


def gradients(attention: Attention, model: Denoiser, rows: Rows, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the sum of squares.  → what attention returns, gradient of qkv, gradient of the bias"""
    qkv.grad = model.relative_bias.grad = None
    mixed = attention(model, rows, qkv)
    mixed.float().square().sum().backward()
    assert qkv.grad is not None and model.relative_bias.grad is not None
    return mixed.detach(), qkv.grad, model.relative_bias.grad


def inputs(config: ModelConfig, device: torch.device, batch: int, dtype: torch.dtype) -> tuple[Denoiser, Rows, Tensor]:
    """A network, causal rows of whole canvases, and random queries, keys and values."""
    torch.manual_seed(0)
    model = Denoiser(config).to(device)
    rows = causal(torch.zeros(batch, config.canvas_len, dtype=torch.long, device=device))
    shape = (3, batch, config.heads, config.canvas_len, config.d_model // config.heads)
    return model, rows, torch.randn(shape, device=device, dtype=dtype, requires_grad=True)


def main() -> None:
    """Print a line for each."""
    device = best_device()
    if device.type != "cuda":
        raise ConfigError("torch finds no NVIDIA GPU here")
    model, rows, qkv = inputs(config_named("medium"), device, SEQUENCES, torch.bfloat16)
    made = []
    for attention in (by_tensor, by_distance):
        compiled, times = torch.compile(attention, dynamic=True, fullgraph=True), []
        made.append(gradients(compiled, model, rows, qkv))
        torch.cuda.reset_peak_memory_stats()
        for _ in range(REPEATS):
            wait_for(device)
            started = time.perf_counter()
            gradients(compiled, model, rows, qkv)
            wait_for(device)
            times.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated() / 1e6
        print(
            f"{attention.__name__}: {1e3 * statistics.median(times):.2f} ms forward and backward, {peak:.0f} MB at most"
        )
    for name, a, b in zip(("result", "gradient of qkv", "gradient of the bias"), *made, strict=True):
        print(f"{name}: apart by {float((a - b).norm() / a.norm()):.1e} of its size")


if __name__ == "__main__":
    run_main(main)
