"""TensorRT, with the whole unmasking loop on the GPU: the engine computes logits, two custom kernels sample and commit.

Each denoising step is one CUDA graph launch: engine, draw, commit. The host writes a row once, when its request joins,
then launches, waits on one event and reads the canvas from mapped memory. B: rows, L: length, V: vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge.backends.trt import build_process, kernels
from edge.backends.trt import engine_cache as engines
from edge.backends.trt.blocks import TrtBlocks
from edge.backends.trt.captured import Captured, EngineRejected, Program
from edge.backends.trt.conditioned_blocks import TrtConditionedBlocks
from edge.backends.trt.driver import CudaMemory, Gpu, Memory, PycudaMemory
from edge.backends.trt.engine_builder import Order
from edge.backends.trt.find_tensorrt import import_tensorrt
from edge.backends.trt.profiles import BATCHES, batches_of, buckets, check_servable, length_buckets, reads_memory
from edge.decoding.types import Row
from shared.errors import ConfigError, DeviceError
from shared.manifest import CONDITIONED_ROLES, MAX_STEPS, Manifest, Role, find_graph, graph_bytes
from shared.schedule import SCHEDULES, time_of_masked_fraction
from shared.tokens import MASK

log = logging.getLogger(__name__)


class NoEngine(DeviceError):
    """None was built for this graph on this device."""


@dataclass(eq=False)
class Bucket:
    """The program of one shape. The arrays are views of mapped memory that all buckets share."""

    batch: int
    length: int
    context: Any
    canvas: NDArray[np.int32]  # (B, L)
    fill: NDArray[np.uint8]  # (B, L)
    graph: Any = None

    @property
    def name(self) -> str:
        """See `Program`."""
        return f"{self.batch} × {self.length}"


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


class TrtBackend(Captured):
    """A LoopBackend. Allocates all memory at the start; a step allocates nothing and waits on one event only."""

    def __init__(self, trt: ModuleType, gpu: Gpu, *, memory: Memory, manifest: Manifest, built: engines.Built) -> None:
        """Load an engine built for this GPU's `buckets` and the compiled kernels, and warm every bucket up.

        Raises EngineRejected when TensorRT rejects the engine, BundleError, or DeviceError for any other failure.
        """
        super().__init__(trt, gpu)
        self.lengths = length_buckets(manifest.model.canvas_len)
        self.batches: tuple[int, ...] = BATCHES
        self._manifest = manifest
        try:
            check_servable(manifest)
            self._load(memory, built)
        except BaseException:
            self.close()
            raise

    def _load(self, memory: Memory, built: engines.Built) -> None:
        model = self._manifest.model
        self._begin(memory, (built,), (kernels.DRAW, kernels.COMMIT))
        shapes, rows = buckets(self._manifest, self._gpu.processors), BATCHES[-1]
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
        )
        self._rows = records[0].view(kernels.ROW)
        self._ratios = ratios[0].view(np.float64).reshape(rows, self._ratio_stride)
        self._t = t[0].view(np.float32)
        self._placed: list[Row | None] = [None] * rows
        self._current: Bucket | None = None
        self._buckets: dict[tuple[int, int], Bucket] = {}
        self._owned.callback(self._buckets.clear)
        for profile, (batch, length) in enumerate(shapes):
            places = batch * length
            seen_canvas = canvas[0].view(np.int32)[:places].reshape(batch, length)
            seen_fill = fill[0][:places].reshape(batch, length)
            inputs = {"canvas": (self._at.canvas, (batch, length))} | (
                {"t": (self._at.t, (batch,))} if model.time_input else {}
            )
            outputs = {"logits": (self._at.logits, (batch, length, model.vocab_size))}
            context = self._context(f"{batch} × {length}", profile, inputs=inputs, outputs=outputs)
            self._buckets[batch, length] = Bucket(batch, length, context, seen_canvas, seen_fill)
        for bucket in self._buckets.values():
            self._warm_up(bucket, capture=memory.graphs)

    def _enqueue(self, program: Program) -> None:
        """Engine, draw, commit, in the stream's order."""
        assert isinstance(program, Bucket)
        self._execute(program)
        self._launch_draw(program)
        self._launch_commit(program)

    def _launch_draw(self, bucket: Bucket) -> None:
        at, numbers = self._at, (bucket.length, self._manifest.model.vocab_size)
        pointers = (at.logits, at.canvas, at.fill, at.rows, at.candidates)
        self._launch(kernels.DRAW, (bucket.length, bucket.batch), pointers, numbers)

    def _launch_commit(self, bucket: Bucket) -> None:
        at, manifest = self._at, self._manifest
        pointers = (at.canvas, at.fill, at.rows, at.ratios, at.candidates, at.t)
        schedule = SCHEDULES.index(manifest.schedule)
        numbers = (bucket.length, self._ratio_stride, manifest.model.canvas_len, schedule)
        self._launch(kernels.COMMIT, (bucket.batch, 1), pointers, numbers)

    def advance(self, rows: Sequence[Row], length: int) -> None:
        """One step of up to eight rows, in several batches where a larger one would be no faster; see LoopBackend."""
        self._check_healthy()
        batches = batches_of(length, self._gpu.processors)
        for first in range(0, len(rows), batches[-1]):
            some = rows[first : first + batches[-1]]
            self._step(some, self._buckets[next(b for b in batches if b >= len(some)), length])

    def _step(self, rows: Sequence[Row], bucket: Bucket) -> None:
        left = [row.left for row in rows]
        try:
            self._gpu.use()
        except DeviceError as error:
            self._fail(error)
            raise
        self._place(rows, bucket)
        self._run(bucket)
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


