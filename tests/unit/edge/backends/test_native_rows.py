"""Blocks by the compiled library: the scores of ONNX Runtime, and texts that depend on nothing beside their request."""

import threading
from collections.abc import Sequence
from ctypes import addressof
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edge.backends import native_rows as module
from edge.backends.native_rows import NativeRows
from edge.backends.ort_rows import OrtRows
from edge.decoding.blocks import Law, Rows, RowScores, Slot, Writing, advance, draw_rows
from edge.decoding.philox import block_noise
from edge.decoding.types import Floats
from edge.native.initializers import initializers
from edge.native.network import read_drafter
from shared.manifest import read_manifest
from shared.messages import MAX_SEGMENTS
from shared.tokens import EOS, FIRST_TEXT_ID
from tests.support.altered_bundle import with_graph
from tests.support.compiled import NEEDS_LIBRARY, SHIPPED, libraries, native_rows, one_pass, text_rows, writings

pytestmark = NEEDS_LIBRARY


@pytest.fixture(scope="module")
def shipped() -> NativeRows:
    return native_rows(SHIPPED)


@pytest.fixture(scope="module")
def runtime() -> OrtRows:
    return OrtRows(SHIPPED, read_manifest(SHIPPED), 1)


@pytest.fixture(scope="module")
def often_ends(int8_blocks_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> NativeRows:
    """An untrained network that draws and drafts an EOS often."""

    def change(model: onnx.ModelProto) -> None:
        bias = next(one for one in model.graph.initializer if one.name == "head.bias")
        values = onnx.numpy_helper.to_array(bias).copy()
        values[EOS] += 4.0
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))

    folder = tmp_path_factory.mktemp("bundles")
    with_graph(int8_blocks_bundle, folder / "step", "step", change)
    return native_rows(with_graph(folder / "step", folder / "both", "draft", change))


def distance(made: Floats, wanted: Floats) -> float:
    """Of rows that are equal but for what they are computed with, relative to the largest."""
    return float(np.abs(made - wanted).max() / np.abs(wanted).max())


SIZES = (5, 1, 4, 4, 2, 16, 1, 3)
"""Rows of the passes of a text."""


def test_rows_of_the_library_score_as_those_of_onnx_runtime(shipped: NativeRows, runtime: OrtRows) -> None:
    """Sums of float32 differ in their last bits. Seldom one lies so near a step of the quantization that this takes it
    to the next one: what follows is then a step apart, too.
    """
    rng, close, passes = np.random.default_rng(1), 0, 0
    for _ in range(8):
        text = rng.integers(FIRST_TEXT_ID, 4096, sum(SIZES)).astype(np.int32)
        slots, at = [shipped.open_slot(), runtime.open_slot()], 0
        for size in SIZES:
            tokens, places = text[at : at + size], np.arange(at, at + size, dtype=np.int32)
            made, wanted = (
                rows.rows(slot, tokens, positions=places, scored=min(4, size))
                for rows, slot in zip((shipped, runtime), slots, strict=True)
            )
            far = max(distance(made.scores, wanted.scores), distance(made.states, wanted.states))
            assert far < 0.05
            close, passes, at = close + (far < 1e-4), passes + 1, at + size
            for slot in slots:
                slot.cached = at
        assert slots[0].positions.tolist() == slots[1].positions.tolist()
        for name, wanted_cache in slots[1].memory.cache.items():
            cache = slots[0].memory.cache[name]
            apart = np.abs(cache - wanted_cache).max((0, 1, 3))
            assert apart.max() < 0.05 * np.abs(wanted_cache).max() and np.median(apart[:at]) < 1e-5
            assert not cache[:, :, at:].any()
    assert close >= 0.75 * passes


def test_rows_of_the_library_are_drafted_from_as_by_onnx_runtime(shipped: NativeRows, runtime: OrtRows) -> None:
    rng, slots, same = np.random.default_rng(2), (shipped.open_slot(), runtime.open_slot()), 0
    rows = text_rows(rng, shipped, 40, 40)
    states = runtime.rows(slots[1], rows.tokens, positions=rows.positions, scored=40).states.copy()
    for number in range(200):
        noise = block_noise(number, np.arange(3, dtype=np.uint32), 4096)
        law = Law(0, (0.0, 0.8, 1.3)[number % 3], 1 if number % 7 == 0 else 64, 1.0, 3)
        token, state = int(rng.integers(4096)), states[number % 40] + rng.normal(0, 0.3, 256).astype(np.float32)
        made, wanted = (
            rows.draft(slot, state, token=token, noise=noise, law=law).tolist()
            for rows, slot in zip((shipped, runtime), slots, strict=True)
        )
        same += made == wanted
    assert same >= 198


def drafts_of(rows: NativeRows, constants: dict[str, Any]) -> list[int]:
    """Of forty states, by another drafter than the bundle's."""
    model, made, drafts = rows._manifest.model, np.empty(3, np.int32), list[int]()
    drafter, alive = read_drafter(constants, model, 3)
    for seed in range(40):
        state = np.random.default_rng(seed).normal(size=model.d_model).astype(np.float32)
        noise = block_noise(seed, np.arange(3, dtype=np.uint32), model.vocab_size)
        rows._library.draft(
            addressof(drafter), state.ctypes.data, seed, noise.ctypes.data, model.vocab_size, 0.8, made.ctypes.data,
            rows._space(1, rows._widest[1]),
        )  # fmt: skip
        drafts += made.tolist()
    assert alive
    return drafts


