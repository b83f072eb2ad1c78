"""The kernels of blocks, thread by thread on this processor, against the loop in numpy and the drafter in torch."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edge.backends.trt import kernels
from edge.decoding.blocks import Law, draw
from edge.decoding.philox import BLOCK_DOMAIN, block_noise
from host.model.drafter import Step
from shared.manifest import MAX_WINDOW
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, MASK, PAD
from tests.support.emulator import Emulator
from tests.unit.edge.backends.trt.test_kernels import network

pytestmark = pytest.mark.proof(
    "3. the kernels of blocks, thread by thread on a CPU, draw numpy's tokens and torch's drafts"
)

NO_READING = np.zeros(1, kernels.READING)
LAWS = [
    Law(7, 1.0, 64, 1.0, 3),
    Law(8, 0.8, 5, 1.0, 3),
    Law(9, 0.0, 64, 1.0, 3),
    Law(10, 1.3, 64, 0.7, 3),
    Law(11, 1e-38, 64, 1.0, 3),
    Law(12, 2.0, 64, 1e-6, 3),
    Law(13, 1.0, 1, 1.0, 3),
]


def record(law: Law, **fields: Any) -> NDArray[Any]:
    """One request's, in its slot.  → (1,)"""
    made = np.zeros(1, kernels.WRITING)
    for name, value in (vars(law) | fields).items():
        made[name] = value
    return made


def test_block_records_have_the_layout_of_numpy(emulator: Emulator) -> None:
    found = np.zeros(20, np.int32)
    emulator.call("writing_layout", found)
    offsets = [field[1] for field in (kernels.WRITING.fields or {}).values()]
    assert found.tolist() == [kernels.WRITING.itemsize, *offsets, kernels.READING.itemsize]


def test_block_constants_are_those_of_python() -> None:
    header = kernels.source("blocks.h")
    assert f"BLOCK_DOMAIN = {BLOCK_DOMAIN} " in header and f"MAX_WINDOW = {MAX_WINDOW} " in header
    for name in ("HIDDEN_LAYER", "STATE_LAYER", "SCORES_LAYER"):
        assert f"{name} = {getattr(kernels, name)}" in header
    units = "".join(map(kernels.source, ("blocks.cu", "unmask.cu", "conditions.cu")))
    names = (kernels.DRAW, kernels.COMMIT, kernels.PREPARE, kernels.DRAW_ROWS, kernels.KEEP, kernels.APPEND)
    for name in (*names, kernels.REMEMBER, kernels.GUIDE):
        assert f" {name}(" in units


@pytest.mark.parametrize("seed", [0, 7, 2**53 - 1])
def test_block_noise_is_that_of_numpy(emulator: Emulator, seed: int) -> None:
    positions, vocab = np.array([0, 1, 255], np.uint32), 1023
    at, token = (a.ravel().astype(np.uint32) for a in np.meshgrid(positions, np.arange(vocab), indexing="ij"))
    noise = np.zeros(at.size, np.float32)
    emulator.call("block_noise", seed, at, token, at.size, noise)
    np.testing.assert_allclose(noise, block_noise(seed, positions, vocab).ravel(), rtol=1e-6, atol=1e-6)


def test_half_precision_is_rounded_as_numpy_rounds(emulator: Emulator) -> None:
    rng = np.random.default_rng(0)
    halves = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(np.float16)
    number = halves[np.isfinite(halves)].astype(np.float32)
    between = (number[:-1] + number[1:]) / 2  # ties go to even
    values = np.concatenate(
        [number, between, rng.normal(0, 1, 10_000), rng.normal(0, 1e-7, 10_000), [1e9, -1e9, 65519]]
    )
    values = values.astype(np.float32)
    half, back = np.zeros(values.size, np.uint16), np.zeros(values.size, np.float32)
    emulator.call("to_halves", values, values.size, half, back)
    with np.errstate(over="ignore"):
        wanted = values.astype(np.float16)
    np.testing.assert_array_equal(half, wanted.view(np.uint16))
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(back[finite], wanted[finite].astype(np.float32))


