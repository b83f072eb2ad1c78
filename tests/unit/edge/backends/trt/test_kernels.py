"""The two kernels, thread by thread on this processor, against the edge's own loop in numpy."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.backends.trt import kernels
from edge.decoding.canvas import commit, draw
from edge.decoding.types import Row, Sampling
from shared.manifest import Selection
from shared.schedule import time_of_masked_fraction
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, MASK, PAD
from tests.support.emulator import Emulator
from tests.support.emulator.reference import committed, drawn, reduce_logits

pytestmark = pytest.mark.proof("3. the kernels, thread by thread on a CPU, choose numpy's tokens")

TOLERANCE = 1e-5
K = 16
PLAIN = Sampling(seed=3, steps=8, selection="random", temperature=1.0, top_k=K, top_p=1.0)
RULES: dict[str, Sampling] = {
    "random": PLAIN,
    "confidence": replace(PLAIN, selection="confidence"),
    "margin": replace(PLAIN, selection="margin"),
    "entropy": replace(PLAIN, selection="entropy"),
    "argmax": replace(PLAIN, temperature=0.0),
    "argmax by margin": replace(PLAIN, temperature=0.0, selection="margin"),
    "cold": replace(PLAIN, temperature=0.3),
    "next to zero": replace(PLAIN, temperature=1e-38),
    "hot nucleus": replace(PLAIN, temperature=2.0, top_p=0.7),
    "narrow nucleus": replace(PLAIN, top_p=1e-6),
    "few": replace(PLAIN, top_k=3),
    "one": replace(PLAIN, top_k=1, selection="margin"),
    "threshold": replace(PLAIN, steps=64, threshold=0.2),
    "entropy bound": replace(PLAIN, steps=64, entropy_bound=6.0),
    "last pass": replace(PLAIN, steps=1),
}

LOGITS: dict[str, Callable[[np.random.Generator, tuple[int, int]], NDArray[Any]]] = {
    "usual": lambda rng, shape: rng.normal(0, 2, shape),
    "ties": lambda rng, shape: rng.integers(-2, 3, shape),
    "all equal": lambda rng, shape: np.zeros(shape),
    "one-hot": lambda rng, shape: np.where(
        rng.integers(0, shape[1], shape[:1])[:, None] == np.arange(shape[1]), 30, -1e4
    ),
    "mostly −inf": lambda rng, shape: np.where(rng.random(shape) < 0.05, rng.normal(0, 1, shape), -np.inf),
    "huge": lambda rng, shape: rng.choice([6e4, 5.5e4, -6e4, np.inf, -np.inf], shape),
}


def network(kind: str, seed: int, length: int, vocab: int) -> NDArray[np.float16]:
    """Logits (L, V) that forbid MASK and BOS everywhere, and nothing else."""
    logits: NDArray[np.float16] = LOGITS[kind](np.random.default_rng(seed), (length, vocab)).astype(np.float16)
    if np.isfinite(logits).all():
        logits[:, [MASK, BOS]] = -1e4
    return logits


def some_canvas(seed: int, length: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Text here and there, half of the rest open, a part of that nobody's."""
    rng = np.random.default_rng(seed)
    canvas = np.where(rng.random(length) < 0.3, rng.integers(FIRST_TEXT_ID, 30, length), MASK).astype(np.int32)
    canvas[0] = BOS
    fill = (canvas == MASK) & (rng.random(length) < 0.8)
    fill[length // 2] |= canvas[length // 2] == MASK
    return canvas, fill


class Device:
    """One row's buffers, as the backend lays them out."""

    def __init__(self, row: Row) -> None:
        self.canvas = row.canvas[None].copy()
        self.fill = row.fill[None].astype(np.uint8)
        self.rows = np.array([kernels.row_of(row.sampling, row.step)], kernels.ROW)
        self.candidates = np.zeros(self.canvas.shape, kernels.CANDIDATE)
        self.ratios = np.zeros((1, 1024))
        self.ratios[0, : row.sampling.steps - 1] = kernels.ratios(row.sampling.steps)
        self.t = np.ones(1, np.float32)

    def draw(self, emulator: Emulator, logits: NDArray[np.float16], backwards: bool = False) -> NDArray[Any]:
        emulator.draw(logits[None], self.canvas, self.fill, self.rows, self.candidates, backwards)
        candidates: NDArray[Any] = self.candidates[0]
        return candidates

    def commit(self, emulator: Emulator, backwards: bool = False) -> NDArray[np.int32]:
        length = self.canvas.shape[1]
        emulator.commit(self.canvas, self.fill, self.rows, self.ratios, self.candidates, self.t, length, 0, backwards)
        canvas: NDArray[np.int32] = self.canvas[0]
        return canvas


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("rule", RULES)
def test_kernels_commit_the_tokens_of_numpy(emulator: Emulator, rule: str, kind: str) -> None:
    """Where a decision is closer than float32 can tell, either choice is right, and the pass is left out."""
    decided = 0
    for seed in range(12):
        canvas, fill = some_canvas(seed, 24)
        row = Row(canvas, fill, replace(RULES[rule], seed=seed * 2**40 + 5), step=seed % min(4, RULES[rule].steps))
        logits = network(kind, seed, 24, 150)
        scored = reduce_logits(logits, K)
        wanted = drawn(scored, row)
        device = Device(row)
        found = device.draw(emulator, logits)[wanted.position]
        if wanted.margin < TOLERANCE:
            continue
        np.testing.assert_array_equal(found["token"], wanted.token)
        np.testing.assert_allclose(found["confidence"], wanted.confidence, rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(found["entropy"], wanted.entropy, rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(found["margin"], wanted.score, rtol=TOLERANCE, atol=TOLERANCE)
        # What is committed, from the device's own figures: numpy's order and the kernel's must then be one, ties too.
        own = wanted._replace(confidence=found["confidence"].copy(), entropy=found["entropy"].copy())
        logp = scored.logp.copy()
        logp[wanted.position, :2] = _logp_of_margin(found["margin"])
        order, count = committed(scored._replace(logp=logp), row, own)
        commit(row.canvas, wanted.position[order[:count]], wanted.token[order[:count]])
        np.testing.assert_array_equal(device.commit(emulator), row.canvas)
        assert device.rows["step"][0] == row.step + 1
        masked = np.count_nonzero(row.canvas == MASK) / 23
        assert device.t[0] == pytest.approx(time_of_masked_fraction("linear", masked), rel=1e-6, abs=1e-7)
        decided += 1
        if decided == 3:
            return
    pytest.fail(f"only {decided} of 12 passes leave every decision a margin of {TOLERANCE}")


def _logp_of_margin(margin: NDArray[np.float32]) -> NDArray[np.float32]:
    """Two log-probabilities whose probabilities differ by `margin`: its own, and none."""
    with np.errstate(divide="ignore"):
        return np.stack([np.log(margin), np.full_like(margin, -np.inf)], 1)


@pytest.mark.parametrize("vocab", [17, 64, 1000, 8192])
@pytest.mark.parametrize("kind", ["usual", "ties", "all equal", "huge"])
def test_kernels_select_the_best_of_any_vocabulary(emulator: Emulator, vocab: int, kind: str) -> None:
    """Any of the K may be drawn, the last of them too; those beyond never are."""
    length = 3
    logits = network(kind, 1, length, vocab)
    canvas, fill = np.full(length, MASK, np.int32), np.ones(length, bool)
    for top_k in (1, 2, 5, min(60, vocab)):
        row = Row(canvas, fill, replace(PLAIN, top_k=top_k, seed=top_k))
        wanted = drawn(reduce_logits(logits, min(64, vocab)), row)
        if wanted.margin > TOLERANCE:
            np.testing.assert_array_equal(Device(row).draw(emulator, logits)["token"], wanted.token)


def test_kernels_select_the_best_when_all_lie_in_one_thread(emulator: Emulator) -> None:
    """The thread-wise bound is worst there: ids a block's width apart belong to one thread."""
    threads = emulator.call("threads")
    logits = np.zeros((1, 64 * threads), np.float16)
    logits[0, 5::threads] = np.linspace(8, 9, 64)
    row = Row(np.full(1, MASK, np.int32), np.ones(1, bool), replace(PLAIN, top_k=min(threads, 64)))
    for seed in range(10):
        row.sampling = replace(row.sampling, seed=seed)
        scored = reduce_logits(logits, 64)
        token, _ = draw(scored.ids, scored.logp, sampling=row.sampling, step=0, position=np.zeros(1, np.intp))
        assert Device(row).draw(emulator, logits)["token"][0] == token[0]


def test_kernels_threads_may_run_in_any_order(emulator: Emulator) -> None:
    """Forwards and backwards give the same bytes, or a barrier is missing."""
    for seed, (rule, kind) in enumerate([("hot nucleus", "usual"), ("margin", "ties"), ("entropy bound", "usual")]):
        canvas, fill = some_canvas(seed, 40)
        results = []
        for backwards in (False, True):
            device = Device(Row(canvas, fill, RULES[rule]))
            device.draw(emulator, network(kind, seed, 40, 300), backwards)
            device.commit(emulator, backwards)
            results.append(b"".join(a.tobytes() for a in (device.candidates, device.canvas, device.rows, device.t)))
        assert results[0] == results[1]


@pytest.mark.parametrize("rule", ["random", "confidence", "threshold"])
def test_kernels_commit_ends_as_numpy_does(emulator: Emulator, rule: str) -> None:
    """EOS and PAD drawn everywhere: left of text they wait, right of it the canvas closes."""
    closed = 0
    for seed in range(60):
        canvas, fill = some_canvas(seed, 20)
        row = Row(canvas, fill, replace(RULES[rule], seed=seed, steps=3, top_k=8))
        logits = np.random.default_rng(seed).normal(0, 1, (20, 12)).astype(np.float16)
        logits[:, [MASK, BOS]] = -1e4
        logits[:, [EOS, PAD]] += 2
        scored = reduce_logits(logits, 8)
        wanted = drawn(scored, row)
        device = Device(row)
        device.draw(emulator, logits)
        if wanted.margin < TOLERANCE:
            continue
        order, count = committed(scored, row, wanted)
        commit(row.canvas, wanted.position[order[:count]], wanted.token[order[:count]])
        np.testing.assert_array_equal(device.commit(emulator), row.canvas, err_msg=f"seed {seed}")
        closed += int((row.canvas == EOS).any())
    assert closed >= 5


@pytest.mark.parametrize("selection", ["random", "confidence", "margin", "entropy"])
def test_kernels_rows_of_a_batch_are_independent(emulator: Emulator, selection: Selection) -> None:
    rows = []
    for seed in range(3):
        canvas, fill = some_canvas(seed, 16)
        rows.append(Row(canvas, fill, replace(PLAIN, seed=seed, selection=selection, steps=4 + seed)))
    logits = np.stack([network("usual", seed, 16, 90) for seed in range(3)])
    alone = []
    for row, own in zip(rows, logits, strict=True):
        device = Device(row)
        device.draw(emulator, own)
        alone.append(device.commit(emulator))
    together = [Device(row) for row in rows]
    canvas, fill, records, ratios = (
        np.concatenate([getattr(d, name) for d in together]) for name in ("canvas", "fill", "rows", "ratios")
    )
    candidates, t = np.zeros(canvas.shape, kernels.CANDIDATE), np.ones(3, np.float32)
    emulator.draw(logits, canvas, fill, records, candidates)
    emulator.commit(canvas, fill, records, ratios, candidates, t, 16)
    np.testing.assert_array_equal(canvas, np.stack(alone))


def test_kernels_leave_a_row_without_open_positions_alone(emulator: Emulator) -> None:
    """The empty places of a batch, and rows that have finished."""
    canvas = np.array([BOS, 9, MASK, MASK], np.int32)
    device = Device(Row(canvas, np.zeros(4, bool), PLAIN))
    before = [a.tobytes() for a in (device.canvas, device.rows, device.t)]
    device.draw(emulator, network("usual", 0, 4, 50))
    device.commit(emulator)
    assert [a.tobytes() for a in (device.canvas, device.rows, device.t)] == before


def test_kernels_report_a_nan_logit(emulator: Emulator) -> None:
    canvas, fill = some_canvas(0, 12)
    for value, broken in ((np.nan, 1), (np.inf, 0), (-np.inf, 0)):
        device = Device(Row(canvas, fill, PLAIN))
        logits = network("usual", 0, 12, 50)
        logits[np.flatnonzero(fill)[0], 33] = value
        device.draw(emulator, logits)
        assert device.rows["broken"][0] == broken


def test_kernels_row_of_numbers_every_selection_and_rule() -> None:
    header = kernels.source("arithmetic.h")
    for name, sampling in RULES.items():
        rule = kernels.row_of(sampling, 0)[3]
        wanted = "THRESHOLD" if name == "threshold" else "ENTROPY_BOUND" if name == "entropy bound" else None
        assert f"{wanted or sampling.selection.upper()} = {rule}" in header
