"""Requests with words, pictures and guidance by the compiled library: what ONNX Runtime makes of them."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import pytest

from edge.backends import native_rows as module
from edge.backends.native_rows import NativeRows
from edge.backends.ort_rows import OrtRows
from edge.decoding.blocks import Slot, Writing
from edge.decoding.conditions import Condition, Remaining
from edge.decoding.types import Floats
from edge.native.network import NEVER, NotKnownError
from edge.serving.slots import Slots
from host.export.__main__ import export_untrained
from host.export.pipeline import Wanted
from shared.manifest import Role, SamplingDefaults, read_manifest
from shared.tokens import FIRST_TEXT_ID
from tests.support.altered_bundle import with_graph
from tests.support.compiled import CONDITIONS, NEEDS_LIBRARY, libraries, native_rows, writings
from tests.unit.edge.backends.test_native_rows import SIZES, decode, distance, written

pytestmark = NEEDS_LIBRARY

PIXELS: Final = np.random.default_rng(3).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
WORDS: Final = ((496,), (11, 12, 301), (9,))
GIVEN: Final = [
    Condition(words, PIXELS[:pictures], guidance, frozenset({400}))
    for words, pictures in ((WORDS[:1], 0), ((), 1), (WORDS, 3))
    for guidance in (0.0, 1.5)
]
IDS: Final = ["word", "word, guided", "picture", "picture, guided", "both", "both, guided"]
TEXTS: Final = 3


@pytest.fixture(scope="module")
def shipped() -> NativeRows:
    return native_rows(CONDITIONS)


def added(values: dict[str, float], tokens: Sequence[int]) -> Callable[[onnx.ModelProto], None]:
    """To these columns of constants."""

    def change(model: onnx.ModelProto) -> None:
        for constant in model.graph.initializer:
            if constant.name in values:
                array = onnx.numpy_helper.to_array(constant).copy()
                array[list(tokens)] += np.float32(values[constant.name])
                constant.CopyFrom(onnx.numpy_helper.from_array(array, constant.name))

    return change


def in_all(folder: Path, target: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of a bundle whose step graphs are changed."""
    roles: list[Role] = ["step", "step.conditioned", "step.guided"]
    for role in roles:
        folder = with_graph(folder, target / role, role, change)
    return folder


