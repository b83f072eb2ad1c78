"""The kernels' arithmetic, compiled for this processor, against numpy: bit for bit where it is whole numbers."""

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.backends.trt import kernels
from edge.decoding import canvas as unmask
from edge.decoding.philox import ORDER_DOMAIN, TOKEN_DOMAIN, gumbel, philox, uniform
from shared import tokens
from shared.schedule import SCHEDULES, ScheduleName, reveal_count, time_of_masked_fraction
from tests.support.emulator import Emulator
from tests.support.emulator.reference import reduce_logits
from tests.unit.edge.decoding.test_philox import KNOWN

pytestmark = pytest.mark.proof("3. the kernels' arithmetic is numpy's")

ALL_HALVES = np.arange(65536, dtype=np.uint32).astype(np.uint16)


def softmax(emulator: Emulator, logits: NDArray[np.float16], parts: int = 7) -> tuple[NDArray[np.float32], float]:
    logp, entropy = np.zeros(logits.size, np.float32), np.zeros(1, np.float32)
    emulator.call("softmax_row", logits, logits.size, parts, logp, entropy)
    return logp, float(entropy[0])


def test_kernel_records_have_the_layout_of_numpy(emulator: Emulator) -> None:
    row, candidate = np.zeros(10, np.int32), np.zeros(5, np.int32)
    emulator.call("layout", row, candidate)
    for found, dtype in ((row, kernels.ROW), (candidate, kernels.CANDIDATE)):
        assert found.tolist() == [dtype.itemsize, *(field[1] for field in (dtype.fields or {}).values())]


def test_kernel_constants_are_those_of_python() -> None:
    header, unit = kernels.source("arithmetic.h"), kernels.source("unmask.cu")
    for name in ("PAD", "BOS", "EOS", "MASK", "FIRST_TEXT_ID"):
        assert f" {name} = {getattr(tokens, name)}" in header
    assert f"enum Domain {{ TOKEN_DOMAIN = {TOKEN_DOMAIN}, ORDER_DOMAIN = {ORDER_DOMAIN} }}" in header
    assert f"COLDEST = {unmask.COLDEST:.0e}f" in header
    assert f"#define MAX_LENGTH {kernels.MAX_LENGTH}" in unit
    assert f"enum Schedule {{ {', '.join(f'{s.upper()} = {i}' for i, s in enumerate(SCHEDULES))} }}" in header


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_kernel_philox_known_answers(emulator: Emulator, counter: list[int], key: list[int], expected: str) -> None:
    words = np.zeros(4, np.uint32)
    emulator.call("philox_words", np.array(counter, np.uint32), key[0] | key[1] << 32, 1, words)
    assert " ".join(f"{w:08x}" for w in words) == expected


def test_kernel_philox_of_any_counter_and_key(emulator: Emulator) -> None:
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, (1000, 4), dtype=np.uint32)
    for key in (0, 1, 2**32, 2**63 - 1, 0xDEADBEEF12345678):
        words = np.zeros_like(counters)
        emulator.call("philox_words", counters, key, len(counters), words)
        ours = np.stack(philox(tuple(counters.T), key), 1)
        np.testing.assert_array_equal(words, ours)


@pytest.mark.parametrize("seed", [0, 7, 2**53 - 1, 2**63 - 1])
def test_kernel_draws_are_those_of_numpy(emulator: Emulator, seed: int) -> None:
    n = 50_000
    rng = np.random.default_rng(seed % 1000)
    position, token = (rng.integers(0, high, n, dtype=np.uint32) for high in (1024, 65536))
    u, noise = np.zeros(n, np.float32), np.zeros(n, np.float32)
    for domain in (TOKEN_DOMAIN, ORDER_DOMAIN):
        emulator.call("uniforms", seed, 11, position, token, domain, n, u, noise)
        np.testing.assert_array_equal(u, uniform(seed, 11, position=position, token=token, domain=domain))
    np.testing.assert_allclose(noise, gumbel(seed, 11, position, token), rtol=1e-6, atol=1e-6)


