"""What CUDA compiles, as far as a CPU shows it: one graph for all objectives and steps, with the numbers of eager."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import host.train.loss
from host.data.shards import Split
from host.model.network import Denoiser, config_named
from host.train.batches import ROWS_BUCKET, SCORED_BUCKET, SEQUENCES_BUCKET, MicroBatch, make_batch
from host.train.loss import CHUNKS, ChunkedHeadLoss, WeightedLoss
from host.train.objectives import Settings, parse_mixture
from host.train.optim import Muon, orthogonalize
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, PAD

LENGTH, VOCAB = 136, 64
WARNS_OF_FUNCTIONS = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does
WARNS_OF_ITSELF = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # Inductor, as it loads
MIXTURE: Final = parse_mixture("ar=2,infill,canvas,draft=.5")


@pytest.fixture
def network() -> Denoiser:
    torch.manual_seed(1)
    config = replace(config_named("debug"), layers=1, vocab_size=VOCAB, canvas_len=LENGTH, time_input=False)
    model = Denoiser(config)
    with torch.no_grad():
        model.relative_bias.add_(0.1 * torch.randn_like(model.relative_bias))
    return model


@pytest.fixture
def split() -> Split:
    rng = np.random.default_rng(0)
    canvases = np.full((64, LENGTH), PAD, np.uint16)
    for row, end in zip(canvases, rng.integers(4, LENGTH + 5, 64), strict=True):
        row[0] = BOS
        row[1:end] = rng.integers(FIRST_TEXT_ID, VOCAB, min(end, LENGTH) - 1)
        row[end : end + 1] = EOS
    return Split((canvases,))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def parts(split: Split, step: int, batch_size: int = 12) -> tuple[MicroBatch, ...]:
    batch = make_batch(split, step, seed=3, batch_size=batch_size, micro_size=9, mixture=MIXTURE, settings=Settings())
    return batch.parts


def loss_and_gradients(loss: torch.nn.Module, part: MicroBatch) -> tuple[float, list[torch.Tensor]]:
    loss.zero_grad()
    value = loss(part)
    value.backward()
    return value.item(), [torch.zeros_like(p) if p.grad is None else p.grad for p in loss.parameters()]


def assert_equal_to_eager(compiled: torch.nn.Module, eager: torch.nn.Module, part: MicroBatch) -> None:
    expected, gradients = loss_and_gradients(eager, part)
    found, ours = loss_and_gradients(compiled, part.in_buckets())
    assert found == pytest.approx(expected, rel=1e-5)
    for ours_, gradient in zip(ours, gradients, strict=True):
        assert torch.allclose(ours_, gradient, rtol=1e-4, atol=1e-5 * max(1.0, float(gradient.abs().max())))


def test_buckets_change_shapes_and_neither_loss_nor_gradients(network: Denoiser, split: Split) -> None:
    loss, chunked = WeightedLoss(network), WeightedLoss(network, ChunkedHeadLoss)
    for step in range(4):
        for part in parts(split, step):
            bucketed = part.in_buckets()
            (b, n), scored = bucketed.rows.tokens.shape, len(bucketed.at)
            assert (b % SEQUENCES_BUCKET, n % ROWS_BUCKET, scored % SCORED_BUCKET) == (0, 0, 0)
            assert bucketed.rows.positions.shape == (b, n) and bucketed.rows.visible.shape == (b, n, n)
            assert_equal_to_eager(loss, loss, part)
            assert_equal_to_eager(chunked, loss, part)


class Largest(TorchDispatchMode):
    """numel: of the largest tensor of so many columns that any operation makes."""

    def __init__(self, columns: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.columns, self.numel = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor) and one.shape[-1:] == (self.columns,):
                self.numel = max(self.numel, one.numel())
        return made


@pytest.mark.parametrize("training", [True, False])
def test_chunked_loss_never_has_all_scores(network: Denoiser, split: Split, training: bool) -> None:
    """Of M rows over V tokens an eighth at a time, forward and backward, and in validation."""
    part = parts(split, 0, batch_size=32)[0].in_buckets()
    scores = len(part.at) * (VOCAB + 1)
    network.head = torch.nn.Linear(network.config.d_model, VOCAB + 1)  # no other tensor has so many columns
    for read_out, most in ((ChunkedHeadLoss, scores // CHUNKS), (None, scores)):
        with Largest(VOCAB + 1) as largest, torch.set_grad_enabled(training):
            loss = WeightedLoss(network, read_out)(part)
            if training:
                loss.backward()
        assert largest.numel == most


def shape(part: MicroBatch) -> tuple[object, ...]:
    """All that a compiled graph is guarded by: of every tensor its shape and strides."""
    return tuple((*leaf.shape, *leaf.stride()) for leaf in tree_leaves(list(vars(part).values())) if leaf is not None)


@WARNS_OF_FUNCTIONS
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_loss_is_one_graph_over_200_steps(network: Denoiser, split: Split, fresh_compiler: None) -> None:
    """As Dynamo and AOTAutograd trace it, which decide how many graphs there are; error_on_recompile raises."""
    eager, loss = WeightedLoss(network), WeightedLoss(network, ChunkedHeadLoss)
    loss.compile(dynamic=True, fullgraph=True, backend="aot_eager")
    first = {shape(part.in_buckets()): part for step in range(200) for part in parts(split, step, 6 + step % 13)}
    for part in first.values():
        assert_equal_to_eager(loss, eager, part)
    assert len(first) > 10 and len({part.in_buckets().rows.tokens.shape[1] for part in first.values()}) > 2
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@WARNS_OF_FUNCTIONS
@WARNS_OF_ITSELF
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_loss_of_inductor_has_the_numbers_of_eager(
    network: Denoiser, split: Split, fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.train.loss, "CHUNKS", 2)  # each is compiled by itself
    eager, loss = WeightedLoss(network), WeightedLoss(network, ChunkedHeadLoss)
    loss.compile(dynamic=True, fullgraph=True)
    for step in range(3):
        for part in parts(split, step):
            assert_equal_to_eager(loss, eager, part)
    assert counters["stats"]["unique_graphs"] == 1


@WARNS_OF_ITSELF
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_muon_takes_the_same_step() -> None:
    torch.manual_seed(0)
    start = [torch.randn(16, 16), torch.randn(16, 16), torch.randn(8, 24)]
    found = []
    for compiled in (False, True):
        weights = [torch.nn.Parameter(weight.clone()) for weight in start]
        optimizer = Muon(weights, lr=0.1, compiled=compiled)
        for seed in range(2):
            torch.manual_seed(seed)
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        found.append(weights)
    for plain, ours in zip(*found, strict=True):
        assert torch.allclose(plain, ours, rtol=1e-4, atol=1e-5)
    assert torch.equal(orthogonalize(start[0]), orthogonalize(start[0]))
