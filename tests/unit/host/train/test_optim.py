"""Optimizers, learning rate and moving average do what their definitions say."""

import math

import pytest
import torch

from host.model.network import Denoiser, config_named
from host.train.optim import (
    WEIGHT_DECAY,
    Ema,
    Muon,
    OptimizerName,
    build_optimizers,
    learning_rate_factor,
    orthogonalize,
)

DEBUG = config_named("debug")


def test_learning_rate_rises_linearly_then_falls_by_a_cosine_to_a_tenth() -> None:
    assert learning_rate_factor(0.0, 0.1) == 1e-3
    assert learning_rate_factor(0.05, 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(0.1, 0.1) == pytest.approx(1.0)
    assert learning_rate_factor(0.55, 0.1) == pytest.approx(0.55)  # half of the way down
    assert learning_rate_factor(1.0, 0.1) == pytest.approx(0.1)
    factors = [learning_rate_factor(i / 100, 0.1) for i in range(10, 101)]
    assert factors == sorted(factors, reverse=True)


def test_learning_rate_with_a_cool_down_is_constant_and_ends_at_zero() -> None:
    factors = [learning_rate_factor(done, 0.1, 0.4) for done in (0.05, 0.1, 0.3, 0.6, 0.8, 1.0)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.5, 0.0])


def test_weight_decay_shrinks_the_matrices_of_the_body_alone() -> None:
    """Without a gradient worth the name, whatever is left of a step is decay."""
    model = Denoiser(DEBUG)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in build_optimizers(model, "muon", lr=0.1, weight_decay=0.5):
        optimizer.step()
    for name, p in model.named_parameters():
        kept = 0.95 if name.startswith("blocks.") and p.ndim == 2 else 1.0
        assert torch.allclose(p, kept * before[name], atol=1e-6), name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_build_optimizers_gives_each_parameter_to_one_and_decays_body_matrices(name: OptimizerName) -> None:
    model = Denoiser(DEBUG)
    groups = [group for optimizer in build_optimizers(model, name, lr=1e-3) for group in optimizer.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_orthogonalize_keeps_directions_and_evens_out_sizes(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = torch.diagonal(u.T @ orthogonalize(matrix) @ v.T)  # singular values along the old directions
    assert found[:-1].min() > 0.5 and found.max() < 1.3  # the quintic's known band; the smallest may lag behind
    assert orthogonalize(torch.zeros(shape)).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_muon_ignores_the_size_of_a_gradient(dtype: torch.dtype) -> None:
    """Not in FP16 either, which has no numbers below 6e-8."""
    torch.manual_seed(0)
    matrix = torch.randn(32, 64)
    exact, found = orthogonalize(matrix), orthogonalize(1e-8 * matrix, dtype)
    assert float((found - exact).norm() / exact.norm()) < 0.02


def test_muon_moves_by_the_size_that_adamw_would() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 256))
    before = weight.detach().clone()
    weight.grad = torch.randn(64, 256)
    Muon([weight], lr=0.01).step()
    moved = weight.detach() - before * (1 - 0.01 * WEIGHT_DECAY)
    # 64 singular values of about one, times 0.2·√256: a root mean square of 0.2
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.01 * 0.2, rel=0.2)
    assert float((moved * weight.grad).sum()) < 0


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32)])
def test_muon_in_bf16_is_the_one_of_torch(shape: tuple[int, int]) -> None:
    """Same momentum, same size of update; bf16 rounds differently from call to call."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    exact = torch.nn.Parameter(torch.zeros(shape))
    optimizers = [
        Muon([ours], lr=0.01, dtype=torch.bfloat16),
        torch.optim.Muon([theirs], lr=0.01, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        Muon([exact], lr=0.01),
    ]
    for _ in range(5):
        gradient = torch.randn(shape)
        for weight, optimizer in zip((ours, theirs, exact), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    for other in (theirs, exact):
        assert float((ours - other).detach().norm() / other.detach().norm()) < 0.02


def test_muon_keeps_a_matrix_without_gradient() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    Muon([weight], lr=1.0).step()
    assert torch.equal(weight, torch.ones(4, 4))


def test_ema_follows_quickly_at_first_and_slowly_later() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = Ema(model, decay=0.99)
    torch.nn.init.ones_(model.weight)
    ema.update(model, step=0)
    assert float(ema.shadow["weight"]) == pytest.approx(0.9)  # decay 1/10
    ema.update(model, step=8)
    assert float(ema.shadow["weight"]) == pytest.approx(1 - 0.1 * 9 / 18)
    ema.update(model, step=10**6)
    assert float(ema.shadow["weight"]) == pytest.approx(1 - 0.05 * 0.99)


def test_ema_does_not_share_memory_with_the_model() -> None:
    model = torch.nn.Linear(2, 2)
    ema = Ema(model, decay=0.9)
    before = ema.shadow["weight"].clone()
    with torch.no_grad():
        model.weight.add_(math.pi)
    assert torch.equal(ema.shadow["weight"], before)


def test_orthogonalize_of_several_matrices_is_that_of_each_alone() -> None:
    for shape in [(6, 4), (4, 6), (5, 5)]:
        matrices = torch.randn(3, *shape)
        together = orthogonalize(matrices)
        assert torch.allclose(together, torch.stack([orthogonalize(one) for one in matrices]), atol=1e-6)
