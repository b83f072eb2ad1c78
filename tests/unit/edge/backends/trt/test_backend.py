"""The TensorRT backend over a driver and a TensorRT that record what it does, and do it on this processor."""

import logging
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import pytest

from edge.backends import Chosen
from edge.backends.trt.backend import TrtBackend
from edge.backends.trt.captured import EngineRejected
from edge.backends.trt.driver import CudaMemory, Gpu
from edge.backends.trt.engine_cache import Built
from edge.backends.trt.profiles import BATCHES, batches_of, buckets, check_servable
from edge.decoding.canvas import advance
from edge.decoding.types import Ids, LoopBackend, Positions, Row, Sampling, StepResult
from edge.serving.loaded_bundle import LoadedBundle
from shared.errors import BundleError, DeviceError
from shared.manifest import Manifest, find_graph, graph_bytes, read_manifest
from shared.messages import GenerateRequest
from shared.tokens import MASK
from tests.support.emulator import Emulator
from tests.support.emulator.fake_tensorrt import FakeTensorRT
from tests.support.emulator.fakes import MAKES, PROCESSORS, FakeDriver, Result
from tests.support.emulator.reference import reduce_logits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.proof("4. the TensorRT backend over a recording driver, and below NVIDIA's own bindings"),
]

ALLOCATES = re.compile(
    r"cu(Mem|Stream|Event|Graph)\w*(Alloc|Create|Instantiate|BeginCapture)|cuModuleLoad\w*|cuMemFree"
)
SYNCHRONISES = re.compile(r"cu(Stream|Ctx|Device)Synchronize|cuMemcpy\w*|cuMemset\w*")
SAMPLING = Sampling(seed=1, steps=6, selection="random", temperature=1.0, top_k=8, top_p=1.0)


@dataclass
class Bench:
    """A backend and the two fakes below it."""

    driver: FakeDriver
    trt: Any
    manifest: Manifest
    graph: bytes
    memory: Any = None

    def open(self) -> TrtBackend:
        gpu = Gpu(self.driver)  # type: ignore[arg-type]
        memory, built = self.memory or CudaMemory(gpu), Built(self.graph, b"cubin")
        return TrtBackend(self.trt, gpu, memory=memory, manifest=self.manifest, built=built)


@pytest.fixture
def bench(emulator: Emulator, debug_bundle: Path) -> Iterator[Bench]:
    manifest = read_manifest(debug_bundle)
    driver = FakeDriver(emulator)
    trt = FakeTensorRT(driver, buckets(manifest, PROCESSORS))
    yield Bench(driver, trt, manifest, graph_bytes(debug_bundle, manifest, find_graph(debug_bundle, manifest, "cuda")))
    assert {name: left for name, left in driver.live.items() if left} == {}, "something was made and never freed"
    assert trt.nothing_lives()


def rows(manifest: Manifest, count: int, sampling: Sampling = SAMPLING) -> list[Row]:
    canvas = np.full(manifest.model.canvas_len, MASK, np.int32)
    canvas[:4] = [1, 10, 11, 12]
    fill = canvas == MASK
    return [Row(canvas.copy(), fill, replace(sampling, seed=seed)) for seed in range(count)]


def test_backend_allocates_before_the_first_step_and_frees_at_the_end(bench: Bench) -> None:
    backend = bench.open()
    made = {name for name in bench.driver.calls if ALLOCATES.fullmatch(name)}
    assert {"cuMemAlloc", "cuMemHostAlloc", "cuStreamCreate", "cuEventCreate", "cuGraphInstantiate"} <= made
    assert bench.driver.calls.count("cuGraphInstantiate") == len(buckets(bench.manifest, PROCESSORS))
    bench.driver.calls.clear()
    mine = rows(bench.manifest, 3)
    for _ in range(4):
        backend.advance(mine, backend.lengths[-1])
    assert [name for name in bench.driver.calls if ALLOCATES.fullmatch(name) or SYNCHRONISES.fullmatch(name)] == []
    # Three canvases of full length are two passes: more than two at once gain nothing on a GPU of this size.
    assert bench.driver.calls == ["cuCtxSetCurrent", "cuGraphLaunch", "cuEventRecord", "cuEventSynchronize"] * 8
    backend.close()