def test_rows_drafter_with_a_hidden_layer_narrower_than_the_network(shipped: NativeRows) -> None:
    """It drafts as a wide one whose other units do nothing."""
    wide = initializers((SHIPPED / "draft.cpu.int8.onnx").read_bytes())
    narrow, hidden = dict(wide), 8
    for name, array in wide.items():
        axis = {"known.int8": 1, "known.scale": 0, "up.int8": 1, "up.scale": 0, "up.zero": 0, "down.int8": 0}.get(
            name.partition("depths.")[2][2:]
        )
        if axis is not None:
            kept = np.arange(array.shape[axis]) < hidden
            narrow[name] = array.compress(kept, axis)
            if array.dtype == np.int8:
                wide[name] = array * np.expand_dims(kept, 1 - axis if array.ndim == 2 else ()).astype(np.int8)
    assert drafts_of(shipped, narrow) == drafts_of(shipped, wide)


def test_rows_alone_among_sixteen_and_beside_others_score_the_same_to_the_bit(shipped: NativeRows) -> None:
    rng = np.random.default_rng(3)
    asked = [text_rows(rng, shipped, count, scored) for count, scored in ((48, 48), (7, 2), (1, 1), (130, 4))]
    at_once = [[array.copy() for array in made] for made in one_pass(shipped, asked)]
    for rows, (scores, states) in zip(asked, at_once, strict=True):
        for size in (1, 3, 16):
            slot, made = shipped.open_slot(), list[RowScores]()
            for start in range(0, rows.tokens.size, size):
                part = slice(start, start + size)
                tokens = rows.tokens[part]
                got = shipped.rows(slot, tokens, positions=rows.positions[part], scored=tokens.size)
                made.append(RowScores(got.scores.copy(), got.states.copy()))
                slot.cached += tokens.size
            assert np.array_equal(np.concatenate([m.scores for m in made])[-rows.scored :], scores)
            assert np.array_equal(np.concatenate([m.states for m in made])[-rows.scored :], states)
            for name, cache in slot.memory.cache.items():
                assert np.array_equal(cache, rows.slot.memory.cache[name])


def bits_of(rows: NativeRows) -> list[bytes]:
    """Of passes, drafts and whole texts."""
    rng = np.random.default_rng(4)
    asked = [text_rows(rng, rows, count, scored) for count, scored in ((33, 4), (1, 1), (6, 6))]
    made = [array.tobytes() for scored in one_pass(rows, asked) for array in scored]
    made += [cache.tobytes() for one in asked for cache in one.slot.memory.cache.values()]
    state = asked[0].slot.memory.states[0]
    for seed in range(20):
        noise = block_noise(seed, np.arange(3, dtype=np.uint32), rows._widths["scores"])
        made.append(rows.draft(rows.open_slot(), state, token=9, noise=noise, law=Law(0, 0.8, 64, 1.0, 3)).tobytes())
    asked_for = list(writings(rows, seeds=range(8)))
    slots = [w.slot for w in asked_for if w.slot is not None]
    for slot in slots:
        slot.memory.scores.fill(0)  # of drafts that a request has not
    decode(rows, asked_for, together=4)
    return made + [w.canvas.tobytes() + s.memory.scores.tobytes() for w, s in zip(asked_for, slots, strict=True)]


def test_rows_have_the_same_bits_with_each_set_of_instructions() -> None:
    sets = [found.instructions for found in libraries()]
    if len(sets) < 2:
        pytest.skip(f"this processor has {sets} alone")
    first, *others = (bits_of(native_rows(SHIPPED, name)) for name in sets)
    assert all(other == first for other in others)


def decode(rows: NativeRows, asked: Sequence[Writing], together: int) -> None:
    """together: requests of a pass; 0: by `edge.decoding.blocks.advance`. Their places in a pass change."""
    passes = 0
    while left := [w for w in asked if not w.done]:
        passes += 1
        start = passes % len(left)
        batch = (left[start:] + left[:start])[: max(1, together)]
        if together:
            rows.advance(batch)
        else:
            advance(rows, batch[0])


def written(w: Writing) -> tuple[list[int], int, list[int], list[int], int]:
    assert w.slot is not None
    return w.canvas.tolist(), w.passes, w.tried, w.kept, w.slot.cached


@pytest.mark.parametrize("which", ["often_ends", "shipped"])
def test_rows_advance_as_requests_by_themselves(which: str, request: pytest.FixtureRequest) -> None:
    """Of every law, with prompts and gaps, up to the end of the canvas: tokens, passes and drafts are the same."""
    rows: NativeRows = request.getfixturevalue(which)
    seeds = range(30) if which == "often_ends" else range(12)
    one_by_one = list(writings(rows, seeds=seeds))
    decode(rows, one_by_one, together=0)
    for together in (1, 3, 4):
        asked = list(writings(rows, seeds=seeds))
        decode(rows, asked, together=together)
        assert [written(w) for w in asked] == [written(w) for w in one_by_one]
    ends = sum(EOS in w.canvas for w in one_by_one)
    assert which == "shipped" or ends > 12, "a network that seldom ends tests no ends"


