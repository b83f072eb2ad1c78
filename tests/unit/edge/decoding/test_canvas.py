"""The unmasking loop: honest draws, sound canvases, and an end that always comes."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.decoding.canvas import advance, bucket, commit_step, draw, num_to_commit, rank, wanted
from edge.decoding.philox import gumbel
from edge.decoding.types import Ids, Positions, Row, Sampling, StepResult
from shared.manifest import Selection
from shared.schedule import SCHEDULES, ScheduleName, reveal_count, time_of_masked_fraction
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, MASK, PAD
from tests.support.networks import NEVER, Constant, Noise, assert_sound, filled, open_canvas, unmask

PLAIN = Sampling(seed=0, steps=1, selection="random", temperature=1.0, top_k=16, top_p=1.0)
RULES: dict[str, Sampling] = {
    "random": replace(PLAIN, steps=7),
    "confidence": replace(PLAIN, steps=7, selection="confidence"),
    "margin": replace(PLAIN, steps=7, selection="margin"),
    "entropy": replace(PLAIN, steps=7, selection="entropy"),
    "argmax": replace(PLAIN, steps=7, temperature=0.0),
    "threshold": replace(PLAIN, steps=64, threshold=0.3),
    "entropy bound": replace(PLAIN, steps=64, entropy_bound=3.0),
}


# --- one draw --------------------------------------------------------------------------------------------------------

LOGP = np.log(np.array([[0.5, 0.3, 0.15, 0.05]])).astype(np.float32)
IDS = np.array([[8, 4, 9, 5]], np.int32)


def test_temperature_zero_is_argmax() -> None:
    for seed in range(20):
        token, confidence = draw(
            IDS, LOGP, sampling=replace(PLAIN, seed=seed, temperature=0.0), step=0, position=np.array([1])
        )
        assert (token[0], confidence[0]) == (8, LOGP[0, 0])


@pytest.mark.parametrize("temperature", [1e-3, 1e-12, 1e-38, 1e-300])
def test_temperature_close_to_zero_is_argmax(temperature: float) -> None:
    """Scores divided by it must not overflow to −∞ all together: then the lowest id would win, PAD before all."""
    ids = np.array([[8, MASK, PAD, BOS]], np.int32)
    logp = np.array([[-1.0, NEVER, NEVER, NEVER]], np.float32)
    token, _ = draw(ids, logp, sampling=replace(PLAIN, temperature=temperature), step=0, position=np.array([1]))
    assert token[0] == 8


def test_confidence_is_before_temperature() -> None:
    for temperature in (0.5, 1.0, 3.0):
        token, confidence = draw(
            IDS, LOGP, sampling=replace(PLAIN, temperature=temperature), step=0, position=np.array([1])
        )
        assert confidence[0] == LOGP[0, IDS[0].tolist().index(token[0])]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-9, {8}), (0.5, {8}), (0.51, {8, 4}), (0.79, {8, 4}), (0.9, {8, 4, 9}), (1.0, {8, 4, 9, 5})]
)
def test_top_p_keeps_the_first_candidate_that_reaches_it(top_p: float, kept: set[int]) -> None:
    exact = np.log(np.array([[0.5, 0.25, 0.125, 0.125]])).astype(np.float32) if top_p == 0.5 else LOGP
    seen = {
        int(draw(IDS, exact, sampling=replace(PLAIN, seed=s, top_p=top_p), step=0, position=np.array([1]))[0][0])
        for s in range(300)
    }
    assert seen == kept


def test_equal_scores_go_to_the_lower_id() -> None:
    position = np.array([1])
    noise = gumbel(0, 0, position[:, None].astype(np.uint32), IDS.astype(np.uint32))
    token, _ = draw(IDS, -noise, sampling=PLAIN, step=0, position=position)  # every candidate comes to exactly 0
    assert token[0] == 4


@pytest.mark.parametrize("selection", ["confidence", "margin", "entropy"])
def test_equal_positions_go_to_the_lower_one(selection: Selection) -> None:
    five = np.repeat(LOGP, 5, 0)
    sampling = replace(PLAIN, selection=selection)
    order = rank(
        five, np.ones(5, np.float32), confidence=five[:, 0], sampling=sampling, step=0, position=np.arange(3, 8)
    )
    assert order.tolist() == [0, 1, 2, 3, 4]


def test_rank_orders_by_the_selection() -> None:
    """Three positions: the most confident draw, the widest margin and the lowest entropy are three different ones."""
    p = np.array([[0.5, 0.45], [0.48, 0.1], [0.4, 0.3]])
    logp, entropy = np.log(p).astype(np.float32), np.array([1.0, 1.1, 0.9], np.float32)

    def first(sampling: Sampling) -> int:
        return int(rank(logp, entropy, confidence=logp[:, 0], sampling=sampling, step=0, position=np.arange(1, 4))[0])

    assert [first(replace(PLAIN, selection=s)) for s in ("confidence", "margin", "entropy")] == [0, 1, 2]
    assert first(replace(PLAIN, threshold=0.9)) == 0
    assert first(replace(PLAIN, entropy_bound=0.1)) == 2
    assert {first(replace(PLAIN, seed=s)) for s in range(40)} == {0, 1, 2}


def test_num_to_commit_by_threshold_and_in_the_last_step() -> None:
    order, entropy = np.arange(4), np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    confidence = np.log(np.array([0.9, 0.6, 0.5, 0.1])).astype(np.float32)

    def count(sampling: Sampling, step: int = 0) -> int:
        return num_to_commit(
            order, entropy, confidence=confidence, sampling=replace(sampling, steps=64), step=step, left=4
        )

    assert count(replace(PLAIN, threshold=0.55)) == 2
    assert count(replace(PLAIN, threshold=1.0)) == 1
    assert count(replace(PLAIN, threshold=5e-324)) == 4  # nothing in float32
    assert count(replace(PLAIN, threshold=1.0), step=63) == 4


@pytest.mark.parametrize(("bound", "committed"), [(0.0, 1), (0.09, 1), (0.11, 2), (0.31, 3), (0.59, 3), (0.61, 4)])
def test_entropy_bound_is_the_sum_less_the_largest(bound: float, committed: int) -> None:
    """Sets by ascending entropy: {0.1}: 0, {0.1, 0.2}: 0.1, with 0.3: 0.3, with 0.4: 0.6 (EB-sampler, 2505.24857)."""
    entropy = np.array([0.3, 0.1, 0.4, 0.2], np.float32)
    sampling = replace(PLAIN, steps=64, entropy_bound=bound)
    none = np.zeros(4, np.float32)
    order = rank(np.repeat(LOGP, 4, 0), entropy, confidence=none, sampling=sampling, step=0, position=np.arange(1, 5))
    assert num_to_commit(order, entropy, confidence=none, sampling=sampling, step=0, left=4) == committed


# --- the loop --------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw_: st.DrawFn) -> tuple[Noise, NDArray[np.int32], Sampling]:
    length, vocab = draw_(st.integers(2, 24)), draw_(st.integers(8, 14))
    k = draw_(st.integers(2, vocab))
    noise = Noise(vocab, k, draw_(st.integers(0, 999)), draw_(st.sampled_from([0.0, 1.0, 5.0])))
    canvas = open_canvas(length)
    given_text = draw_(st.lists(st.integers(1, length - 1), max_size=4))
    canvas[given_text] = FIRST_TEXT_ID
    adaptive = draw_(st.sampled_from(["no", "threshold", "entropy"]))
    sampling = Sampling(
        seed=draw_(st.integers(0, 2**63 - 1)),
        steps=draw_(st.integers(1, 40)),
        selection=draw_(st.sampled_from(["confidence", "random", "margin", "entropy"])),
        temperature=draw_(st.sampled_from([0.0, 1e-50, 0.7, 1.0, 10.0])),
        top_k=draw_(st.integers(1, k)),
        top_p=draw_(st.sampled_from([1e-6, 0.5, 0.9, 1.0])),
        threshold=draw_(st.floats(0.01, 1)) if adaptive == "threshold" else None,
        entropy_bound=draw_(st.floats(0, 10)) if adaptive == "entropy" else None,
    )
    return noise, canvas, sampling


@given(cases())
@settings(max_examples=250, deadline=None, database=None, derandomize=True)
def test_unmask_ends_in_a_sound_canvas_for_any_request_and_network(
    case: tuple[Noise, NDArray[np.int32], Sampling],
) -> None:
    noise, start, sampling = case
    canvas, left = filled(noise, start, sampling)
    assert_sound(canvas)
    assert (canvas[start != MASK] == start[start != MASK]).all()
    assert len(left) <= sampling.steps + 1  # one more where ends had to wait for text behind them
    assert all(after < before for before, after in zip([start.size, *left], left, strict=False))
    again, _ = filled(noise, start, sampling)
    np.testing.assert_array_equal(again, canvas)


@pytest.mark.parametrize("name", RULES)
def test_unmask_commits_at_least_one_token_a_step_by_every_rule(name: str) -> None:
    for seed in range(20):
        noise = Noise(vocab=12, k=12, seed=seed)
        canvas, left = filled(noise, open_canvas(40), replace(RULES[name], seed=seed))
        assert_sound(canvas)
        assert left[-1] == 0
        assert all(after < before for before, after in zip([39, *left], left, strict=False))


def test_unmask_makes_at_most_one_step_more_than_requested() -> None:
    noise = Noise(vocab=40, k=40, seed=0, spread=0.0)
    for steps in (1, 2, 5, 29, 30, 1000):
        _, left = filled(noise, open_canvas(30), replace(PLAIN, steps=steps, top_k=40))
        assert len(left) <= min(steps + 1, 29)


def test_unmask_end_drawn_left_of_text_waits_for_one_more_step() -> None:
    """One pass draws EOS beside later text; the text stands and the gap it left is filled with text."""
    waited = 0
    for seed in range(40):
        noise = Noise(vocab=8, k=8, seed=seed)
        canvas, left = filled(noise, open_canvas(12), PLAIN)
        assert_sound(canvas)
        assert len(left) <= 2
        waited += len(left) == 2
    assert waited > 10


def test_unmask_leaves_positions_outside_fill_open() -> None:
    canvas = open_canvas(20)
    canvas[6:8] = FIRST_TEXT_ID
    fill = np.zeros(20, bool)
    fill[2:6] = True
    unmask(Noise(12, 12, 0), "linear", Row(canvas, fill, replace(PLAIN, steps=3)))
    assert (canvas[2:6] >= FIRST_TEXT_ID).all()
    assert (canvas[1] == MASK) and (canvas[8:] == MASK).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_unmask_gives_the_network_the_masked_fraction_as_time(schedule: ScheduleName) -> None:
    noise = Noise(vocab=12, k=12, seed=5)
    start = open_canvas(32)
    start[1:5] = FIRST_TEXT_ID
    _, left = filled(noise, start, replace(PLAIN, steps=9), schedule)
    masked = [27, *left[:-1]]
    assert noise.times == pytest.approx([time_of_masked_fraction(schedule, m / 31) for m in masked], rel=1e-6)


@dataclass
class Counting(Noise):
    """Notes how much is to be scored, and how many positions of the canvas it sees."""

    asked: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def score(self, canvas: Ids, t: float, positions: Positions, rows: int = 1) -> StepResult:
        self.asked.append(positions.size)
        self.lengths.append(canvas.size)
        assert (canvas[positions] == MASK).all() and (np.diff(positions) > 0).all()
        return super().score(canvas, t, positions)


@pytest.mark.parametrize("rule", RULES)
def test_scoring_is_asked_for_no_more_than_a_step_can_use(rule: str) -> None:
    for seed in range(5):
        sampling = replace(RULES[rule], seed=seed)
        counting = Counting(40, 16, seed)
        _, left = filled(counting, open_canvas(48), sampling)
        if rule in ("random", "argmax"):  # chance decides: known before the pass, and little
            assert sum(counting.asked) <= 2 * 47
            assert counting.asked[0] == reveal_count(47, 0, sampling.steps)
        else:
            assert counting.asked == [47, *left[:-1]]


def test_scored_canvas_ends_after_the_first_visible_end() -> None:
    """What follows an end is certain, and is not computed."""

    class SureOfAnEnd(Counting):
        def score(self, canvas: Ids, t: float, positions: Positions, rows: int = 1) -> StepResult:
            result = super().score(canvas, t, positions)
            if 9 in positions and not np.isin(canvas, [EOS, PAD]).any():
                at = int(np.flatnonzero(positions == 9)[0])
                result.ids[at, 0], result.logp[at] = EOS, [0.0, *[NEVER] * 11]
            return result

    network = SureOfAnEnd(12, 12, 1)
    canvas, _ = filled(network, open_canvas(32), replace(PLAIN, steps=32, selection="confidence", temperature=0.0))
    assert_sound(canvas)
    assert network.lengths[:2] == [32, 10]
    assert network.lengths == sorted(network.lengths, reverse=True)


def test_bucket_is_the_shortest_that_holds_the_active_positions() -> None:
    assert [bucket(active, (64, 128, 256)) for active in (1, 64, 65, 128, 256)] == [64, 64, 128, 128, 256]


@pytest.mark.parametrize("rule", RULES)
def test_row_keeps_count_of_its_open_and_active_positions(rule: str) -> None:
    """They are counted once a step, when it commits; a scheduler asks for them at every pass of every request."""
    for seed in range(5):
        canvas = open_canvas(40)
        row = Row(canvas, canvas == MASK, replace(RULES[rule], seed=seed))
        while row.left:
            advance(Noise(12, 12, seed), "linear", [row])
            ends = np.flatnonzero((row.canvas == EOS) | (row.canvas == PAD))
            assert row.left == np.count_nonzero(row.fill & (row.canvas == MASK)) == row.open_positions().size
            assert row.active == (ends[0] + 1 if ends.size else 40)


@pytest.mark.parametrize("insists_on", [EOS, PAD, MASK])
def test_unmask_raises_when_no_proposal_can_be_committed(insists_on: int) -> None:
    """It proposes one control token everywhere, left of visible text too."""
    impossible = Constant(np.array([insists_on, FIRST_TEXT_ID], np.int32), np.array([0.0, NEVER], np.float32))
    canvas = open_canvas(16)
    canvas[15] = FIRST_TEXT_ID
    with pytest.raises(RuntimeError, match="nothing can be committed"):
        filled(impossible, canvas, replace(PLAIN, steps=4, top_k=2))


# --- drafts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_open_positions_are_drafted_by_what_was_drawn_or_else_by_the_likeliest(rule: str) -> None:
    """Where chance decides, nobody looks at what stays open."""
    network, canvas = Noise(vocab=40, k=16, seed=5), open_canvas(24)
    row = Row(canvas, canvas == MASK, RULES[rule])
    assert (row.draft == MASK).all()
    seen = 0
    while row.left:
        step, everywhere = row.step, np.flatnonzero(row.canvas == MASK)
        every = network.score(row.canvas[: row.active], 0.5, everywhere)
        expected = np.full_like(row.canvas, MASK)
        if not row.sampling.by_chance:
            drawn, _ = draw(every.ids, every.logp, sampling=row.sampling, step=step, position=everywhere)
            expected[everywhere] = drawn if row.sampling.by_confidence else every.ids[:, 0]
        positions = wanted(row)
        at = np.isin(everywhere, positions)
        commit_step(row, positions, StepResult(every.ids[at], every.logp[at], every.entropy[at]))
        still = row.canvas == MASK
        np.testing.assert_array_equal(row.draft[still], expected[still])
        seen += int(still.sum())
    assert seen > 20
