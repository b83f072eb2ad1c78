"""The training loss is the bound itself, however a batch is cut, shared and computed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import host.model.block
from host.data.shards import Split
from host.model.block import attend
from host.model.diffusion import Weighting, autoregressive_nats, corrupt, token_weight
from host.model.network import RELATIVE_UNIT, Denoiser, config_named, first_relative_bias
from host.train import batches
from host.train.batches import Batch, make_batch, story_indices
from host.train.loss import ChunkedHeadLoss, HeadLoss, WeightedLoss
from host.train.objectives import Settings
from shared.schedule import SCHEDULES, ScheduleName, loss_weight, mask_prob
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, PAD
from tests.support.nelbo import nelbo_sums

ROWS, LENGTH, VOCAB = 12, 40, 64


def stories() -> Split:
    rng = np.random.default_rng(0)
    canvases = np.full((24, LENGTH), PAD, np.uint16)
    for row, end in zip(canvases, rng.integers(2, LENGTH + 5, 24), strict=True):
        row[0] = BOS
        row[1:end] = rng.integers(FIRST_TEXT_ID, VOCAB, min(end, LENGTH) - 1)
        row[end : end + 1] = EOS
    return Split((canvases,))


def network(time_input: bool = True) -> Denoiser:
    torch.manual_seed(1)
    shape = replace(config_named("debug"), vocab_size=VOCAB, canvas_len=LENGTH, time_input=time_input)
    model = Denoiser(shape)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def batch(
    micro_size: int = ROWS,
    objective: str = "canvas",
    schedule: ScheduleName = "linear",
    weighting: Weighting = "nelbo",
    share: tuple[int, int] = (0, 1),
    length_step: int = 1,
) -> Batch:
    return make_batch(
        stories(),
        5,
        seed=3,
        batch_size=ROWS,
        micro_size=micro_size,
        mixture={objective: 1.0},
        settings=Settings(schedule, weighting),
        share=share,
        length_step=length_step,
    )


def loss_and_gradients(
    model: Denoiser, made: Batch, fused: bool, read_out: type[HeadLoss | ChunkedHeadLoss] = HeadLoss
) -> tuple[float, Tensor]:
    """→ summed loss, all gradients in one vector"""
    model.zero_grad()
    losses = [WeightedLoss(model, read_out if fused else None)(part) for part in made.parts]
    for loss in losses:
        loss.backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return sum(float(loss.detach()) for loss in losses), torch.cat(found)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("objective", ["canvas", "ar"])
def test_loss_and_gradients_are_the_same_however_computed(objective: str) -> None:
    """Whole batch at once and in plain torch, against three rows at a time and the fused read-out."""
    model = network(time_input=objective == "canvas")
    plain, gradients = loss_and_gradients(model, batch(objective=objective), fused=False)
    fused, fused_gradients = loss_and_gradients(model, batch(3, objective), fused=True)
    print(f"loss {plain:.6f} and {fused:.6f}, gradients apart by {apart(fused_gradients, gradients):.1e}")
    assert fused == pytest.approx(plain, rel=1e-6)
    assert apart(fused_gradients, gradients) < 1e-5


@pytest.mark.parametrize("objective", ["canvas", "ar"])
def test_loss_does_not_depend_on_where_rows_are_cut(objective: str) -> None:
    """At the longest row of each part, against the next multiple of 8, as CUDA's attention wants it."""
    model = network(time_input=objective == "canvas")
    closest, aligned = (batch(3, objective, length_step=step) for step in (1, 8))
    lengths = [part.rows.tokens.shape[1] for part in aligned.parts]
    assert all(length % 8 == 0 or length == LENGTH for length in lengths)
    assert lengths != [part.rows.tokens.shape[1] for part in closest.parts]
    loss, gradients = loss_and_gradients(model, closest, fused=False)
    same, same_gradients = loss_and_gradients(model, aligned, fused=False)
    print(f"loss {loss:.6f} and {same:.6f}, gradients apart by {apart(same_gradients, gradients):.1e}")
    assert same == pytest.approx(loss, rel=1e-6)
    assert apart(same_gradients, gradients) < 1e-5


