"""Blocks that take words, pictures and guidance on a real GPU, against the CPU's loop over the bundle's own graphs.

Torch is in the engines' place where TensorRT is absent, else TensorRT itself.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edge import build, doctor
from edge.backends import choose_backend
from edge.backends.trt.blocks import SLOTS
from edge.backends.trt.captured import Program
from edge.backends.trt.conditioned_blocks import TrtConditionedBlocks
from edge.backends.trt.driver import CudaMemory, Gpu
from edge.backends.trt.engine_cache import Built
from edge.backends.trt.profiles import step_profiles
from edge.decoding.blocks import Writing
from edge.decoding.conditions import Condition
from shared.manifest import Manifest, find_graph, graph_bytes, read_manifest
from tests.gpu.conftest import need_tensorrt
from tests.gpu.standin_conditions import ConditionsStandIn
from tests.unit.edge.backends.trt.test_blocks_backend import DEPTH, GAPS, LAWS, LENGTH, PROMPTS, writing_of
from tests.unit.edge.backends.trt.test_conditioned_backend import (
    GUIDED,
    ROLES,
    WORDS,
    condition_of,
    export_conditions,
    on_cpu,
    written,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(500),
    pytest.mark.proof("7. kernels, captured loop and backend on a GPU"),
]

PICTURE = condition_of([], 1, 0.0)
CONDITIONS = {"none": None, "words": WORDS, "picture": PICTURE, "guided": GUIDED}
Loop = tuple[TrtConditionedBlocks, list[bytes]]


def graphs_of(folder: Path, manifest: Manifest) -> list[bytes]:
    return [graph_bytes(folder, manifest, find_graph(folder, manifest, "cuda", role)) for role in ROLES]


@pytest.fixture
def loop(gpu: Gpu, cubin: bytes, tmp_path: Path) -> Iterator[Loop]:
    """The real backend, and the graphs that it stands for."""
    folder = tmp_path / "conditions"
    model = export_conditions(folder, on_cpu=False)
    manifest = read_manifest(folder)
    graphs, described = (
        graphs_of(folder, manifest),
        {role: find_graph(folder, manifest, "cuda", role) for role in ROLES},
    )
    made = TrtConditionedBlocks(
        ConditionsStandIn(gpu, model, described),  # type: ignore[arg-type]
        gpu,
        memory=CudaMemory(gpu),
        manifest=manifest,
        step=described["step"],
        graph=graphs[0],
        built=[Built(role.encode(), cubin) for role in ROLES],
    )
    yield made, graphs
    made.close()


def is_captured(backend: TrtConditionedBlocks) -> bool:
    """Every program: passes and encoders."""
    programs: list[Program] = [*backend._passes, *backend._encodings]
    return all(one.graph is not None for one in programs)


def check_texts(loop: Loop, condition: Condition | None) -> None:
    """Prompts and gaps, one after another in one slot, behind a request of another condition.

    A draw too close for FP16 may part two texts.
    """
    backend, graphs = loop
    slot, agreed, moved = backend.open_slot(), 0, 0
    asked = [(one, law) for law in (LAWS[0], LAWS[3]) for one in (PROMPTS[1], GAPS[0])]
    for one, law in asked:
        plain = written(backend, slot, one, law, None if condition else WORDS)
        found, wanted = written(backend, slot, one, law, condition), on_cpu(graphs, one, law, condition)
        agreed += bool((found.canvas == wanted.canvas).all())
        moved += bool((found.canvas != plain.canvas).any())
    assert agreed >= len(asked) - 1 and moved >= len(asked) - 1


def check_mixed(backend: TrtConditionedBlocks) -> None:
    """Plain requests and such with conditions in one launch a pass, eight in sixteen slots; each as if alone."""
    slots = [backend.open_slot() for _ in range(SLOTS)]
    conditions = list(CONDITIONS.values())
    asked = [((PROMPTS + GAPS)[i % 5], replace(LAWS[0], seed=i), conditions[i % 4]) for i in range(SLOTS)]
    together = list[Writing]()
    for (one, law, condition), slot in zip(asked, slots, strict=True):
        together.append(writing_of(*one, law))
        together[-1].slot, together[-1].condition = slot, condition
        backend.advance([together[-1]])
    while open_ones := [writing for writing in together if not writing.done]:
        backend.advance(open_ones)
    alone = [written(backend, slots[7 - i], *asked[i]).canvas for i in range(SLOTS)]
    same = [bool((found.canvas == canvas).all()) for found, canvas in zip(together, alone, strict=True)]
    assert sum(same) >= SLOTS - 2, same


@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)
def test_conditions_on_gpu_are_captured_and_write_the_texts_of_the_cpu(loop: Loop, condition: Condition | None) -> None:
    assert is_captured(loop[0]), "nothing was captured"
    check_texts(loop, condition)


def test_conditions_on_gpu_share_passes_with_plain_requests(loop: Loop) -> None:
    check_mixed(loop[0])


def test_conditions_on_gpu_with_real_tensorrt(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds the three engines, loads them, and holds every profile to the processor, as a Jetson's owner does."""
    need_tensorrt(gpu)
    folder = tmp_path / "bundle"
    export_conditions(folder, on_cpu=True)
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    assert build.main(["--bundle", str(folder), "--cache", str(tmp_path)]) == 0
    manifest = read_manifest(folder)
    graphs = graphs_of(folder, manifest)
    for condition in CONDITIONS.values():
        backend = choose_backend("trt", folder, manifest, 0).rows
        assert isinstance(backend, TrtConditionedBlocks) and is_captured(backend)
        check_texts((backend, graphs), condition)
        backend.close()
    backend = choose_backend("trt", folder, manifest, 0).rows
    assert isinstance(backend, TrtConditionedBlocks)
    check_mixed(backend)
    backend.close()
    profiles: doctor.Profiles = {"step": step_profiles(LENGTH, DEPTH, paired=True)}
    assert [finding.fix for finding in doctor.self_test(folder, manifest, profiles) if finding.fix] == []