@pytest.mark.parametrize("kind", ["usual", "ties", "all equal", "one-hot", "huge"])
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_block_draws_are_those_of_the_cpu(emulator: Emulator, law: Law, kind: str) -> None:
    """Where the two best noisy scores, or top-p's bound, are closer than float32 can tell, either choice is right."""
    rows, vocab, first = 4, 150, 17
    decided = 0
    for seed in range(8):
        logits = np.clip(network(kind, seed, rows, vocab), -65504, 65504)
        one = replace(law, seed=law.seed + 2**40 * seed)
        noise = block_noise(one.seed, np.arange(first, first + rows, dtype=np.uint32), vocab)
        scores = logits.astype(np.float32)
        wanted = draw(scores, noise, one)
        near = [draw(scores, noise + sign * jitter, one) for sign in (-1, 1) for jitter in jitters(noise.shape, seed)]
        drawn = np.full((1, rows), -7, np.int32)
        writing = record(one, position=first - 1, drafts=rows - 1)
        emulator.launch(
            kernels.DRAW_ROWS,
            (rows, 1, 1),
            (logits[None], np.zeros(1, np.int32), writing, NO_READING, drawn, rows, vocab, 0),
        )
        assert writing["broken"][0] == 0
        clear = np.all([other == wanted for other in near], axis=0)
        if law.top_p < 1:
            clear &= np.all(
                [draw(scores, noise, replace(one, top_p=law.top_p * f)) == wanted for f in (0.9999, 1.0001)], 0
            )
        np.testing.assert_array_equal(drawn[0][clear], wanted[clear])
        decided += int(clear.sum())
    assert decided >= 16


def jitters(shape: tuple[int, ...], seed: int) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 1e-5, shape).astype(np.float32) for _ in range(3)]


def test_block_draw_reports_a_score_that_is_no_number(emulator: Emulator) -> None:
    logits = network("usual", 0, 2, 90)
    logits[1, 33] = np.nan
    writing, drawn = record(LAWS[0], drafts=1), np.zeros((1, 2), np.int32)
    places = np.zeros(1, np.int32)
    emulator.launch(kernels.DRAW_ROWS, (2, 1, 1), (logits[None], places, writing, NO_READING, drawn, 2, 90, 0))
    assert writing["broken"][0] == 1
    before = writing.copy()
    emulator.launch(kernels.KEEP, (1, 1, 1), (places, writing, NO_READING, drawn, 2, 0))
    assert writing.tobytes() == before.tobytes(), "nothing is kept of such a pass"


@pytest.mark.parametrize(
    ("drafts", "drawn", "agreed", "left"),
    [
        ([], [9], 0, 3),
        ([9, 8, 7], [9, 8, 7, 6], 3, 3),
        ([9, 8, 7], [9, 5, 7, 6], 1, 3),
        ([9, 8, 7], [4, 8, 7, 6], 0, 3),
        ([9, 8, 7], [9, EOS, 7, 6], 1, 0),
    ],
)
def test_block_run_of_drafts_is_kept_up_to_the_first_that_is_not_drawn(
    emulator: Emulator, drafts: list[int], drawn: list[int], agreed: int, left: int
) -> None:
    writing = record(LAWS[0], position=10, last=60, cached=10, drafts=len(drafts))
    writing["draft"][0, : len(drafts)] = drafts
    emulator.call("commit_one", writing, np.array(drawn, np.int32), 1)
    (w,) = writing
    assert (w["agreed"], w["fresh"], w["kept"], w["start"], w["cached"]) == (
        agreed,
        agreed + 1,
        agreed + 1,
        10,
        11 + agreed,
    )
    assert w["text"][: agreed + 1].tolist() == drawn[: agreed + 1]
    assert (w["position"], w["token"], w["drafts"]) == (11 + agreed, drawn[agreed], left)


