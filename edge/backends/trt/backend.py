"""TensorRT, with the whole unmasking loop on the GPU: the engine computes logits, two custom kernels sample and commit.

Each denoising step is one CUDA graph launch: engine, draw, commit. The host writes a row once, when its request joins,
then launches, waits on one event and reads the canvas from mapped memory. B: rows, L: length, V: vocabulary.
"""

import ctypes
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.trt import build_process, kernels
from edge.backends.trt import engine_cache as engines
from edge.backends.trt.driver import CudaMemory, Gpu, Memory, PycudaMemory
from edge.backends.trt.engine_builder import Order
from edge.backends.trt.find_tensorrt import import_tensorrt, log_messages, make_logger
from edge.backends.trt.profiles import BATCHES, batches_of, buckets, check_servable, length_buckets
from edge.decoding.types import Row
from shared.errors import ConfigError, DeviceError
from shared.manifest import MAX_STEPS, Manifest
from shared.schedule import SCHEDULES, time_of_masked_fraction
from shared.tokens import MASK

log = logging.getLogger(__name__)


class EngineRejected(DeviceError):
    """TensorRT rejects the file: built by another version or on another GPU, or damaged."""


@dataclass(eq=False)
class Bucket:
    """The program of one shape. The arrays are views of mapped memory that all buckets share."""

    batch: int
    length: int
    context: Any
    canvas: NDArray[np.int32]  # (B, L)
    fill: NDArray[np.uint8]  # (B, L)
    graph: Any = None  # an executable CUDA graph; without one, the same three launches one by one


@dataclass(frozen=True)
class Addresses:
    """Device addresses of what the kernels read and write."""

    canvas: int
    fill: int
    rows: int
    ratios: int
    t: int
    logits: int
    candidates: int
    scratch: int


