"""Passes of the compiled library that whole texts seldom or never ask for: order of positions, widths, memory."""

from ctypes import addressof
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge.backends.native_rows import PADDING, NativeRows
from edge.backends.ort_rows import OrtRows
from edge.decoding.blocks import Rows
from edge.native import Request
from host.export.__main__ import export_untrained
from host.export.pipeline import Wanted
from host.model.network import CONFIGS
from shared.manifest import SamplingDefaults, read_manifest
from shared.tokens import FIRST_TEXT_ID
from tests.support.compiled import NEEDS_LIBRARY, SHIPPED, libraries, native_rows, one_pass, text_rows

pytestmark = NEEDS_LIBRARY
SETS = [found.instructions for found in libraries()]


@pytest.fixture(scope="module")
def narrow_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three heads, 96 wide: more than 64 inputs, but not a multiple of them."""
    folder = tmp_path_factory.mktemp("bundles") / "narrow"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "narrow", replace(CONFIGS["debug"], name="narrow", d_model=96, heads=3))
        export_untrained("narrow", folder, wanted=Wanted(cpu_int8=True), defaults=SamplingDefaults())
    return folder


def scores_in_passes(rows: NativeRows | OrtRows, tokens: np.ndarray, positions: np.ndarray, size: int) -> np.ndarray:
    """Of all rows, so many in a pass."""
    slot, made = rows.open_slot(), []
    for start in range(0, tokens.size, size):
        part = slice(start, start + size)
        own = tokens[part]
        made.append(rows.rows(slot, own, positions=positions[part], scored=own.size).scores.copy())
        slot.cached += own.size
    return np.concatenate(made)


@pytest.mark.parametrize("order", ["shuffled", "around a gap"])
def test_passes_over_positions_in_any_order_score_as_those_of_onnx_runtime(order: str) -> None:
    """Kept rows behind a gap lie before its rows. Seldom a sum lies so near a step of the quantization that its last
    bits take it to the next one; distances from elsewhere move each row by a thousandth.
    """
    runtime, close = OrtRows(SHIPPED, read_manifest(SHIPPED), 1), 0
    for seed in range(4):
        rng, length = np.random.default_rng(seed), 51
        tokens = rng.integers(FIRST_TEXT_ID, 4096, length).astype(np.int32)
        positions = np.arange(length, dtype=np.int32)
        positions = rng.permutation(positions) if order == "shuffled" else np.roll(positions, -20)
        wanted = scores_in_passes(runtime, tokens, positions, length)
        made = scores_in_passes(native_rows(SHIPPED), tokens, positions, length)
        close += int(np.abs(made - wanted).max() < 3e-4 * np.abs(wanted).max())
        for name in SETS:
            for size in (1, 3, 17):
                assert np.array_equal(scores_in_passes(native_rows(SHIPPED, name), tokens, positions, size), made)
    assert close >= 3


def test_passes_of_a_width_that_tiles_do_not_divide_have_the_same_bits(narrow_bundle: Path) -> None:
    """With each set of instructions, and as of a row alone."""
    rng = np.random.default_rng(8)
    tokens = rng.integers(FIRST_TEXT_ID, 512, 35).astype(np.int32)
    positions = np.arange(35, dtype=np.int32)
    made = [
        scores_in_passes(native_rows(narrow_bundle, name), tokens, positions, size)
        for name in SETS
        for size in (1, 2, 16, 35)
    ]
    assert np.isfinite(made[0]).all() and all(np.array_equal(other, made[0]) for other in made[1:])
    runtime = OrtRows(narrow_bundle, read_manifest(narrow_bundle), 1)
    wanted = scores_in_passes(runtime, tokens, positions, 35)
    assert np.median(np.abs(made[0] - wanted).max(1) / np.abs(wanted).max()) < 0.01


@pytest.mark.parametrize("name", SETS)
def test_passes_write_no_further_than_the_memory_that_they_ask_for(name: str) -> None:
    rows, rng, behind = native_rows(SHIPPED, name), np.random.default_rng(9), 4096
    width, weights = rows._widths["states"], rows.capacity + PADDING
    for count in (1, 2, 15, 16, 17, 33, 200):
        asked: Rows = text_rows(rng, rows, count, min(count, 4))
        (request,) = asked.slot.memory.place(asked)
        needed = rows._library.space(count, width, 4 * width, weights)
        memory = np.full(needed + behind + 64, 0xA5, np.uint8)
        start = -memory.ctypes.data % 64
        requests = (Request * 1)(request)
        rows._library.run(rows._network, addressof(requests), 1, weights, memory.ctypes.data + start)
        assert (memory[start + needed :] == 0xA5).all() and (memory[:start] == 0xA5).all()
        made = asked.slot.memory.scores[: asked.scored].copy()
        (wanted,) = one_pass(rows, [asked])
        assert np.isfinite(made).all() and np.array_equal(made, wanted.scores)


@pytest.mark.slow
def test_passes_of_one_sixteen_and_sixty_four_rows_have_the_same_bits_on_1000_prompts() -> None:
    rows, rng = native_rows(SHIPPED), np.random.default_rng(10)
    for _ in range(1000):
        tokens = rng.integers(FIRST_TEXT_ID, 4096, 64).astype(np.int32)
        positions = np.arange(64, dtype=np.int32)
        alone, among, all_at_once = (scores_in_passes(rows, tokens, positions, size) for size in (1, 16, 64))
        assert np.array_equal(alone, all_at_once) and np.array_equal(among, all_at_once)