@pytest.mark.parametrize(("last", "drafts"), [(11, 0), (12, 0), (13, 1), (14, 2), (15, 3), (60, 3)])
def test_block_drafts_leave_the_last_position_of_a_gap_to_the_law(emulator: Emulator, last: int, drafts: int) -> None:
    writing = record(LAWS[0], position=10, last=last)
    emulator.call("commit_one", writing, np.array([9], np.int32), 1)
    assert writing["drafts"][0] == drafts


def test_block_rows_are_laid_out_and_appended_where_their_slot_ends(emulator: Emulator) -> None:
    """Two places of three hold a request; the third costs nothing and touches nothing."""
    slots, rows, scored, capacity, heads, width = 3, 4, 4, 12, 2, 3
    writings = np.concatenate(
        [record(LAWS[0], position=p, token=t, cached=c) for p, t, c in ((9, 40, 5), (0, 0, 7), (3, 41, 2))]
    )
    writings["drafts"] = [2, 0, 0]
    writings["draft"][0, :2] = [50, 51]
    places = np.array([0, -1, 2], np.int32)
    tokens, positions, sees = (np.full((slots, rows), -7, np.int32) for _ in range(3))
    cached, picked = np.full(slots, -7, np.int32), np.full((slots, scored), -7, np.int32)
    reading = np.zeros(4 + 2 * 16, np.int32)
    laid_out = (places, writings, reading, tokens, positions, sees, cached, picked, rows, scored, 16, 0)
    emulator.launch(kernels.PREPARE, (slots, 1, 1), laid_out)
    assert tokens.tolist() == [[40, 50, 51, PAD], [PAD] * 4, [41, PAD, PAD, PAD]]
    assert positions.tolist() == [[9, 10, 11, 0], [0] * 4, [3, 0, 0, 0]]
    assert (sees == [1, 2, 3, 4]).all() and cached.tolist() == [5, 0, 2]
    assert picked.tolist() == [[0, 1, 2, 2], [4, 4, 4, 4], [8, 8, 8, 8]]
    writings["kept"], writings["start"] = [2, 9, 1], [5, 0, 2]
    fresh = np.arange(4 * slots * heads * rows * width, dtype=np.uint16).reshape(4, slots, heads, rows, width)
    kept = np.full((4, slots, heads, capacity, width), 9999, np.uint16)
    key_positions = np.full((slots, capacity), -7, np.int32)
    numbers = (rows, capacity, heads, width, fresh[0].size, kept[0].size, 0)
    appended = (places, writings, NO_READING, positions, key_positions, fresh, kept, *numbers)
    emulator.launch(kernels.APPEND, (4, rows, slots), appended)
    wanted = np.full_like(kept, 9999)
    wanted[:, 0, :, 5:7], wanted[:, 2, :, 2:3] = fresh[:, 0, :, :2], fresh[:, 2, :, :1]
    np.testing.assert_array_equal(kept, wanted)
    assert key_positions[0, 5:7].tolist() == [9, 10] and key_positions[2, 2] == 3
    assert np.count_nonzero(key_positions != -7) == 3


@pytest.mark.parametrize("evidence", [0, 1])
def test_block_reading_rows_are_a_prompt_or_evidence(emulator: Emulator, evidence: int) -> None:
    writings, count, rows = record(LAWS[0], position=2, cached=0), 3, 8
    reading = np.zeros(4 + 2 * 16, np.int32)
    reading[:3], reading[4:7], reading[20:23] = (count, evidence, 1 - evidence), (BOS, 30, 31), (0, 4, 5)
    tokens, positions, sees = (np.zeros((1, rows), np.int32) for _ in range(3))
    cached, picked = np.zeros(1, np.int32), np.zeros((1, 4), np.int32)
    places = np.zeros(1, np.int32)
    arguments = (places, writings, reading, tokens, positions, sees, cached, picked, rows, 4, 16, 1)
    emulator.launch(kernels.PREPARE, (1, 1, 1), arguments)
    assert tokens[0, :4].tolist() == [BOS, 30, 31, PAD] and positions[0, :3].tolist() == [0, 4, 5]
    assert sees[0, :3].tolist() == ([3, 3, 3] if evidence else [1, 2, 3]) and picked.tolist() == [[2] * 4]
    drawn = np.full((1, 4), 77, np.int32)
    emulator.launch(kernels.KEEP, (1, 1, 1), (places, writings, reading, drawn, 4, 1))
    assert (writings["kept"][0], writings["cached"][0], writings["fresh"][0]) == (3, 3, 1 - evidence)