@pytest.mark.parametrize("objective", ["canvas", "ar"])
@pytest.mark.parametrize("fused", [False, True])
def test_loss_does_not_depend_on_positions_of_no_weight(objective: str, fused: bool) -> None:
    model = network(time_input=objective == "canvas")
    made = batch(3, objective)
    padded = replace(made, parts=tuple(part.padded(64) for part in made.parts))
    assert [len(part.at) % 64 for part in padded.parts] == [0] * len(made.parts)
    assert [len(part.at) for part in padded.parts] != [len(part.at) for part in made.parts]
    loss, gradients = loss_and_gradients(model, made, fused)
    same, same_gradients = loss_and_gradients(model, padded, fused)
    print(f"loss {loss:.6f} and {same:.6f}, gradients apart by {apart(same_gradients, gradients):.1e}")
    assert same == pytest.approx(loss, rel=1e-6)
    assert apart(same_gradients, gradients) < 1e-5


@pytest.mark.parametrize("schedule", SCHEDULES)
@torch.no_grad()
def test_loss_is_the_nelbo(schedule: ScheduleName) -> None:
    """Against the definition, on the whole batch in the order of the data, uncut."""
    model = network()
    made = batch(3, schedule=schedule)
    by_parts = sum(float(WeightedLoss(model, HeadLoss)(part)) for part in made.parts)
    (one,) = batch(ROWS, schedule=schedule).parts
    assert made.tokens == batch(ROWS).tokens
    noise = np.random.Generator(np.random.Philox(np.random.SeedSequence((3, 1, 5))))
    t = [1.0 - ((u + i / ROWS) % 1.0) for u in [float(noise.random())] for i in range(ROWS)]
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence((3, 0, 2)))).permutation(24)
    x0 = torch.from_numpy(stories().take(order[5 * ROWS % 24 :][:ROWS]).astype(np.int64))
    whole = corrupt(x0, torch.from_numpy(noise.random(x0.shape, dtype=np.float32)), t, schedule)
    expected = nelbo_sums(model, whole, x0=x0, t=t, schedule=schedule).sum()
    assert by_parts == pytest.approx(float(expected), rel=1e-5)
    assert sorted(one.t.tolist()) == pytest.approx(sorted(t))


@torch.no_grad()
def test_loss_of_the_ar_objective_is_the_exact_likelihood() -> None:
    model = network(time_input=False)
    made = make_batch(stories(), 0, seed=3, batch_size=24, micro_size=5, mixture={"ar": 1.0}, settings=Settings())
    by_parts = sum(float(WeightedLoss(model, HeadLoss)(part)) for part in made.parts)
    x0 = torch.from_numpy(stories().take(np.arange(24)).astype(np.int64))
    assert by_parts == pytest.approx(float(autoregressive_nats(model, x0).sum()), rel=1e-5)


def test_batch_is_shared_by_processes_without_remainder_or_change() -> None:
    model = network()
    whole, gradients = loss_and_gradients(model, batch(), fused=True)
    shares = [batch(4, share=(rank, 3)) for rank in range(3)]
    found = [loss_and_gradients(model, share, fused=True) for share in shares]
    assert {share.tokens for share in shares} == {batch().tokens}
    assert sum(loss for loss, _ in found) == pytest.approx(whole, rel=1e-6)
    assert apart(sum((g for _, g in found), torch.zeros(())), gradients) < 1e-5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_flat_weights_count_a_token_once_on_average(schedule: ScheduleName) -> None:
    times = [(i + 0.5) / 1000 for i in range(1000)]
    weights = {token_weight("flat", schedule, t) for t in times}
    assert len(weights) == 1
    assert sum(mask_prob(schedule, t) for t in times) / 1000 * weights.pop() == pytest.approx(1, rel=1e-5)
    assert token_weight("nelbo", schedule, 0.3) == loss_weight(schedule, 0.3)