def test_kernel_sort_keys_keep_value_and_order_of_every_float16(emulator: Emulator) -> None:
    order, value = np.zeros(65536, np.uint32), np.zeros(65536, np.float32)
    emulator.call("halves", ALL_HALVES, 65536, order, value)
    exact = ALL_HALVES.view(np.float16).astype(np.float32)
    number = ~np.isnan(exact)
    clipped = np.clip(exact[number], -65504, 65504)
    np.testing.assert_array_equal(value[number], clipped)
    assert order.max() < 65536
    a, b = clipped[:, None][::97], clipped[None, ::101]
    np.testing.assert_array_equal(
        order[number][::97][:, None].astype(int) > order[number][None, ::101].astype(int), a > b
    )
    assert order[0x0000] == order[0x8000]  # 0 and −0 are a tie


ROWS: dict[str, Callable[[np.random.Generator], NDArray[Any]]] = {
    "usual": lambda rng: rng.normal(0, 3, 8192),
    "all equal": lambda rng: np.full(4096, 1.5),
    "ties": lambda rng: rng.integers(-3, 3, 2048),
    "one-hot": lambda rng: np.where(np.arange(4096) == 77, 40.0, -1e4),
    "forbidden ends": lambda rng: np.where(np.arange(2048) < 4, -1e4, rng.normal(0, 2, 2048)),
    "mostly −inf": lambda rng: np.where(np.arange(2048) % 100 == 5, rng.normal(0, 1, 2048), -np.inf),
    "nothing but −inf": lambda rng: np.full(512, -np.inf),
    "huge": lambda rng: rng.choice([6e4, 5.9e4, -6e4, np.inf], 4096),
    "subnormal": lambda rng: rng.normal(0, 1e-7, 4096),
    "two tokens": lambda rng: np.array([0.25, 0.5]),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("parts", [1, 7, 300])
def test_kernel_log_probabilities_and_entropy(emulator: Emulator, name: str, parts: int) -> None:
    """However the row is divided among threads, some of which may get nothing."""
    logits = ROWS[name](np.random.default_rng(3)).astype(np.float16)
    logp, entropy = softmax(emulator, logits, parts)
    exact = reduce_logits(logits[None], logits.size)
    by_id = np.empty(logits.size, np.float32)
    by_id[exact.ids[0]] = exact.logp[0]
    np.testing.assert_allclose(logp, by_id, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, exact.entropy[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 64, 1024])
def test_kernel_unmasking_schedule(emulator: Emulator, steps: int) -> None:
    """Every count on the way, the halves that a last bit would tip among them."""
    table = kernels.ratios(steps)
    assert table.shape == (steps - 1,)
    for step in {*range(min(steps - 1, 40)), *range(max(0, steps - 40), steps - 1)}:
        for masked in range(1, 300):
            assert emulator.call("reveal", masked, float(table[step])) == reveal_count(masked, step, steps)


@pytest.mark.parametrize(("bound", "committed"), [(0.0, 1), (0.09, 1), (0.11, 2), (0.31, 3), (0.59, 3), (0.61, 4)])
def test_kernel_entropy_bound_is_the_sum_less_the_largest(emulator: Emulator, bound: float, committed: int) -> None:
    assert emulator.call("within", np.array([0.1, 0.2, 0.3, 0.4], np.float32), 4, bound) == committed


@pytest.mark.parametrize("schedule", get_args(ScheduleName))
def test_kernel_time_of_the_next_step(emulator: Emulator, schedule: ScheduleName) -> None:
    for positions in (15, 255, 1023):
        for masked in range(positions + 1):
            expected = time_of_masked_fraction(schedule, masked / positions)
            assert emulator.time_at(SCHEDULES.index(schedule), masked, positions) == pytest.approx(expected, rel=3e-7)
