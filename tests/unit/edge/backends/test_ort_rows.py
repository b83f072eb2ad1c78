"""ONNX Runtime for blocks: a row's scores depend on nothing but its text, and a bundle's graphs are checked at load."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import pytest
from msgspec.structs import replace

from edge.backends import choose_backend
from edge.backends.ort_rows import OrtRows
from edge.decoding.types import Floats
from edge.serving.loaded_bundle import LoadedBundle
from host.export.__main__ import export_untrained
from host.export.pipeline import Wanted
from shared.errors import BundleError, RequestError
from shared.manifest import Manifest, Role, SamplingDefaults, read_manifest
from shared.messages import Gap, GenerateRequest
from shared.tokens import FIRST_TEXT_ID
from tests.support.altered_bundle import changed, with_graph

ROWS: Final = 60


@pytest.fixture(scope="module", params=["fp32", "int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "rows"
    wanted = Wanted(cpu_fp32=True) if request.param == "fp32" else Wanted(cpu_int8=True)
    export_untrained("debug", folder, wanted=wanted, defaults=SamplingDefaults())
    return folder


def test_rows_of_a_narrow_network_have_one_thread(blocks_bundle: Path) -> None:
    rows = OrtRows(blocks_bundle, read_manifest(blocks_bundle), threads=2)
    rows.rows(rows.open_slot(), np.full(2, FIRST_TEXT_ID, np.int32), positions=np.arange(2, dtype=np.int32), scored=1)
    assert {threads for _, threads in rows._graphs.sizes()} == {1}


def states(rows: OrtRows, size: int, under_way: int) -> Floats:
    """Of a text's rows in passes of `size`.  → (ROWS, D)"""
    slot, made = rows.open_slot(), list[Floats]()
    text = np.random.default_rng(1).integers(FIRST_TEXT_ID, 256, ROWS).astype(np.int32)
    for start in range(0, ROWS, size):
        part = text[start : start + size]
        places = np.arange(start, start + part.size, dtype=np.int32)
        made.append(rows.rows(slot, part, positions=places, scored=part.size, under_way=under_way).states.copy())
        slot.cached += part.size
    return np.concatenate(made)


@pytest.mark.parametrize("under_way", [1, 3])
def test_rows_alone_score_as_among_others_to_the_bit(bundle: Path, under_way: int) -> None:
    rows = OrtRows(bundle, read_manifest(bundle), 2)
    alone = states(rows, 1, under_way)
    for size in (2, 4, 16, ROWS):
        assert np.array_equal(states(rows, size, 1), alone)
    rows.close()


def rename_input(model: onnx.ModelProto) -> None:
    old = model.graph.input[0].name
    model.graph.input[0].name = "other"
    for node in model.graph.node:
        node.input[:] = ["other" if name == old else name for name in node.input]


def drop_output(model: onnx.ModelProto) -> None:
    del model.graph.output[-1]


def shorten_positions(model: onnx.ModelProto) -> None:
    table = next(one for one in model.graph.initializer if one.name == "position_embedding.weight")
    table.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(table)[:8].copy(), table.name))


@pytest.mark.parametrize("role", ["step", "prefill", "draft"])
@pytest.mark.parametrize("change", [rename_input, drop_output], ids=["input", "output"])
def test_rows_graph_of_other_names_is_refused_at_load(
    blocks_bundle: Path, tmp_path: Path, role: Role, change: Callable[[onnx.ModelProto], None]
) -> None:
    folder = with_graph(blocks_bundle, tmp_path / "b", role, change)
    with pytest.raises(BundleError, match=rf"{role}\.cpu\.fp32\.onnx (has other inputs and outputs|cannot be loaded)"):
        LoadedBundle.load(folder, "ort", threads=1)


@pytest.mark.parametrize("role", ["step", "prefill"])
def test_rows_graph_of_a_shorter_canvas_is_refused_at_load(blocks_bundle: Path, tmp_path: Path, role: Role) -> None:
    folder = with_graph(blocks_bundle, tmp_path / "b", role, shorten_positions)
    with pytest.raises(BundleError, match=rf"{role}\.cpu\.fp32\.onnx does not run: "):
        LoadedBundle.load(folder, "ort", threads=1)


def other_window(manifest: Manifest) -> Manifest:
    assert manifest.blocks is not None
    return replace(manifest, blocks=replace(manifest.blocks, window=2))


def test_rows_draft_graph_that_contradicts_the_manifest_is_refused_at_load(blocks_bundle: Path, tmp_path: Path) -> None:
    folder = changed(blocks_bundle, tmp_path / "b", lambda m: replace(other_window(m), decoders=("blocks",)))
    with pytest.raises(BundleError, match=r"draft\.cpu\.fp32\.onnx (does not run|gives arrays of shapes)"):
        LoadedBundle.load(folder, "ort", threads=1)


def test_step_graph_for_another_target_alone_is_refused_by_name(blocks_bundle: Path, tmp_path: Path) -> None:
    def for_cuda(manifest: Manifest) -> Manifest:
        return replace(
            manifest, graphs=tuple(replace(g, target="cuda") if g.role == "step" else g for g in manifest.graphs)
        )

    folder = changed(blocks_bundle, tmp_path / "b", for_cuda)
    with pytest.raises(BundleError, match="has no step graph for target 'cpu'"):
        choose_backend("ort", folder, read_manifest(folder), threads=1)


def without_prefill(*decoders: str) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(
        manifest, decoders=decoders, graphs=tuple(g for g in manifest.graphs if g.role != "prefill")
    )


def test_gaps_without_a_prefill_graph_go_by_canvas(blocks_bundle: Path, tmp_path: Path) -> None:
    loaded = LoadedBundle.load(
        changed(blocks_bundle, tmp_path / "b", without_prefill("blocks", "canvas")), "ort", threads=1
    )
    request = GenerateRequest(segments=["abc ", Gap(4), "."], seed=1)
    assert (
        loaded.run(loaded.prepare(request)).text == loaded.run(loaded.prepare(replace(request, decode="canvas"))).text
    )
    with pytest.raises(RequestError, match="`decode` asks for blocks"):
        loaded.prepare(replace(request, decode="blocks"))
    assert loaded.prepare(GenerateRequest(prompt="abc")).layout.open_end


def test_gaps_of_a_bundle_that_cannot_fill_them_are_refused(blocks_bundle: Path, tmp_path: Path) -> None:
    loaded = LoadedBundle.load(changed(blocks_bundle, tmp_path / "b", without_prefill("blocks")), "ort", threads=1)
    with pytest.raises(RequestError, match="`segments`: this bundle on this device continues prompts alone"):
        loaded.prepare(GenerateRequest(segments=["abc ", Gap(4), "."]))