def test_backend_checks_every_return_code(bench: Bench) -> None:
    backend = bench.open()
    backend.advance(rows(bench.manifest, 1), backend.lengths[-1])
    backend.close()
    assert len(set(bench.driver.calls)) > 20
    assert all(bench.driver.checked[name] == bench.driver.calls.count(name) for name in set(bench.driver.calls))


FALLBACKS = {"cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuMemGetInfo"}


def test_backend_failure_while_loading_is_named_and_frees_the_rest(bench: Bench) -> None:
    """Each function in turn; the fixture looks for what is left behind."""
    backend = bench.open()
    loading = list(dict.fromkeys(bench.driver.calls))
    backend.close()
    freeing = set(MAKES.values())
    for name in loading:
        if name in FALLBACKS | freeing:
            continue
        bench.driver.fails = {name: Result.CUDA_ERROR_LAUNCH_FAILED}
        with pytest.raises(DeviceError, match=f"{name} failed: CUDA_ERROR_LAUNCH_FAILED"):
            bench.open()
        bench.driver.fails = {}


@pytest.mark.parametrize("name", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"])
def test_backend_without_graphs_enqueues_the_steps_plainly(
    bench: Bench, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = bench.open()
    wanted = rows(bench.manifest, 2)
    advance(backend, "linear", wanted)
    backend.close()
    bench.driver.fails = {name: Result.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED}
    with caplog.at_level(logging.WARNING, "edge.backends.trt.captured"):
        backend = bench.open()
    assert f"{name} failed: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" in caplog.text
    bench.driver.calls.clear()
    found = rows(bench.manifest, 2)
    backend.advance(found, backend.lengths[-1])
    plain = ["cuCtxSetCurrent", "cuLaunchKernel", "cuLaunchKernel", "cuEventRecord", "cuEventSynchronize"]
    assert bench.driver.calls == plain
    np.testing.assert_array_equal([r.canvas for r in found], [r.canvas for r in wanted])
    assert backend.failure is None
    backend.close()


def test_backend_whose_engine_cannot_be_captured_runs_plainly(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.trt.refuses = {"capture"}
    backend = bench.open()
    assert "no CUDA graph for 1 × " in caplog.text
    mine = rows(bench.manifest, 1)
    backend.advance(mine, backend.lengths[-1])
    assert mine[0].step == 1
    backend.close()


@pytest.mark.parametrize("name", ["cuGraphLaunch", "cuEventRecord", "cuEventSynchronize"])
def test_backend_error_in_the_loop_ends_the_service_and_is_logged(
    bench: Bench, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = bench.open()
    mine = rows(bench.manifest, 1)
    before = mine[0].canvas.copy()
    bench.driver.fails = {name: Result.CUDA_ERROR_LAUNCH_FAILED}
    with pytest.raises(DeviceError, match=f"{name} failed"):
        backend.advance(mine, backend.lengths[-1])
    bench.driver.fails = {}
    assert f"out of service: {name} failed" in caplog.text
    assert backend.failure is not None
    np.testing.assert_array_equal(mine[0].canvas, before)
    with pytest.raises(DeviceError, match="has failed before"):
        backend.advance(mine, backend.lengths[-1])
    backend.close()


def test_backend_closes_a_device_that_also_fails_to_free(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """After a sticky error every call fails; each is still made."""
    backend = bench.open()
    bench.driver.fails = dict.fromkeys(MAKES.values(), Result.CUDA_ERROR_LAUNCH_FAILED)
    bench.driver.calls.clear()
    backend.close()
    assert "while freeing the GPU: cuMemFree failed" in caplog.text
    assert set(MAKES.values()) - {"cuGraphDestroy"} <= set(bench.driver.calls)
    bench.driver.live.clear()
    bench.driver.graphs.clear()


def test_backend_without_gpu_memory_says_how_much_is_free(bench: Bench) -> None:
    bench.driver.fails = {"cuMemAlloc": Result.CUDA_ERROR_OUT_OF_MEMORY}
    with pytest.raises(
        DeviceError, match=r"cannot allocate \d+ MiB, 1024 of 8192 MiB are free: stop what else uses it"
    ):
        bench.open()


def test_backend_tells_a_rejected_engine_from_other_faults(bench: Bench) -> None:
    bench.trt.refuses = {"engine"}
    with pytest.raises(EngineRejected, match=r"TensorRT 10.3.0 rejects the cached engine"):
        bench.open()


def test_backend_names_a_shape_that_the_engine_lacks(bench: Bench) -> None:
    bench.trt.refuses = {"shape"}
    with pytest.raises(DeviceError, match="TensorRT refuses set_input_shape canvas for 1 ×"):
        bench.open()


def test_backend_engine_that_does_not_start_is_an_error(bench: Bench) -> None:
    bench.trt.refuses = {"enqueue"}
    with pytest.raises(DeviceError, match="TensorRT cannot run 1 ×"):
        bench.open()


# --- what it generates ------------------------------------------------------------------------------------------------

REQUESTS = {
    "random": GenerateRequest(prompt="abc", max_tokens=20, steps=6),
    "confidence": GenerateRequest(prompt="abc", max_tokens=20, selection="confidence", steps=4),
    "nucleus": GenerateRequest(prompt="abc", max_tokens=20, top_p=0.8, temperature=1.3, steps=4),
    "argmax": GenerateRequest(prompt="abc", max_tokens=20, temperature=0, selection="margin", steps=4),
    "threshold": GenerateRequest(prompt="abc", threshold=0.05, max_tokens=12),
    "entropy bound": GenerateRequest(prompt="abc", entropy_bound=9.0, max_tokens=12),
}


class SameLogits:
    """The processor's loop on the very logits that the kernels read: the CUDA graph, then the reduction in numpy."""

    lanes = 1

    def __init__(self, graph: bytes, k: int) -> None:
        self._k = k
        self._session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])

    def score(self, canvas: Ids, t: float, positions: Positions, rows: int = 1) -> StepResult:
        feed: dict[str, Any] = {"canvas": canvas[None], "t": np.array([t], np.float32)}
        (logits,) = self._session.run(["logits"], {i.name: feed[i.name] for i in self._session.get_inputs()})
        return reduce_logits(logits[0][positions], self._k)

    def close(self) -> None:
        """Nothing to free."""


@pytest.mark.parametrize("name", REQUESTS)
def test_backend_writes_the_text_of_the_cpu(bench: Bench, debug_bundle: Path, name: str) -> None:
    """To the last token, on the same logits; a draw too close for float32 may part the two, but not on all seeds."""
    on_cpu = LoadedBundle.load(debug_bundle, "fake")
    backend = bench.open()
    on_gpu = LoadedBundle(debug_bundle, bench.manifest, Chosen(backend, "trt"), on_cpu._texts)
    on_cpu.backend = SameLogits(bench.graph, bench.manifest.top_k)
    agreed = 0
    for seed in range(4):
        plan = on_cpu.prepare(msgspec.structs.replace(REQUESTS[name], seed=seed))
        wanted, found = on_cpu.run(plan), on_gpu.run(plan)
        agreed += bool((wanted.canvas == found.canvas).all() and wanted.steps == found.steps)
    backend.close()
    assert agreed >= 3


def test_backend_rows_join_leave_and_change_places(bench: Bench) -> None:
    """Each row ends as if it had been alone, whoever shared its passes."""
    backend = bench.open()
    length = backend.lengths[-1]
    alone = rows(bench.manifest, 3)
    for row in alone:
        for _ in range(4):
            backend.advance([row], length)
    a, b, c = together = rows(bench.manifest, 3)
    for batch in ([a], [a, b], [a, b, c], [b, a, c], [c, b], [c, b], [c]):
        backend.advance(batch, length)
    assert [row.step for row in together] == [4, 5, 5]
    while any(row.step < 6 for row in alone):
        for row, end in zip(alone, together, strict=True):
            if row.step < end.step:
                backend.advance([row], length)
        if [row.step for row in alone] == [4, 5, 5]:
            break
    for found, wanted in zip(together, alone, strict=True):
        np.testing.assert_array_equal(found.canvas, wanted.canvas)
    backend.close()


def test_backend_moves_to_the_thread_that_calls_it(bench: Bench) -> None:
    """It is loaded by one thread and driven by another: the context must follow."""
    backend = bench.open()
    bench.driver.calls.clear()
    mine = rows(bench.manifest, 1)
    for _ in range(2):
        thread = threading.Thread(target=backend.advance, args=(mine, backend.lengths[-1]))
        thread.start()
        thread.join()
    assert [bench.driver.calls[0], bench.driver.calls.count("cuCtxSetCurrent")] == ["cuCtxSetCurrent", 2]
    assert mine[0].step == 2
    bench.driver.calls.clear()
    backend.close()
    assert bench.driver.calls[0] == "cuCtxSetCurrent"  # whoever closes it may never have used it


def test_backend_is_a_loop_backend(bench: Bench) -> None:
    backend = bench.open()
    assert isinstance(backend, LoopBackend)
    assert backend.batches == BATCHES
    backend.close()


def test_backend_nan_logits_fail_their_step_and_leave_the_gpu_in_service(bench: Bench) -> None:
    """The rows are then where they were before it, and go on as if it had not been."""
    backend = bench.open()
    mine, twin = rows(bench.manifest, 1), rows(bench.manifest, 1)
    for row in (mine, twin):
        backend.advance(row, backend.lengths[-1])
    before = mine[0].canvas.copy()
    backend._place(mine, backend._buckets[1, backend.lengths[-1]])
    backend._rows["broken"][0] = 1  # what the kernel writes; see test_kernels
    with pytest.raises(DeviceError, match="logits are not all numbers"):
        backend.advance(mine, backend.lengths[-1])
    np.testing.assert_array_equal(mine[0].canvas, before)
    assert (mine[0].step, backend.failure) == (1, None)
    for row in (mine, twin):
        backend.advance(row, backend.lengths[-1])
    np.testing.assert_array_equal(mine[0].canvas, twin[0].canvas)
    backend.close()


def test_backend_step_that_commits_nothing_is_an_error(bench: Bench) -> None:
    """As an engine would cause whose likeliest token is MASK."""
    backend = bench.open()
    bucket = backend._buckets[1, backend.lengths[-1]]
    bench.driver.graphs[bucket.graph] = []
    with pytest.raises(RuntimeError, match="nothing can be committed"):
        backend.advance(rows(bench.manifest, 1), backend.lengths[-1])
    assert backend.failure is None
    backend.close()


def test_profiles_batches_are_those_that_the_gpu_gains_by(bench: Bench) -> None:
    quarter, half, whole = ([(rows, length) for rows in (1, 2, 4, 8)] for length in (64, 128, 256))
    assert buckets(bench.manifest, 8) == [*quarter, *half[:3], *whole[:2]]
    assert len(buckets(bench.manifest, 132)) == 12
    assert batches_of(1024, 8) == (1,)


def test_profiles_bundle_beyond_the_kernels_is_refused_by_name(debug_bundle: Path) -> None:
    manifest = read_manifest(debug_bundle)
    for field, value in (("canvas_len", 1025), ("vocab_size", 65537)):
        large = msgspec.structs.replace(manifest, model=msgspec.structs.replace(manifest.model, **{field: value}))
        with pytest.raises(BundleError, match=f"{field} up to {value - 1}; this one has {value}"):
            check_servable(large)
    with pytest.raises(BundleError, match="top_k up to 256; this one has 257"):
        check_servable(msgspec.structs.replace(manifest, top_k=257))