@pytest.fixture(scope="module")
def debug_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two heads, 32 wide each, untrained, whose texts often tell the words."""
    folder = tmp_path_factory.mktemp("bundles")
    wanted = Wanted(cpu_int8=True)
    export_untrained("debug", folder / "b", wanted=wanted, defaults=SamplingDefaults(), conditions=True)
    return in_all(folder / "b", folder, added({"head.bias": 2.5}, [t for word in WORDS for t in word]))


@pytest.fixture(scope="module")
def debug(debug_bundle: Path) -> NativeRows:
    return native_rows(debug_bundle)


def runs(
    rows: OrtRows, condition: Condition, narrowed: Sequence[int] = (), size: int = 0
) -> Iterator[tuple[Floats, Floats]]:
    """Scores and states of the passes of texts. narrowed: words that are told halfway. size: of each pass."""
    rows.load(condition)
    rng, sizes = np.random.default_rng(5), [size] * (sum(SIZES) // size) if size else SIZES
    for _ in range(TEXTS):
        slot, remaining = rows.open_slot(), Remaining(condition)
        rows.encode(slot, condition)
        tokens = rng.integers(FIRST_TEXT_ID, rows._widths["scores"], sum(SIZES)).astype(np.int32)
        for number, count in enumerate(sizes):
            if narrowed and number == len(sizes) // 2:
                remaining.left -= set(narrowed)
                rows.narrow(slot, remaining)
            part = slice(slot.cached, slot.cached + count)
            places = np.arange(part.start, part.stop, dtype=np.int32)
            made = rows.rows(slot, tokens[part], positions=places, scored=count)
            yield made.scores.copy(), made.states.copy()
            slot.cached += count


def assert_alike(made: Iterator[tuple[Floats, Floats]], wanted: Iterator[tuple[Floats, Floats]]) -> None:
    """As `test_rows_of_the_library_score_as_those_of_onnx_runtime` has it. With guidance, of two tokens that score
    nearly the same the one may be kept or the other.
    """
    close = list[bool]()
    for (scores, states), (wanted_scores, wanted_states) in zip(made, wanted, strict=True):
        kept, wanted_kept = scores > NEVER / 2, wanted_scores > NEVER / 2
        both = kept & wanted_kept
        assert np.array_equal(kept.sum(1), wanted_kept.sum(1)) and (both.sum(1) >= 0.9 * kept.sum(1)).all()
        far = max(distance(scores[both], wanted_scores[both]), distance(states, wanted_states))
        assert far < 0.1
        close.append(far < 1e-3 and np.array_equal(kept, wanted_kept))
    assert sum(close) >= 0.6 * len(close)


@pytest.mark.parametrize("condition", GIVEN, ids=IDS)
@pytest.mark.parametrize("which", ["shipped", "debug"])
def test_conditioned_rows_score_as_those_of_onnx_runtime(
    which: str, condition: Condition, request: pytest.FixtureRequest
) -> None:
    rows: NativeRows = request.getfixturevalue(which)
    runtime = OrtRows(rows._folder, rows._manifest, 1)
    told = range(len(condition.words))
    for narrowed in ((), told[:1], told) if condition.words else ((),):
        assert_alike(runs(rows, condition, narrowed), runs(runtime, condition, narrowed))
    assert rows.conditions is not None
    assert {"step.conditioned", "step.guided"}.isdisjoint(role for role, _ in rows.conditions.graphs.sizes())


def test_conditioned_rows_read_a_memory_of_any_size(debug: NativeRows) -> None:
    """One whose scores are more than those of the vocabulary, too."""
    runtime, most = OrtRows(debug._folder, debug._manifest, 1), 0
    for word, pictures in ((1, 0), (2, 0), (3, 1), (4, 1), (6, 0), (7, 0), (8, 80)):
        condition = Condition((tuple(range(9, 9 + word)),), np.repeat(PIXELS[:1], pictures, 0), 1.5 * (pictures > 0))
        assert_alike(runs(debug, condition), runs(runtime, condition))
        slot = debug.open_slot()
        debug.encode(slot, condition)
        most = max(most, slot.memory.conditioned.readings.most)
    assert most > debug._widest[1]


@pytest.mark.parametrize("condition", GIVEN, ids=IDS)
def test_conditioned_rows_of_the_library_alone_score_as_among_others_to_the_bit(
    debug: NativeRows, condition: Condition
) -> None:
    scores, states = (np.concatenate(made) for made in zip(*runs(debug, condition, size=sum(SIZES)), strict=True))
    for size in (1, 2, 4, 9):
        got = [np.concatenate(made) for made in zip(*runs(debug, condition, size=size), strict=True)]
        assert np.array_equal(got[0], scores) and np.array_equal(got[1], states)


def asked_for(rows: NativeRows, seeds: Sequence[int], longest: int = 30) -> list[Writing]:
    """Requests of every law, with prompts and gaps, and conditions of every kind."""
    asked = list(writings(rows, seeds=seeds, longest=longest))
    for seed, w in zip(seeds, asked, strict=True):
        w.condition = GIVEN[seed % 5 if seed % 3 else 5]
        rows.load(w.condition)
    return asked


@pytest.mark.parametrize("which", ["shipped", "debug"])
def test_conditioned_rows_advance_as_those_of_the_loop(which: str, request: pytest.FixtureRequest) -> None:
    rows: NativeRows = request.getfixturevalue(which)
    seeds = range(30 if which == "debug" else 10)
    one_by_one, asked = asked_for(rows, seeds), asked_for(rows, seeds)
    decode(rows, one_by_one, together=0)
    decode(rows, asked, together=1)
    assert [written(w) for w in asked] == [written(w) for w in one_by_one]
    told = [w for w in asked if w.remaining is None or len(w.remaining.left) < len(w.remaining.condition.words)]
    assert which == "shipped" or len(told) >= 5, "requests that tell no word test nothing of it"


def test_conditioned_rows_write_the_same_texts_with_and_without_drafts(debug: NativeRows) -> None:
    texts = list[list[list[int]]]()
    for window in (3, 1, 0):
        asked = asked_for(debug, range(24))
        for w in asked:
            w.law = replace(w.law, window=window)
            w.tried, w.kept = [0] * (window + 1), [0] * (window + 1)
        decode(debug, asked, together=1)
        texts.append([w.canvas.tolist() for w in asked])
        assert window == 0 or sum(sum(w.kept[1:]) for w in asked) > 0
    assert all(made == texts[0] for made in texts)


def test_conditioned_rows_have_the_same_bits_with_each_set_of_instructions() -> None:
    sets = [found.instructions for found in libraries()]
    if len(sets) < 2:
        pytest.skip(f"this processor has {sets} alone")
    made = list[list[bytes]]()
    for name in sets:
        rows = native_rows(CONDITIONS, name)
        made.append([array.tobytes() for given in GIVEN for both in runs(rows, given, [0]) for array in both])
        asked = asked_for(rows, range(5))
        decode(rows, asked, together=1)
        made[-1] += [w.canvas.tobytes() for w in asked]
    assert all(other == made[0] for other in made)


def test_conditioned_rows_leave_nothing_behind_in_a_slot(debug: NativeRows) -> None:
    """It writes plain texts and others as a new one, and plain ones beside others in a pass."""
    slots = Slots(debug, most=1)
    plain, fresh = writings(debug, seeds=[1, 1])
    decode(debug, [fresh], together=1)
    for given in GIVEN:
        (w,), (alone,) = asked_for(debug, [6], 9), asked_for(debug, [6], 9)
        w.condition = alone.condition = given
        w.slot = slots.take()
        decode(debug, [w, alone], together=1)
        assert written(w) == written(alone) and w.slot is not None
        slots.give_back(w.slot)
    (plain,), others = writings(debug, seeds=[1]), list(writings(debug, seeds=[3, 4]))
    plain.slot = slots.take()
    decode(debug, [plain, *others], together=3)
    assert written(plain) == written(fresh)


def test_conditioned_rows_in_several_threads_write_as_in_one(debug_bundle: Path, debug: NativeRows) -> None:
    """Each loads what it needs while others write, some without a condition."""
    alone = asked_for(debug, range(12))
    plain = list(writings(debug, seeds=range(12)))
    decode(debug, [*alone, *plain], together=1)
    rows, made = native_rows(debug_bundle), dict[int, list[Writing]]()

    def write(start: int) -> None:
        made[start] = asked_for(rows, range(start, 12, 3))
        for w, beside in zip(made[start], writings(rows, seeds=range(start, 12, 3)), strict=True):
            decode(rows, [w, beside], together=1)
            made[12 + start] = [*made.get(12 + start, []), beside]

    threads = [threading.Thread(target=write, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for start in range(3):
        assert [written(w) for w in made[start]] == [written(w) for w in alone[start::3]]
        assert [written(w) for w in made[12 + start]] == [written(w) for w in plain[start::3]]


def test_conditioned_rows_whose_scores_are_no_numbers_fail(debug_bundle: Path, tmp_path: Path) -> None:
    """Guidance sorts them, and takes none of them for low ones."""
    no_numbers = added({"head.scale": np.inf, "head.bias": -np.inf}, range(300))
    rows = native_rows(in_all(debug_bundle, tmp_path, no_numbers))
    for condition in GIVEN[:2]:
        (w,) = writings(rows, seeds=[1])
        w.condition = condition
        rows.load(condition)
        with pytest.raises(RuntimeError, match="not numbers"):
            rows.advance([w])
        assert w.passes == 0 and w.slot is not None and w.slot.memory.conditioned is not None


def slot_of(rows: NativeRows, condition: Condition) -> Slot:
    rows.load(condition)
    slot = rows.open_slot()
    rows.encode(slot, condition)
    return slot


@pytest.mark.parametrize("role", ["step.conditioned", "step.guided"])
def test_conditioned_graph_that_is_not_known_is_run_by_onnx_runtime(
    debug_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, role: Role
) -> None:
    """It alone: the other one, and requests without a condition, are run by the library."""
    folder = with_graph(debug_bundle, tmp_path / "b", role, added({"head.bias": 0.5}, [7]))
    rows, runtime = native_rows(folder), OrtRows(folder, read_manifest(folder), 1)
    with caplog.at_level(logging.INFO, "edge.backends.native_rows"):
        for condition in GIVEN[:2]:
            slot = slot_of(rows, condition)
            by_runtime = slot.condition.role == role
            assert (slot.memory.conditioned is None) == by_runtime
            pairs = zip(runs(rows, condition, [0]), runs(runtime, condition, [0]), strict=True)
            assert not by_runtime or all(np.array_equal(a[0], b[0]) for a, b in list(pairs)[: len(SIZES) // 2])
    (record,) = caplog.records
    assert record.getMessage().endswith(
        f"{role}: the compiled library does not know it: head.bias is not that of the step graph"
    )
    asked, one_by_one = asked_for(rows, range(6)), asked_for(rows, range(6))
    decode(rows, asked, together=1)
    decode(rows, one_by_one, together=0)
    assert [written(w) for w in asked] == [written(w) for w in one_by_one]


def test_conditioned_rows_of_a_memory_that_is_not_known_are_run_by_onnx_runtime(
    debug_bundle: Path, debug: NativeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found out as the graphs are loaded, before a request is under way."""

    def unknown(*_: object) -> None:
        raise NotKnownError("it is float32")

    rows, runtime = native_rows(debug_bundle), OrtRows(debug_bundle, debug._manifest, 1)
    monkeypatch.setattr(module, "_readings", unknown)
    made, wanted = (next(runs(one, GIVEN[-1])) for one in (rows, runtime))
    assert np.array_equal(made[0], wanted[0]) and np.array_equal(made[1], wanted[1])
    assert slot_of(rows, GIVEN[-1]).memory.conditioned is None