class TrtBackend:
    """A LoopBackend. Allocates all memory at the start; a step allocates nothing and waits on one event only."""

    def __init__(self, trt: ModuleType, gpu: Gpu, *, memory: Memory, manifest: Manifest, built: engines.Built) -> None:
        """Load an engine built for this GPU's `buckets` and the compiled kernels, and warm every bucket up.

        Raises EngineRejected when TensorRT rejects the engine, DeviceError for any other failure.
        """
        check_servable(manifest)
        self.lengths = length_buckets(manifest.model.canvas_len)
        self.batches: tuple[int, ...] = BATCHES
        self.failure: str | None = None
        self._gpu, self._manifest, self._trt = gpu, manifest, trt
        self._owned = ExitStack()
        try:
            self._load(memory, built)
        except BaseException:
            self.close()
            raise

    def _load(self, memory: Memory, built: engines.Built) -> None:
        gpu, driver, model = self._gpu, self._gpu.driver, self._manifest.model
        self._owned.callback(gpu.close)
        gpu.use()
        self._stream = gpu.call("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._owned.callback(gpu.release, "cuStreamDestroy", self._stream)
        flags = driver.CUevent_flags  # blocking: the CPU sleeps while the GPU works
        self._event = gpu.call("cuEventCreate", flags.CU_EVENT_BLOCKING_SYNC | flags.CU_EVENT_DISABLE_TIMING)
        self._owned.callback(gpu.release, "cuEventDestroy", self._event)
        module = gpu.call("cuModuleLoadData", built.cubin)
        self._owned.callback(gpu.release, "cuModuleUnload", module)
        self._draw = gpu.call("cuModuleGetFunction", module, kernels.DRAW.encode())
        self._commit = gpu.call("cuModuleGetFunction", module, kernels.COMMIT.encode())

        logger = make_logger(self._trt, log_messages)
        runtime = self._trt.Runtime(logger)
        loaded = runtime.deserialize_cuda_engine(built.engine)
        if loaded is None:
            raise EngineRejected(f"TensorRT {self._trt.__version__} rejects the cached engine")
        self._engine: Any = loaded
        self._trt_objects: list[Any] = [logger, runtime, loaded]  # each must outlive those after it
        self._owned.callback(self._drop_trt_objects)

        self._owned.callback(memory.free)
        shapes, rows = buckets(self._manifest, gpu.processors), BATCHES[-1]
        most = max(batch * length for batch, length in shapes)
        self._ratio_stride = max(MAX_STEPS, model.canvas_len)
        canvas, fill, records, ratios, t = (
            memory.mapped(size)
            for size in (most * 4, most, rows * kernels.ROW.itemsize, rows * self._ratio_stride * 8, rows * 4)
        )
        self._at = Addresses(
            canvas[1],
            fill[1],
            records[1],
            ratios[1],
            t[1],
            logits=memory.device(most * model.vocab_size * 2),
            candidates=memory.device(most * kernels.CANDIDATE.itemsize),
            scratch=memory.device(max(256, loaded.device_memory_size_v2)),
        )
        self._rows = records[0].view(kernels.ROW)
        self._ratios = ratios[0].view(np.float64).reshape(rows, self._ratio_stride)
        self._t = t[0].view(np.float32)
        self._placed: list[Row | None] = [None] * rows
        self._current: Bucket | None = None
        self._buckets: dict[tuple[int, int], Bucket] = {}
        self._owned.callback(self._drop_buckets)
        for profile, (batch, length) in enumerate(shapes):
            places = batch * length
            seen_canvas = canvas[0].view(np.int32)[:places].reshape(batch, length)
            seen_fill = fill[0][:places].reshape(batch, length)
            context = self._context(profile, batch, length)
            self._buckets[batch, length] = Bucket(batch, length, context, seen_canvas, seen_fill)
        for bucket in self._buckets.values():
            self._warm_up(bucket, capture=memory.graphs)

    def _context(self, profile: int, batch: int, length: int) -> Any:
        """An execution context for one shape; all share one scratch memory, since one runs at a time."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise DeviceError(f"TensorRT makes no execution context for {batch} × {length}")
        context.set_device_memory(self._at.scratch, max(256, self._engine.device_memory_size_v2))
        addresses = {"canvas": self._at.canvas, "logits": self._at.logits}
        shapes: dict[str, tuple[int, ...]] = {"canvas": (batch, length)}
        if self._manifest.model.time_input:
            addresses["t"], shapes["t"] = self._at.t, (batch,)
        done = [("set_optimization_profile_async", context.set_optimization_profile_async(profile, int(self._stream)))]
        done += [(f"set_input_shape {name}", context.set_input_shape(name, shape)) for name, shape in shapes.items()]
        done += [(f"set_tensor_address {n}", context.set_tensor_address(n, at)) for n, at in addresses.items()]
        for what, worked in done:
            if not worked:
                raise DeviceError(f"TensorRT refuses {what} for {batch} × {length}")
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:  # the bindings' own check of the call
            raise DeviceError(f"TensorRT cannot infer the shapes of {batch} × {length}: {error}") from None
        if missing:
            raise DeviceError(f"the engine has inputs that are not fed: {', '.join(missing)}")
        wanted = (batch, length, self._manifest.model.vocab_size)
        if (found := tuple(context.get_tensor_shape("logits"))) != wanted:
            raise DeviceError(f"the engine gives logits of shape {found}, not {wanted}")
        return context

    def _warm_up(self, bucket: Bucket, capture: bool) -> None:
        """Run the bucket once plainly (TensorRT loads lazily), then capture it; where capture fails it stays plain."""
        self._enqueue(bucket)
        self._wait()
        if not capture:
            return
        call, graph = self._gpu.call, None
        mode = self._gpu.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        try:
            call("cuStreamBeginCapture", self._stream, mode)
            try:
                self._enqueue(bucket)
            finally:
                graph = call("cuStreamEndCapture", self._stream)
            bucket.graph = call("cuGraphInstantiate", graph, 0)
        except DeviceError as error:
            name = f"{bucket.batch} × {bucket.length}"
            log.warning("no CUDA graph for %s, its steps are enqueued one by one: %s", name, str(error))
        finally:
            if graph is not None:
                self._gpu.release("cuGraphDestroy", graph)

    def _enqueue(self, bucket: Bucket) -> None:
        """Engine, draw, commit, in the stream's order."""
        if not bucket.context.execute_async_v3(int(self._stream)):
            raise DeviceError(f"TensorRT cannot run {bucket.batch} × {bucket.length}; its message is in the log")
        self._launch_draw(bucket)
        self._launch_commit(bucket)

    def _launch_draw(self, bucket: Bucket) -> None:
        at, numbers = self._at, (bucket.length, self._manifest.model.vocab_size)
        pointers = (at.logits, at.canvas, at.fill, at.rows, at.candidates)
        self._launch(self._draw, (bucket.length, bucket.batch), pointers, numbers)

    def _launch_commit(self, bucket: Bucket) -> None:
        at, manifest = self._at, self._manifest
        pointers = (at.canvas, at.fill, at.rows, at.ratios, at.candidates, at.t)
        schedule = SCHEDULES.index(manifest.schedule)
        numbers = (bucket.length, self._ratio_stride, manifest.model.canvas_len, schedule)
        self._launch(self._commit, (bucket.batch, 1), pointers, numbers)

    def _launch(self, kernel: Any, grid: tuple[int, int], pointers: tuple[int, ...], numbers: tuple[int, ...]) -> None:
        kinds = (ctypes.c_void_p,) * len(pointers) + (ctypes.c_int,) * len(numbers)
        arguments = ((*pointers, *numbers), kinds)
        self._gpu.call("cuLaunchKernel", kernel, *grid, 1, kernels.THREADS, 1, 1, 0, self._stream, arguments, 0)

    def _wait(self) -> None:
        self._gpu.call("cuEventRecord", self._event, self._stream)
        self._gpu.call("cuEventSynchronize", self._event)

    def advance(self, rows: Sequence[Row], length: int) -> None:
        """One step of up to eight rows, in several batches where a larger one would be no faster; see LoopBackend."""
        if self.failure is not None:
            raise DeviceError(f"the GPU has failed before: {self.failure}")
        batches = batches_of(length, self._gpu.processors)
        for first in range(0, len(rows), batches[-1]):
            some = rows[first : first + batches[-1]]
            self._step(some, self._buckets[next(b for b in batches if b >= len(some)), length])

    def _step(self, rows: Sequence[Row], bucket: Bucket) -> None:
        left = [row.left for row in rows]
        try:
            self._gpu.use()
            self._place(rows, bucket)
            if bucket.graph is not None:
                self._gpu.call("cuGraphLaunch", bucket.graph, self._stream)
            else:
                self._enqueue(bucket)
            self._wait()
        except DeviceError as error:
            self.failure = str(error)
            log.error("the TensorRT backend is out of service: %s", str(error))
            raise
        if self._rows["broken"][: len(rows)].any():  # a fault of the network, not of the GPU
            self._current = None  # discards the device's copy of the rows
            raise DeviceError("the engine's logits are not all numbers: FP16 overflows in this network")
        for i, row in enumerate(rows):
            row.canvas[: bucket.length] = bucket.canvas[i]
            row.step = int(self._rows["step"][i])
            row.recount()
        for row, before in zip(rows, left, strict=True):
            row.check_progress(before)

    def _place(self, rows: Sequence[Row], bucket: Bucket) -> None:
        """Write rows that are not in their places yet, and clear unused places."""
        if bucket is not self._current:  # another shape arranges the same memory differently
            self._current, self._placed = bucket, [None] * BATCHES[-1]
            bucket.fill[:] = 0
        for i in range(bucket.batch):
            row = rows[i] if i < len(rows) else None
            if row is self._placed[i]:
                continue
            self._placed[i] = row
            if row is None:
                bucket.fill[i] = 0
                continue
            bucket.canvas[i] = row.canvas[: bucket.length]
            bucket.fill[i] = row.fill[: bucket.length]
            self._rows[i] = kernels.row_of(row.sampling, row.step)
            table = kernels.ratios(row.sampling.steps)
            self._ratios[i, : table.size] = table
            masked = np.count_nonzero(row.canvas == MASK) / (row.canvas.size - 1)
            self._t[i] = time_of_masked_fraction(self._manifest.schedule, masked)

    def _drop_buckets(self) -> None:
        for bucket in self._buckets.values():
            if bucket.graph is not None:
                self._gpu.release("cuGraphExecDestroy", bucket.graph)
        self._buckets.clear()  # contexts before the engine
        self._placed.clear()

    def _drop_trt_objects(self) -> None:
        self._engine = None
        while self._trt_objects:
            self._trt_objects.pop()

    def close(self) -> None:
        """Free everything in reverse order of creation, from any thread."""
        self._gpu.release("cuCtxSetCurrent", self._gpu.context)
        self._owned.close()


def load(folder: Path, manifest: Manifest, argument: str) -> TrtBackend:
    """The backend on this machine's GPU, with the engine that `edge.build` has built.

    argument: "" for memory from the driver, "pycuda" for memory from pycuda. An engine that TensorRT rejects is built
    again, once. Raises ConfigError, BundleError or DeviceError.
    """
    if argument not in ("", "pycuda"):
        raise ConfigError(f"backend 'trt' takes nothing or 'pycuda' after its colon; found {argument!r}")
    check_servable(manifest)
    gpu = Gpu()  # first: without a driver, TensorRT crashes instead of saying so
    with ExitStack() as on_failure:
        on_failure.callback(gpu.close)
        trt = import_tensorrt()
        facts = engines.facts_of(folder, manifest, trt.__version__, gpu)
        place = engines.find(facts, engines.cache_folders())
        if place is None:
            raise DeviceError(f"no engine for this bundle on this device: run python -m edge.build --bundle {folder}")
        memory: Memory = PycudaMemory() if argument else CudaMemory(gpu)
        built = engines.load(place)
        on_failure.pop_all()  # the backend's from here on
    try:
        return TrtBackend(trt, gpu, memory=memory, manifest=manifest, built=built)
    except EngineRejected as error:
        log.warning("%s: building it again, which takes minutes", str(error))
    order = Order(str(folder.absolute()), str(place.parent), build_process.WORKSPACE_MIB, force=True)
    build_process.run_build(order, log.info)
    gpu = Gpu()
    memory = PycudaMemory() if argument else CudaMemory(gpu)
    return TrtBackend(trt, gpu, memory=memory, manifest=manifest, built=engines.load(place))