def load(folder: Path, manifest: Manifest, argument: str) -> TrtBackend:
    """The canvas backend on this machine's GPU, with the engine that `edge.build` has built; see `_load`."""

    def make(trt: ModuleType, gpu: Gpu, memory: Memory, built: Sequence[engines.Built]) -> TrtBackend:
        return TrtBackend(trt, gpu, memory=memory, manifest=manifest, built=built[0])

    return _load(folder, manifest, argument=argument, roles=("canvas",), make=make)


def load_blocks(folder: Path, manifest: Manifest, argument: str) -> TrtBlocks:
    """The same for blocks; with the engines of the encoders where its rows read a memory of conditions."""
    step = find_graph(folder, manifest, "cuda", "step")
    graph = graph_bytes(folder, manifest, step)

    takes = manifest.conditions is not None and reads_memory(step)
    kind = TrtConditionedBlocks if takes else TrtBlocks

    def make(trt: ModuleType, gpu: Gpu, memory: Memory, built: Sequence[engines.Built]) -> TrtBlocks:
        return kind(trt, gpu, memory=memory, manifest=manifest, step=step, graph=graph, built=built)

    roles: tuple[Role, ...] = ("step", *CONDITIONED_ROLES["cuda"] * takes)
    return _load(folder, manifest, argument=argument, roles=roles, make=make)


Made = TypeVar("Made")


def _load(
    folder: Path,
    manifest: Manifest,
    *,
    argument: str,
    roles: Sequence[Role],
    make: Callable[[ModuleType, Gpu, Memory, Sequence[engines.Built]], Made],
) -> Made:
    """A backend of those roles' engines, which are built again, once, when TensorRT rejects one.

    argument: "" for memory from the driver, "pycuda" for memory from pycuda. Raises ConfigError, BundleError or
    DeviceError.
    """
    if argument not in ("", "pycuda"):
        raise ConfigError(f"backend 'trt' takes nothing or 'pycuda' after its colon; found {argument!r}")
    check_servable(manifest)

    def start(gpu: Gpu) -> Made:
        with ExitStack() as on_failure:
            on_failure.callback(gpu.close)
            memory: Memory = PycudaMemory() if argument else CudaMemory(gpu)
            built = [engines.load(place) for place in places.values()]
            on_failure.pop_all()
        return make(trt, gpu, memory, built)  # the backend closes it from here on

    gpu, places = Gpu(), dict[Role, Path]()  # first: without a driver, TensorRT crashes instead of saying so
    with ExitStack() as on_failure:
        on_failure.callback(gpu.close)
        trt = import_tensorrt()
        for role in roles:
            facts = engines.facts_of(folder, manifest, tensorrt=trt.__version__, gpu=gpu, role=role)
            place = engines.find(facts, engines.cache_folders())
            if place is None:
                raise NoEngine(f"no engine for this bundle on this device: run python -m edge.build --bundle {folder}")
            places[role] = place
        on_failure.pop_all()
    try:
        return start(gpu)
    except EngineRejected as error:
        log.warning("%s: building it again, which takes minutes", str(error))
    bundle = str(folder.absolute())
    for role, place in places.items():
        order = Order(bundle, str(place.parent), build_process.WORKSPACE_MIB, force=True, role=role)
        build_process.run_build(order, log.info)
    return start(Gpu())
