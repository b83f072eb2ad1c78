"""The whole loop of blocks on the emulated GPU, ONNX Runtime in the engine's place, writes the texts of the CPU's loop.

Both score with the same half-precision graph, so a text may differ only where a draw is closer than FP16 can tell.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from msgspec.structs import replace as replace_struct

from edge.backends.trt import kernels
from edge.backends.trt.blocks import SLOTS, TrtBlocks
from edge.backends.trt.driver import CudaMemory, Gpu
from edge.backends.trt.engine_cache import Built
from edge.backends.trt.profiles import step_profiles
from edge.decoding.blocks import BlocksLoop, Law, RowScores, Slot, Writing, advance
from edge.decoding.types import Floats, Ids
from host.evaluate.cuda_rows import CudaRows
from host.export.bundle_writer import BundleGraph, write_bundle
from host.export.cuda_step import cuda_step_graph
from host.export.random_weights import untrained
from host.export.shared_weights import with_shared_weights
from host.model.network import CONFIGS, Denoiser
from shared.errors import BundleError, DeviceError
from shared.manifest import Manifest, find_graph, graph_bytes, read_manifest
from shared.tokens import BOS, EOS, MASK, PAD
from tests.support.decided import decided_network
from tests.support.emulator import Emulator
from tests.support.emulator.fake_tensorrt import FakeTensorRT
from tests.support.emulator.fakes import FakeDriver, Result
from tests.support.kept_rows import keep
from tests.unit.edge.backends.trt.test_backend import ALLOCATES, SYNCHRONISES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.proof("4. the TensorRT backend over a recording driver, and below NVIDIA's own bindings"),
]

VOCAB, LENGTH, DEPTH = 512, 64, 3
ROOM = 14  # of an open end: each pass takes the emulator a tenth of a second


@dataclass
class Bench:
    """A backend, the fakes below it, and its bundle."""

    driver: FakeDriver
    trt: Any
    manifest: Manifest
    graph: bytes

    def open(self) -> TrtBlocks:
        gpu = Gpu(self.driver)  # type: ignore[arg-type]
        step = next(graph for graph in self.manifest.graphs if graph.role == "step")
        return TrtBlocks(
            self.trt,
            gpu,
            memory=CudaMemory(gpu),
            manifest=self.manifest,
            step=step,
            graph=self.graph,
            built=[Built(self.graph, b"cubin")],
        )


def export_blocks(folder: Path) -> Denoiser:
    """A bundle with blocks for CUDA alone, of a network whose drafts are often kept."""
    model = decided_network(VOCAB, LENGTH, depth=DEPTH)
    assert model.drafter is not None
    model.drafter.likely = torch.arange(EOS, 300)
    _, progress, tokenizer = untrained(replace(CONFIGS["debug"], canvas_len=LENGTH))
    step = BundleGraph(cuda_step_graph(model), "step", "fp16", "cuda")
    with tokenizer as path:
        write_bundle(folder, model, progress=progress, tokenizer=path, graphs=with_shared_weights([step]), top_k=64)
    return model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "blocks"
    export_blocks(folder)
    return folder


@pytest.fixture
def bench(emulator: Emulator, bundle: Path) -> Iterator[Bench]:
    manifest = read_manifest(bundle)
    driver = FakeDriver(emulator)
    graph = graph_bytes(bundle, manifest, find_graph(bundle, manifest, "cuda", "step"))
    trt = FakeTensorRT(driver, step_profiles(LENGTH, DEPTH))
    yield Bench(driver, trt, manifest, graph)
    assert {name: left for name, left in driver.live.items() if left} == {}, "something was made and never freed"
    assert trt.nothing_lives()


class OnCpu:
    """The CPU's loop over the very graph that the GPU runs: the law in numpy, without drafts."""

    depth, lanes, fills_gaps = 0, 1, True

    def __init__(self, graph: bytes) -> None:
        self._model = onnx.load_from_string(graph)

    def open_slot(self) -> Slot:
        return Slot(np.zeros(2 * LENGTH, np.int32), (CudaRows(self._model), list[Any]()))

    def prefill(self, slot: Slot, tokens: Ids, positions: Ids) -> None:
        self.rows(slot, tokens, positions=positions, scored=1, sees=tokens.size)
        slot.cached = tokens.size

    def rows(
        self, slot: Slot, tokens: Ids, *, positions: Ids, scored: int, under_way: int = 1, sees: int = 0
    ) -> RowScores:
        graph, last = slot.memory
        if last:
            made, places, before = last.pop()
            keep(graph, made, places, [slot.cached - before])
        n, places = tokens.size, positions[None].astype(np.int32)
        seen = np.full((1, n), sees, np.int32) if sees else np.arange(1, n + 1, dtype=np.int32)[None]
        made = graph.run(tokens[None], places, sees=seen, scored=np.arange(n - scored, n, dtype=np.int32)[None])
        last.append((made, places, slot.cached))
        logits = made["logits"][0].astype(np.float32)
        return RowScores(logits, logits)

    def draft(self, slot: Slot, state: Floats, *, token: int, noise: Floats, law: Law) -> Ids:
        raise AssertionError("it drafts nothing")

    def close(self) -> None:
        """Nothing to free."""


