"""Conditions on ONNX Runtime: loaded when they are first needed, checked then, each slot's own."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from edge.backends.ort_rows import OrtRows
from edge.decoding.blocks import Slot
from edge.decoding.conditions import Condition
from edge.decoding.types import Floats
from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.slots import Slots
from host.export.__main__ import export_untrained
from host.export.pipeline import Wanted
from shared.errors import BundleError, RequestError
from shared.manifest import CONDITIONED_ROLES, Role, SamplingDefaults, read_manifest
from shared.messages import Gap, GenerateRequest
from shared.tokens import FIRST_TEXT_ID
from tests.support.altered_bundle import changed, with_graph
from tests.support.picture_files import picture
from tests.unit.edge.backends.test_ort_rows import drop_output, rename_input

ROWS = 24
NOISE = np.random.default_rng(2).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
WORDS = Condition(((9, 10), (11,)), NOISE[:0], 0.0)
GUIDED = Condition(((9, 10), (11,)), NOISE, 1.5)


@pytest.fixture(scope="module", params=["fp32", "int8"])
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OrtRows:
    folder = tmp_path_factory.mktemp("bundles") / "conditioned"
    wanted = Wanted(cpu_fp32=True) if request.param == "fp32" else Wanted(cpu_int8=True)
    export_untrained("debug", folder, wanted=wanted, defaults=SamplingDefaults(), conditions=True)
    return OrtRows(folder, read_manifest(folder), 2)


def scores(rows: OrtRows, slot: Slot, size: int) -> Floats:
    """Of a text's rows in passes of `size`."""
    made, text = list[Floats](), np.random.default_rng(1).integers(FIRST_TEXT_ID, 256, ROWS).astype(np.int32)
    for start in range(0, ROWS, size):
        part = text[start : start + size]
        places = np.arange(start, start + part.size, dtype=np.int32)
        made.append(rows.rows(slot, part, positions=places, scored=part.size).scores.copy())
        slot.cached += part.size
    return np.concatenate(made)


def conditioned(rows: OrtRows, condition: Condition) -> Slot:
    rows.load(condition)
    slot = rows.open_slot()
    rows.encode(slot, condition)
    return slot


@pytest.mark.parametrize("condition", [WORDS, GUIDED], ids=["words", "both, guided"])
def test_conditioned_rows_alone_score_as_among_others_to_the_bit(rows: OrtRows, condition: Condition) -> None:
    alone = scores(rows, conditioned(rows, condition), 1)
    for size in (2, 4, ROWS):
        assert np.array_equal(scores(rows, conditioned(rows, condition), size), alone)


def test_conditioned_slot_given_back_is_as_new(rows: OrtRows) -> None:
    rows.load(WORDS)
    slots = Slots(rows, most=1)
    slot = slots.take()
    assert slot is not None
    plain = scores(rows, slot, 4)
    slots.give_back(slot)
    assert slots.take() is slot
    rows.encode(slot, WORDS)
    assert not np.array_equal(scores(rows, slot, 4), plain)
    slots.give_back(slot)
    assert slots.take() is slot and slot.condition is None
    assert np.array_equal(scores(rows, slot, 4), plain)


def test_conditioned_graphs_are_loaded_when_they_are_needed_and_no_others(conditioned_bundle: Path) -> None:
    rows = OrtRows(conditioned_bundle, read_manifest(conditioned_bundle), 1)
    assert rows.conditions is not None and rows.conditions.graphs.sizes() == set()
    rows.load(WORDS)
    assert {role for role, _ in rows.conditions.graphs.sizes()} == {
        "encode.text",
        "encode.memory",
        "step.conditioned",
        "prefill.conditioned",
    }
    rows.load(GUIDED)
    assert {"encode.image", "step.guided"} < {role for role, _ in rows.conditions.graphs.sizes()}


@pytest.mark.parametrize("role", CONDITIONED_ROLES["cpu"])
@pytest.mark.parametrize("change", [rename_input, drop_output], ids=["input", "output"])
def test_conditioned_graph_of_other_names_is_refused_at_the_first_request(
    conditioned_bundle: Path, tmp_path: Path, role: Role, change: object
) -> None:
    folder = with_graph(conditioned_bundle, tmp_path / "b", role, change)  # type: ignore[arg-type]
    loaded = LoadedBundle.load(folder, "ort", threads=1)
    assert loaded.prepare(GenerateRequest(prompt="a")).condition is None
    request = GenerateRequest(prompt="a", words=["red"], images=[picture(1)], guidance=1.0 if "guided" in role else 0.0)
    with pytest.raises(BundleError, match=rf"{role}\.cpu\.fp32\.onnx (has other inputs and outputs|cannot be loaded)"):
        loaded.prepare(request)


def test_conditioned_graph_that_is_damaged_is_refused_at_the_first_request(
    conditioned_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "b"
    shutil.copytree(conditioned_bundle, folder)
    (folder / "encode.text.cpu.fp32.onnx").write_bytes(b"")
    loaded = LoadedBundle.load(folder, "ort", threads=1)
    with pytest.raises(BundleError, match=r"encode\.text\.cpu\.fp32\.onnx does not match its manifest"):
        loaded.prepare(GenerateRequest(prompt="a", words=["red"]))


def test_conditions_where_no_graph_fills_gaps_with_them_are_refused(conditioned_bundle: Path, tmp_path: Path) -> None:
    folder = changed(
        conditioned_bundle,
        tmp_path / "b",
        lambda m: replace(m, graphs=tuple(g for g in m.graphs if g.role != "prefill.conditioned")),
    )
    loaded = LoadedBundle.load(folder, "ort", threads=1)
    assert loaded.prepare(GenerateRequest(prompt="a", words=["red"])).condition is not None
    with pytest.raises(RequestError, match="`words`: this bundle fills gaps without conditions: give a `prompt`"):
        loaded.prepare(GenerateRequest(segments=["a ", Gap(3)], words=["red"]))


def test_conditions_on_a_gpu_are_refused_by_name(conditioned_bundle: Path) -> None:
    loaded = LoadedBundle.load(conditioned_bundle, "fake")
    loaded.rows, loaded.backend_name = None, "trt"  # what a device has whose backend runs no rows that read a memory
    assert loaded.limits(1).words == 0
    with pytest.raises(RequestError, match=r"`images`: this device serves from the backend trt, for which"):
        loaded.prepare(GenerateRequest(prompt="a", images=[picture(1)]))
