"""The kernels of conditions, thread by thread on this processor, against numpy."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.backends.trt import kernels
from tests.support.emulator import Emulator
from tests.unit.edge.backends.trt.test_block_kernels import LAWS, NO_READING, record
from tests.unit.edge.backends.trt.test_kernels import network

pytestmark = pytest.mark.proof(
    "3. the kernels of blocks, thread by thread on a CPU, draw numpy's tokens and torch's drafts"
)


def guided(own: NDArray[np.float16], plain: NDArray[np.float16], *, guidance: float, keep: int) -> NDArray[Any]:
    """Of one row (V,), as `host.export.conditioned_graphs` has it."""
    s, without = own.astype(np.float32), plain.astype(np.float32)
    least = np.sort(s)[-keep]
    made: NDArray[np.float32] = np.where(s >= least, s + np.float32(guidance) * (s - without), np.float32(-1e4))
    with np.errstate(over="ignore"):
        return made.astype(np.float16)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("kind", ["usual", "ties", "all equal", "huge"])
def test_guided_scores_are_those_of_numpy(emulator: Emulator, kind: str, backwards: bool) -> None:
    """Of four places, two of a guided request, one of another request, none in the last."""
    scored, vocab, keep = 3, 150, 20
    rows = [np.clip(network(kind, seed, scored, vocab), -60000, 60000) for seed in range(4)]
    logits: NDArray[Any] = np.stack(rows)
    before = logits.copy()
    writings = np.concatenate([record(LAWS[0], guidance=g, drafts=d) for g, d in ((1.5, 1), (0.0, 2))])
    places = np.array([0, -2, 1, -1], np.int32)
    arguments = (logits, places, writings, scored, vocab, keep, len(places))
    emulator.launch(kernels.GUIDE, (scored, len(places), 1), arguments, backwards)
    for j in range(2):
        wanted = guided(before[0, j], before[1, j], guidance=1.5, keep=keep)
        np.testing.assert_array_equal(logits[0, j], wanted)
    np.testing.assert_array_equal(logits[0, 2], before[0, 2])
    np.testing.assert_array_equal(logits[1:], before[1:])


def test_guided_scores_of_no_number_stay_none(emulator: Emulator) -> None:
    logits = np.stack([network("usual", seed, 1, 90) for seed in range(2)])
    logits[1, 0, 33] = np.nan
    places, writing = np.array([0, -2], np.int32), record(LAWS[0], guidance=1.0)
    emulator.launch(kernels.GUIDE, (1, 2, 1), (logits, places, writing, 1, 90, 20, 2))
    assert np.flatnonzero(np.isnan(logits[0, 0])).tolist() == [33]


def test_encoded_rows_go_to_their_slot_and_to_the_place_that_reads(emulator: Emulator) -> None:
    arrays, slots, capacity, heads, width, first, rows = 4, 3, 8, 2, 3, 2, 5
    encoded = np.arange(arrays * heads * rows * width, dtype=np.uint16).reshape(arrays, heads, rows, width)
    kept = np.full((arrays, slots, heads, capacity, width), 9999, np.uint16)
    read, reading = np.full((arrays, heads, capacity, width), 9999, np.uint16), NO_READING.copy()
    reading["slot"] = 1
    strides = (encoded[0].size, kept[0].size, read[0].size)
    arguments = (reading, encoded, kept, read, first, rows, capacity, heads, width, *strides)
    emulator.launch(kernels.REMEMBER, (arrays, rows, 1), arguments)
    wanted = np.full_like(read, 9999)
    wanted[:, :, first : first + rows] = encoded
    np.testing.assert_array_equal(read, wanted)
    np.testing.assert_array_equal(kept[:, 1], wanted)
    assert (kept[:, [0, 2]] == 9999).all()


def test_rows_of_a_guided_request_are_laid_out_and_appended_twice(emulator: Emulator) -> None:
    slots, rows, capacity, heads, width = 2, 4, 12, 2, 3
    writings = record(LAWS[0], position=9, token=40, cached=5, drafts=1, guidance=1.0)
    writings["draft"][0, 0] = 50
    places, reading = np.array([0, -2], np.int32), np.zeros(4 + 2 * 16, np.int32)
    tokens, positions, sees = (np.full((slots, rows), -7, np.int32) for _ in range(3))
    cached, picked = np.full(slots, -7, np.int32), np.full((slots, 4), -7, np.int32)
    laid_out = (places, writings, reading, tokens, positions, sees, cached, picked, rows, 4, 16, 0)
    emulator.launch(kernels.PREPARE, (slots, 1, 1), laid_out)
    assert tokens[:, :2].tolist() == [[40, 50]] * 2 and positions[:, :2].tolist() == [[9, 10]] * 2
    assert cached.tolist() == [5, 5] and picked.tolist() == [[0, 1, 1, 1], [4, 5, 5, 5]]
    writings["kept"], writings["start"] = 2, 5
    fresh = np.arange(4 * slots * heads * rows * width, dtype=np.uint16).reshape(4, slots, heads, rows, width)
    kept, key_positions = np.full((4, slots, heads, capacity, width), 9999, np.uint16), np.full((2, 12), -7, np.int32)
    numbers = (rows, capacity, heads, width, fresh[0].size, kept[0].size, 0)
    appended = (places, writings, NO_READING, positions, key_positions, fresh, kept, *numbers)
    emulator.launch(kernels.APPEND, (4, rows, slots), appended)
    wanted = np.full_like(kept, 9999)
    wanted[:, :, :, 5:7] = fresh[:, :, :, :2]
    np.testing.assert_array_equal(kept, wanted)
    assert key_positions[:, 5:7].tolist() == [[9, 10]] * 2