def test_weighting_reaches_every_masked_token() -> None:
    (flat,), (nelbo,) = batch(weighting="flat").parts, batch(weighting="nelbo").parts
    assert torch.equal(flat.at, nelbo.at)
    assert set(flat.weight.tolist()) == {2.0}
    assert torch.allclose(nelbo.weight, 1 / nelbo.t[nelbo.at // nelbo.rows.tokens.shape[1]])


def test_attend_by_plain_products_is_attention() -> None:
    """In bf16, within its rounding of the float32 result; nothing attends to what is hidden."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 2, 24, 32).unbind()
    hidden = torch.arange(24) >= torch.tensor([5, 24, 17, 1])[:, None, None, None]
    bias = torch.randn(2, 24, 24).bfloat16().float().masked_fill(hidden, -torch.inf)  # (B, H, L, L)
    exact = attend(q, k, v, bias)
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias.bfloat16())
    assert half.dtype is torch.bfloat16
    assert apart(half.float(), exact) < 0.01
    assert torch.equal(half[3, :, 3], v.bfloat16()[3, :, 0])  # one position is attended to: its value


def test_loss_is_the_same_every_time_on_several_threads() -> None:
    """A resumed run repeats the uninterrupted one, on any number of cores."""
    model, made, threads = network(), batch(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        first, *others = (loss_and_gradients(model, made, fused=True)[1] for _ in range(8))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, other) for other in others)


def test_first_relative_bias_has_a_reach_for_each_head() -> None:
    shape = replace(config_named("debug"), heads=4, canvas_len=3)
    bias = RELATIVE_UNIT * first_relative_bias(shape)
    assert torch.allclose(bias, torch.tensor([1.0, 0.25, 1 / 16, 0.0])[:, None] * torch.tensor([-2, -1, 0, -1, -2]))


@pytest.mark.parametrize("objective", ["canvas", "ar"])
def test_bf16_gradients_are_as_exact_as_those_of_the_standard_kernels(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain-product attention and the fused LM head lose no more precision than torch's own bf16 path."""
    model = network(time_input=objective == "canvas")
    made = batch(4, objective)
    exact, gradients = loss_and_gradients(model, made, fused=False)
    with torch.autocast("cpu", torch.bfloat16):
        ours, our_gradients = loss_and_gradients(model, made, fused=True)
        monkeypatch.setattr(
            host.model.block,
            "attend",
            lambda q, k, v, bias: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias),
        )
        standard, standard_gradients = loss_and_gradients(model, made, fused=False)
        chunked, chunked_gradients = loss_and_gradients(model, made, fused=True, read_out=ChunkedHeadLoss)
    assert chunked == pytest.approx(exact, rel=0.01)
    assert apart(chunked_gradients, gradients) < 1.2 * apart(standard_gradients, gradients)
    error, standard_error = apart(our_gradients, gradients), apart(standard_gradients, gradients)
    print(f"gradients apart from float32: {error:.4f}, by the standard kernels {standard_error:.4f}")
    assert ours == pytest.approx(exact, rel=0.01) and standard == pytest.approx(exact, rel=0.01)
    assert error < 1.2 * standard_error < 0.05


@pytest.mark.parametrize("fused", [True, False])
def test_loss_of_a_pass_without_masks_is_zero(fused: bool) -> None:
    """A row alone, at a small t."""
    model = network()
    part = batch(micro_size=1).parts[0]
    nothing = replace(
        part,
        at=part.at[:0],
        target=part.target[:0],
        weight=part.weight[:0],
        ends=part.ends[:0],
    )
    loss, gradients = loss_and_gradients(model, Batch((nothing,), 1), fused)
    assert loss == 0
    assert not gradients.any()


def test_batch_of_fewer_stories_than_processes_leaves_some_without() -> None:
    shares = [
        make_batch(
            stories(),
            5,
            seed=3,
            batch_size=2,
            micro_size=ROWS,
            mixture={"canvas": 1.0},
            settings=Settings(),
            share=(rank, 3),
        )
        for rank in range(3)
    ]
    assert [len(share.parts) for share in shares] == [1, 1, 0]
    assert len({share.tokens for share in shares}) == 1


def test_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two million stories, shuffling takes longer than a step."""
    shuffled: list[tuple[int, ...]] = []

    def generator(*key: int) -> np.random.Generator:
        shuffled.append(key)
        return np.random.default_rng(key)

    monkeypatch.setattr(batches, "_generator", generator)
    seen = np.concatenate([story_indices(987, step, 5, 20) for step in range(8)])
    assert shuffled == [(987, 0, 0), (987, 0, 1)]
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20))
    assert list(seen[:20]) != list(seen[20:])
