"""Optimizers: AdamW for everything, or Muon for the matrices of the body with AdamW for the rest."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from host.model.network import Denoiser

OptimizerName = Literal["adamw", "muon"]
PEAK_RATES: Final[dict[OptimizerName, float]] = {"adamw": 1e-3, "muon": 4e-3}
"""Default peak learning rates; docs/log.md has the runs that they were chosen from."""
WEIGHT_DECAY = 0.05


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration X ← aX + b(XXᵀ)X + c(XXᵀ)²X towards orthogonal matrices (Jordan et al., Muon, 2024).

    matrices (n, rows, columns) or (rows, columns). Singular values end between 0.7 and 1.2, so bf16 is exact enough.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).reshape(-1, *sorted(matrices.shape[-2:]))
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype)  # scaled first: FP16 underflows
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, scaled to AdamW's update size (arXiv 2502.16982).

    torch.optim.Muon computes in bf16 only, which a CPU without bf16 instructions runs 10 times slower than float32.
    Here dtype is that of the products. compiled: they are, once for each shape.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = WEIGHT_DECAY,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        self.dtype = dtype
        self._orthogonalize = torch.compile(orthogonalize, dynamic=False) if compiled else orthogonalize
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix from its gradient."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, matrices in by_shape.items():  # batched: one small product leaves a GPU idle
                gradients = [p.grad for p in matrices if p.grad is not None]
                averages = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in matrices]
                torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(gradients, averages, group["momentum"])
                updates = self._orthogonalize(torch.stack(nesterov), self.dtype)
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, updates.unbind(), alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def build_optimizers(
    model: Denoiser,
    name: OptimizerName,
    *,
    lr: float,
    weight_decay: float = WEIGHT_DECAY,
    muon_dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> list[torch.optim.Optimizer]:
    """One or two optimizers of all trained parameters; vectors and embeddings take no weight decay."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = ("blocks.", "drafter.", "conditions.")
    body = [p for n, p in trained.items() if n.startswith(matrices) and p.ndim == 2 and "embedding" not in n]
    in_body = {id(p) for p in body}
    others = [p for p in trained.values() if id(p) not in in_body]
    groups: list[dict[str, Any]] = [{"params": others, "weight_decay": 0.0}]
    if name == "adamw":
        groups.append({"params": body, "weight_decay": weight_decay})
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    if name == "adamw":
        return [adamw]
    return [adamw, Muon(body, lr=lr, weight_decay=weight_decay, dtype=muon_dtype, compiled=compiled)]


def learning_rate_factor(progress: float, warmup: float, cool_down: float | None = None) -> float:
    """Factor of the peak rate: linear warmup, then cosine decay to a tenth. progress, warmup: fractions of the run.

    cool_down: constant instead, and linear to zero over this last fraction (warmup-stable-decay).
    """
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    if cool_down is not None:
        return min(1.0, (1 - progress) / cool_down)
    done = min(1.0, (progress - warmup) / (1 - warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


class Ema:
    """Exponential moving average of the weights; its horizon grows with the steps, up to that of `decay`."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update after optimizer step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        names, params = zip(*model.named_parameters(), strict=True)
        torch._foreach_lerp_([self.shadow[name] for name in names], list(params), 1 - decay)
