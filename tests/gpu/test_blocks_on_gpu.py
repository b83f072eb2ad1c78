"""The loop of blocks on a real GPU: torch in the engine's place where TensorRT is absent, else TensorRT itself."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edge import build, doctor
from edge.backends import choose_backend
from edge.backends.trt.blocks import SLOTS, TrtBlocks
from edge.backends.trt.driver import CudaMemory, Gpu
from edge.backends.trt.engine_cache import Built
from edge.backends.trt.profiles import buckets, step_profiles
from edge.decoding.blocks import Law
from host.export.__main__ import export_untrained
from host.export.pipeline import Wanted
from shared.manifest import SamplingDefaults, find_graph, graph_bytes, read_manifest
from tests.gpu.conftest import need_tensorrt
from tests.gpu.standin_rows import RowsStandIn
from tests.unit.edge.backends.trt.test_blocks_backend import (
    GAPS,
    LAWS,
    PROMPTS,
    export_blocks,
    finish,
    on_cpu,
    writing_of,
)

pytestmark = pytest.mark.proof("7. kernels, captured loop and backend on a GPU")


@pytest.fixture
def loop(gpu: Gpu, cubin: bytes, tmp_path: Path) -> Iterator[tuple[TrtBlocks, bytes]]:
    """The real backend, and the step graph that it drafts by."""
    folder = tmp_path / "blocks"
    model = export_blocks(folder)
    manifest = read_manifest(folder)
    step = find_graph(folder, manifest, "cuda", "step")
    graph = graph_bytes(folder, manifest, step)
    made = TrtBlocks(
        RowsStandIn(gpu, model, step),  # type: ignore[arg-type]
        gpu,
        memory=CudaMemory(gpu),
        manifest=manifest,
        step=step,
        graph=graph,
        built=[Built(b"", cubin)],
    )
    yield made, graph
    made.close()


def test_blocks_on_gpu_are_captured_and_write_the_texts_of_the_cpu(loop: tuple[TrtBlocks, bytes]) -> None:
    """Prompts and gaps, with drafts; a draw too close for FP16 may part two of them."""
    backend, graph = loop
    assert all(one.graph is not None for one in backend._passes), "nothing was captured"
    slot, agreed, passes, alone = backend.open_slot(), 0, 0, 0
    asked = [(*one, law) for law in (LAWS[0], LAWS[3]) for one in (*PROMPTS[1:], GAPS[0])]
    for parts, open_end, law in asked:
        wanted, writing = on_cpu(graph, parts, open_end, law), writing_of(parts, open_end, law)
        writing.slot, slot.cached = slot, 0
        finish(backend, [writing])
        agreed += bool((writing.canvas == wanted.canvas).all())
        passes, alone = passes + writing.passes, alone + wanted.passes
    assert agreed >= 0.8 * len(asked) and passes < alone


def test_blocks_on_gpu_share_passes(loop: tuple[TrtBlocks, bytes]) -> None:
    """Eight requests of different lengths in one launch a pass; each writes what it would alone."""
    backend, _ = loop
    slots = [backend.open_slot() for _ in range(SLOTS)]
    asked = [(*PROMPTS[i % 3], replace(LAWS[0], seed=i)) for i in range(SLOTS)]
    together = [writing_of(*one) for one in asked]
    for writing, slot in zip(together, slots, strict=True):
        writing.slot = slot
        backend.advance([writing])
    while open_ones := [writing for writing in together if not writing.done]:
        backend.advance(open_ones)
    same = 0
    for one, found in list(zip(asked, together, strict=True))[::2]:
        writing = writing_of(*one)
        slots[0].cached, writing.slot = 0, slots[0]
        finish(backend, [writing])
        same += bool((writing.canvas == found.canvas).all())
    assert same >= 3


def test_blocks_on_gpu_with_real_tensorrt(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds both engines, loads them, and holds every profile to the processor, as a Jetson's owner does."""
    processors = gpu.processors
    need_tensorrt(gpu)
    folder = tmp_path / "bundle"
    export_untrained("debug", folder, wanted=Wanted(cpu_fp32=True, cuda_fp16=True), defaults=SamplingDefaults())
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    assert build.main(["--bundle", str(folder), "--cache", str(tmp_path)]) == 0
    manifest = read_manifest(folder)
    chosen = choose_backend("trt", folder, manifest, 0)
    assert isinstance(chosen.rows, TrtBlocks) and chosen.backend is not None
    assert all(one.graph is not None for one in chosen.rows._passes), "nothing was captured"
    writing = writing_of([[7, 8, 9]], True, Law(1, 0.8, 64, 1.0, 3))
    writing.slot = chosen.rows.open_slot()
    finish(chosen.rows, [writing])
    for backend in (chosen.backend, chosen.rows):
        backend.close()
    profiles: doctor.Profiles = {
        "canvas": buckets(manifest, processors),
        "step": step_profiles(manifest.model.canvas_len, 3),
    }
    assert [finding.fix for finding in doctor.self_test(folder, manifest, profiles) if finding.fix] == []