Parts = Sequence[list[int] | int]
PROMPTS: list[tuple[Parts, bool]] = [([], True), ([[7, 8, 9]], True), ([list(range(10, 40))], True)]
GAPS: list[tuple[Parts, bool]] = [([[7, 8], 6, [9, 10, 11], 4, [12]], False), ([5, [9, 10], 3], False)]
LAWS = [
    Law(1, 0.8, 64, 1.0, 3),
    Law(2, 1.0, 5, 1.0, 1),
    Law(3, 0.0, 64, 1.0, 3),
    Law(4, 1.3, 64, 0.7, 3),
    Law(5, 0.9, 1, 1.0, 2),
    Law(6, 1.0, 64, 1.0, 0),
]


def writing_of(parts: Parts, open_end: bool, law: Law) -> Writing:
    ids = [BOS]
    for part in parts:
        ids += [MASK] * part if isinstance(part, int) else part
    canvas = np.full(LENGTH, MASK, np.int32)
    canvas[: len(ids)] = ids
    fill = canvas == MASK
    fill[len(ids) :] = open_end
    end = len(ids) + (ROOM if open_end else 0)
    canvas[end:], fill[end:] = PAD, False
    return Writing(canvas, fill, open_end, law, VOCAB)


def on_cpu(graph: bytes, parts: Parts, open_end: bool, law: Law) -> Writing:
    cpu, writing = OnCpu(graph), writing_of(parts, open_end, replace(law, window=0))
    writing.slot = cpu.open_slot()
    while not writing.done:
        advance(cpu, writing)
    return writing


def finish(backend: TrtBlocks, writings: Sequence[Writing]) -> None:
    for writing in writings:
        while not writing.done:
            left = writing.left
            backend.advance([writing])
            assert writing.left < left


@pytest.mark.timeout(300)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_blocks_on_gpu_write_the_texts_of_the_cpu(bench: Bench, law: Law) -> None:
    """Prompts and gaps, one after another in one slot, which begins anew each time; drafts save passes."""
    backend, agreed, passes, alone = bench.open(), 0, 0, 0
    slot = backend.open_slot()
    asked = [*PROMPTS, *GAPS]
    for parts, open_end in asked:
        writing, wanted = writing_of(parts, open_end, law), on_cpu(bench.graph, parts, open_end, law)
        writing.slot, slot.cached = slot, 0
        finish(backend, [writing])
        agreed += bool((writing.canvas == wanted.canvas).all())
        passes, alone = passes + writing.passes, alone + wanted.passes
        assert MASK not in writing.canvas[writing.fill] and writing.left == 0
    backend.close()
    assert agreed >= len(asked) - 1, "more than one draw was too close to call"
    assert passes < 0.9 * alone if law is LAWS[0] else passes <= alone


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_blocks_on_gpu_share_passes_and_write_what_they_would_alone(bench: Bench) -> None:
    """Eight requests of different lengths and laws join and leave; each ends as if it had been by itself."""
    backend = bench.open()
    slots = [backend.open_slot() for _ in range(SLOTS)]
    asked = [(*(PROMPTS + GAPS)[i % 5], replace(LAWS[i % 4], seed=100 + i)) for i in range(SLOTS)]
    together = [writing_of(*one) for one in asked]
    for writing, slot in zip(together, slots, strict=True):
        writing.slot = slot
    rounds = 0
    while open_ones := [w for w in together if not w.done]:
        under_way = [w for i, w in enumerate(open_ones) if rounds >= i]  # one more joins in each round
        for writing in (w for w in under_way if w.reads):
            backend.advance([writing])
        if more := [w for w in under_way if not w.done and (rounds + w.law.seed) % 3]:
            backend.advance(more)
        rounds += 1
    for (parts, open_end, law), found in list(zip(asked, together, strict=True))[2:7]:
        writing = writing_of(parts, open_end, law)
        slots[5].cached, writing.slot = 0, slots[5]
        finish(backend, [writing])
        np.testing.assert_array_equal(found.canvas, writing.canvas)
    backend.close()