def test_rows_write_the_same_texts_with_and_without_drafts(often_ends: NativeRows) -> None:
    texts = list[list[list[int]]]()
    for window in (3, 2, 1, 0):
        asked = list(writings(often_ends, seeds=range(24)))
        for w in asked:
            w.law = replace(w.law, window=window)
            w.tried, w.kept = [0] * (window + 1), [0] * (window + 1)
        decode(often_ends, asked, together=4)
        texts.append([w.canvas.tolist() for w in asked])
        assert window == 0 or sum(sum(w.kept[1:]) for w in asked) > 0
    assert all(made == texts[0] for made in texts)


def test_rows_of_other_slots_and_seeds_leave_nothing_behind(often_ends: NativeRows) -> None:
    """A slot that was used before writes as a new one: its noise is of another seed."""
    (first, again), (fresh,) = writings(often_ends, seeds=[6, 9]), writings(often_ends, seeds=[9])
    decode(often_ends, [first], together=1)
    assert first.slot is not None
    again.slot, first.slot.cached = first.slot, 0
    decode(often_ends, [again], together=1)
    decode(often_ends, [fresh], together=1)
    assert written(again) == written(fresh)


def test_rows_in_several_threads_write_as_in_one(often_ends: NativeRows) -> None:
    alone = list(writings(often_ends, seeds=range(16)))
    decode(often_ends, alone, together=4)
    apart = list(writings(often_ends, seeds=range(16)))
    threads = [threading.Thread(target=decode, args=(often_ends, apart[i::4], 4)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [written(w) for w in apart] == [written(w) for w in alone]


def test_rows_without_a_place_are_refused_before_they_are_computed(often_ends: NativeRows) -> None:
    """The library writes where it is told to."""
    rng, capacity = np.random.default_rng(5), often_ends.capacity
    good = text_rows(rng, often_ends, 4, 2)
    bad = [good._replace(scored=0), good._replace(scored=5), good._replace(positions=good.positions[:3])]
    for outside in (-1, 512, 2**31 - 1, -(2**31)):
        bad.append(good._replace(tokens=np.array([9, 9, 9, outside], np.int32)))
    for outside in (-1, capacity - MAX_SEGMENTS):
        bad.append(good._replace(positions=np.array([0, 1, 2, outside], np.int32)))
    full = Slot(good.slot.positions, good.slot.memory, cached=capacity - 3)
    bad.append(good._replace(slot=full))
    for rows in bad:
        with pytest.raises(IndexError):
            often_ends.rows(rows.slot, rows.tokens, positions=rows.positions, scored=rows.scored)
    full.cached -= 1
    often_ends.rows(full, good.tokens, positions=good.positions, scored=2)
    long = Rows(often_ends.open_slot(), np.full(capacity + 1, 9, np.int32), np.zeros(capacity + 1, np.int32), 1)
    with pytest.raises(IndexError):
        often_ends.rows(long.slot, long.tokens, positions=long.positions, scored=1)


def test_rows_whose_scores_are_no_numbers_fail_and_are_as_before(int8_blocks_bundle: Path, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        bias = next(one for one in model.graph.initializer if one.name == "head.bias")
        values = np.full_like(onnx.numpy_helper.to_array(bias), np.nan)
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))

    rows = native_rows(with_graph(int8_blocks_bundle, tmp_path / "b", "step", change))
    asked = list(writings(rows, seeds=range(8)))
    before = [(w.canvas.tolist(), w.passes) for w in asked]
    with pytest.raises(RuntimeError, match="not numbers"):
        rows.advance(asked)
    assert [(w.canvas.tolist(), w.passes) for w in asked] == before


def test_rows_of_a_draw_that_fails_leave_the_others_of_their_pass_as_before(
    often_ends: NativeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are then decoded again, each alone: one that had ended by then could not be."""
    seeds = [0, 1, 8, 2]  # the last one's draws have to be filtered
    asked = list(writings(often_ends, seeds=seeds))

    def failing(w: Writing, scores: Floats) -> list[int]:
        if w is asked[-1]:
            raise RuntimeError("scores that are not numbers")
        return draw_rows(w, scores)

    monkeypatch.setattr(module, "draw_rows", failing)
    with pytest.raises(RuntimeError, match="not numbers"):
        for _ in range(50):
            before = [(w.canvas.tolist(), w.passes, w.done) for w in asked]
            often_ends.advance([w for w in asked if not w.done])
    assert [(w.canvas.tolist(), w.passes, w.done) for w in asked] == before
    monkeypatch.undo()
    decode(often_ends, asked, together=1)
    fresh = list(writings(often_ends, seeds=seeds))
    decode(often_ends, fresh, together=4)
    assert [written(w) for w in asked] == [written(w) for w in fresh]