@pytest.mark.parametrize("backwards", [False, True])
@torch.no_grad()
def test_block_drafter_is_that_of_torch(emulator: Emulator, backwards: bool) -> None:
    """A depth of the chain, its weights in half precision: state, scores, and the token of the same noise."""
    torch.manual_seed(0)
    width, hidden, vocab, count = 64, 512, 90, 70
    step, embedding, head = Step(width), torch.randn(vocab, width), torch.nn.Linear(width, vocab)
    for parameter in (*step.parameters(), embedding, *head.parameters()):
        parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).half().float())
    likely = np.arange(FIRST_TEXT_ID, FIRST_TEXT_ID + count, dtype=np.int32)
    states = torch.randn(2, 4, width).half()
    law, position = LAWS[0], 20
    writings = np.concatenate(
        [record(law, position=position, token=t, drafts=3, agreed=a, fresh=1) for t, a in ((7, 2), (8, 0))]
    )
    places = np.array([0, 1], np.int32)

    def half(tensor: torch.Tensor) -> NDArray[Any]:
        return np.ascontiguousarray(tensor.half().numpy())

    norms = half(torch.stack([p for n in (step.norm_state, step.norm_token) for p in (n.weight, n.bias)]))
    state, both = np.zeros((2, width), np.float32), np.zeros((2, 2 * width), np.float32)
    up, scores = np.zeros((2, hidden), np.float32), np.zeros((2, count), np.uint16)
    who = (places, writings)
    arguments = (*who, half(states), half(embedding), norms, state, both, 4, width, 0)
    emulator.launch(kernels.DRAFT_INPUT, (2, 1, 1), arguments, backwards)
    for layer, x, weight, bias, out, inputs, outputs in (
        (kernels.HIDDEN_LAYER, both, step.up.weight.T, step.up.bias, up, 2 * width, hidden),
        (kernels.STATE_LAYER, up, step.down.weight.T, step.down.bias, state, hidden, width),
        (kernels.SCORES_LAYER, state, head.weight[likely].T, head.bias[likely], state, width, count),
    ):
        numbers = (inputs, outputs, layer, 0, 2)
        emulator.launch(
            kernels.DRAFT_LINEAR, (2, 2, 1), (*who, x, half(weight), half(bias), out, scores, *numbers), backwards
        )
    wanted = step(torch.stack([states[0, 2], states[1, 0]]).float(), embedding[[7, 8]])
    np.testing.assert_allclose(state, wanted.numpy(), rtol=1e-4, atol=1e-4)
    found = scores.view(np.float16).astype(np.float32)
    np.testing.assert_allclose(found, head(wanted)[:, likely].numpy(), rtol=2e-3, atol=2e-3)
    emulator.launch(kernels.DRAFT_TOKEN, (2, 1, 1), (*who, scores, likely, count, 0), backwards)
    noise = block_noise(law.seed, np.array([position + 1], np.uint32), vocab)[:, likely]
    assert writings["draft"][:, 0].tolist() == [int(likely[draw(found[r : r + 1], noise, law)[0]]) for r in range(2)]
    assert MASK not in writings["draft"][:, 0]


def test_block_drafts_end_before_an_eos(emulator: Emulator) -> None:
    scores, likely = np.zeros((1, 40), np.float16), np.arange(EOS, EOS + 40, dtype=np.int32)
    scores[0, 0] = 60000
    writing = record(LAWS[0], drafts=3, fresh=1)
    emulator.launch(kernels.DRAFT_TOKEN, (1, 1, 1), (np.zeros(1, np.int32), writing, scores, likely, 40, 1))
    assert writing["drafts"][0] == 1, "the draft before it stays"