def test_blocks_on_gpu_allocate_before_the_first_pass_and_launch_one_graph_a_pass(bench: Bench) -> None:
    backend = bench.open()
    assert isinstance(backend, BlocksLoop)
    assert bench.driver.calls.count("cuGraphInstantiate") == len(step_profiles(LENGTH, DEPTH))
    writing = writing_of([[7, 8, 9]], True, LAWS[0])
    writing.slot = backend.open_slot()
    bench.driver.calls.clear()
    passes = 0
    while not writing.done:
        backend.advance([writing])
        passes += 1
    assert bench.driver.calls == ["cuCtxSetCurrent", "cuGraphLaunch", "cuEventRecord", "cuEventSynchronize"] * passes
    assert not any(ALLOCATES.fullmatch(name) or SYNCHRONISES.fullmatch(name) for name in bench.driver.calls)
    backend.close()
    assert all(bench.driver.checked[name] for name in set(bench.driver.calls))


def test_blocks_on_gpu_failure_of_the_device_ends_the_service(bench: Bench) -> None:
    backend = bench.open()
    writing = writing_of([[7, 8, 9]], True, LAWS[0])
    writing.slot = backend.open_slot()
    backend.advance([writing])
    before = writing.canvas.copy()
    bench.driver.fails = {"cuEventSynchronize": Result.CUDA_ERROR_LAUNCH_FAILED}
    with pytest.raises(DeviceError, match="cuEventSynchronize failed"):
        backend.advance([writing])
    bench.driver.fails = {}
    assert backend.failure is not None and (writing.canvas == before).all()
    with pytest.raises(DeviceError, match="has failed before"):
        backend.advance([writing])
    backend.close()


def test_blocks_on_gpu_scores_that_are_no_numbers_fail_their_request_alone(bench: Bench) -> None:
    """The others of the pass go on, and so does it once its scores are numbers again."""
    backend = bench.open()
    mine, other, twin = (writing_of([[7, 8, 9]], True, LAWS[0]) for _ in range(3))
    for writing in (mine, other, twin):
        writing.slot = backend.open_slot()
        backend.advance([writing])
    before, ahead = mine.canvas.copy(), other.position
    assert mine.slot is not None
    backend._writings[mine.slot.memory : mine.slot.memory + 1]["broken"] = 1  # what the kernel writes
    with pytest.raises(DeviceError, match="scores are not all numbers"):
        backend.advance([mine, other])
    assert backend.failure is None and (mine.canvas == before).all() and other.position > ahead
    finish(backend, [mine, other, twin])
    for writing in (mine, other):
        np.testing.assert_array_equal(writing.canvas, twin.canvas)
    backend.close()


def test_blocks_on_gpu_refuse_a_graph_without_its_drafter(bench: Bench) -> None:
    graph = onnx.load_from_string(bench.graph)
    for name in ("drafter.depths.1.down.weight", "drafter.depths.0.norm_token.bias"):
        less = onnx.ModelProto()
        less.CopyFrom(graph)
        constant = next(one for one in less.graph.initializer if one.name == name)
        constant.dims[0] = constant.dims[0] // 2
        constant.raw_data = constant.raw_data[: len(constant.raw_data) // 2]
        bench.graph, whole = less.SerializeToString(), bench.graph
        with pytest.raises(BundleError, match=rf"its constant {name} is of shape .*, not of shape"):
            bench.open()
        bench.graph = whole


def test_blocks_on_gpu_refuse_a_bundle_beyond_them_and_leave_the_device(bench: Bench) -> None:
    """`bench` asks whether its context is released."""
    whole = bench.manifest
    bench.manifest = replace_struct(whole, top_k=kernels.THREADS + 1)
    with pytest.raises(BundleError, match="serves bundles with top_k up to"):
        bench.open()
    bench.manifest = replace_struct(whole, model=replace_struct(whole.model, heads=1))
    with pytest.raises(BundleError, match=r"step\.cuda\.fp16\.onnx has other inputs than the kernels of blocks"):
        bench.open()


def test_blocks_on_gpu_texts_end(bench: Bench) -> None:
    """An EOS closes what is open, drafts behind it are not shown."""
    graph = onnx.load_from_string(bench.graph)
    bias = next(one for one in graph.graph.initializer if one.name == "head.bias.rows")
    values = onnx.numpy_helper.to_array(bias).copy()
    values[EOS] += 4
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    bench.graph = graph.SerializeToString()
    backend = bench.open()
    slot = backend.open_slot()
    ended = 0
    for seed in range(6):
        writing = writing_of([[7, 8, 9]], True, Law(seed, 1.5, 64, 1.0, 3))
        writing.slot, slot.cached = slot, 0
        while not writing.done:
            backend.advance([writing])
            assert EOS not in writing.drafts and len(writing.drafts) <= 3
            assert len(writing.drafts) <= max(0, 3 + ROOM - writing.position)
        ended += EOS in writing.canvas
    backend.close()
    assert ended >= 1
