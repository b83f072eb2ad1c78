"""What both loops on the GPU share: a stream, the kernels, engines, and programs of one shape each that are captured
as CUDA graphs. Whatever a pass needs is allocated at the start; a pass costs the host one launch and one wait.
"""

import ctypes
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import ModuleType
from typing import Any, Protocol

from edge.backends.trt import kernels
from edge.backends.trt.driver import Gpu, Memory
from edge.backends.trt.engine_cache import Built
from edge.backends.trt.find_tensorrt import log_messages, make_logger
from shared.errors import DeviceError

log = logging.getLogger(__name__)

SCRATCH_BYTES = 256
"""The least that is given to an engine, which may need none."""


class EngineRejected(DeviceError):
    """TensorRT rejects the file: built by another version or on another GPU, or damaged."""


class Program(Protocol):
    """One shape. graph: an executable CUDA graph; None: the same launches one by one."""

    context: Any
    graph: Any

    @property
    def name(self) -> str:
        """Its shape, in words."""


class Captured(ABC):
    """Owns the context of the GPU from the first, and frees everything in reverse order of creation: whoever constructs
    one closes it when that fails. Not thread-safe.

    failure: why the device is out of service; None while it is healthy.
    """

    def __init__(self, trt: ModuleType, gpu: Gpu) -> None:
        self.failure: str | None = None
        self._gpu, self._trt = gpu, trt
        self._owned = ExitStack()
        self._owned.callback(gpu.close)
        self._programs: list[Program] = []

    def _begin(self, memory: Memory, built: Sequence[Built], names: tuple[str, ...]) -> None:
        """Stream, event, kernels and engines. Raises EngineRejected or DeviceError."""
        gpu, driver = self._gpu, self._gpu.driver
        gpu.use()
        self._stream = gpu.call("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._owned.callback(gpu.release, "cuStreamDestroy", self._stream)
        flags = driver.CUevent_flags  # blocking: the CPU sleeps while the GPU works
        self._event = gpu.call("cuEventCreate", flags.CU_EVENT_BLOCKING_SYNC | flags.CU_EVENT_DISABLE_TIMING)
        self._owned.callback(gpu.release, "cuEventDestroy", self._event)
        module = gpu.call("cuModuleLoadData", built[0].cubin)
        self._owned.callback(gpu.release, "cuModuleUnload", module)
        self._kernels = {name: gpu.call("cuModuleGetFunction", module, name.encode()) for name in names}

        logger = make_logger(self._trt, log_messages)
        runtime = self._trt.Runtime(logger)
        self._engines: list[Any] = [runtime.deserialize_cuda_engine(one.engine) for one in built]
        self._trt_objects: list[Any] = [logger, runtime, *self._engines]  # each must outlive those after it
        self._owned.callback(self._drop_trt_objects)
        if None in self._engines:
            raise EngineRejected(f"TensorRT {self._trt.__version__} rejects the cached engine")
        self._owned.callback(memory.free)
        self._scratch_bytes = max(SCRATCH_BYTES, *(one.device_memory_size_v2 for one in self._engines))
        self._scratch = memory.device(self._scratch_bytes)
        self._owned.callback(self._drop_programs)

    def _context(
        self,
        name: str,
        profile: int,
        *,
        inputs: Mapping[str, tuple[int, tuple[int, ...]]],
        outputs: Mapping[str, tuple[int, tuple[int, ...]]],
        engine: int = 0,
    ) -> Any:
        """An execution context for one shape; all share one scratch memory, since one runs at a time.

        inputs, outputs: address and shape by name. engine: its number.
        """
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engines[engine].create_execution_context(strategy)
        if context is None:
            raise DeviceError(f"TensorRT makes no execution context for {name}")
        context.set_device_memory(self._scratch, self._scratch_bytes)
        done = [("set_optimization_profile_async", context.set_optimization_profile_async(profile, int(self._stream)))]
        done += [(f"set_input_shape {n}", context.set_input_shape(n, shape)) for n, (_, shape) in inputs.items()]
        tensors = {**inputs, **outputs}
        done += [(f"set_tensor_address {n}", context.set_tensor_address(n, at)) for n, (at, _) in tensors.items()]
        for what, worked in done:
            if not worked:
                raise DeviceError(f"TensorRT refuses {what} for {name}")
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:  # the bindings' own check of the call
            raise DeviceError(f"TensorRT cannot infer the shapes of {name}: {error}") from None
        if missing:
            raise DeviceError(f"the engine has inputs that are not fed: {', '.join(missing)}")
        for output, (_, wanted) in outputs.items():
            if (found := tuple(context.get_tensor_shape(output))) != wanted:
                raise DeviceError(f"the engine gives {output} of shape {found}, not {wanted}")
        return context

    @abstractmethod
    def _enqueue(self, program: Program) -> None:
        """The program's launches, in the stream's order."""

    def _execute(self, program: Program) -> None:
        if not program.context.execute_async_v3(int(self._stream)):
            raise DeviceError(f"TensorRT cannot run {program.name}; its message is in the log")

    def _launch(self, kernel: str, grid: tuple[int, ...], pointers: tuple[int, ...], numbers: tuple[int, ...]) -> None:
        kinds = (ctypes.c_void_p,) * len(pointers) + (ctypes.c_int,) * len(numbers)
        arguments, blocks = ((*pointers, *numbers), kinds), (*grid, 1, 1)[:3]
        function = self._kernels[kernel]
        self._gpu.call("cuLaunchKernel", function, *blocks, kernels.THREADS, 1, 1, 0, self._stream, arguments, 0)

    def _wait(self) -> None:
        self._gpu.call("cuEventRecord", self._event, self._stream)
        self._gpu.call("cuEventSynchronize", self._event)

    def _warm_up(self, program: Program, capture: bool) -> None:
        """Run a program once plainly (TensorRT loads lazily), then capture it; where capture fails it stays plain."""
        self._programs.append(program)
        self._enqueue(program)
        self._wait()
        if not capture:
            return
        call, graph = self._gpu.call, None
        mode = self._gpu.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        try:
            call("cuStreamBeginCapture", self._stream, mode)
            try:
                self._enqueue(program)
            finally:
                graph = call("cuStreamEndCapture", self._stream)
            program.graph = call("cuGraphInstantiate", graph, 0)
        except DeviceError as error:
            log.warning("no CUDA graph for %s, its steps are enqueued one by one: %s", program.name, str(error))
        finally:
            if graph is not None:
                self._gpu.release("cuGraphDestroy", graph)

    def _run(self, program: Program) -> None:
        """One pass, until it is done. A DeviceError is for good: `failure` says why."""
        try:
            if program.graph is not None:
                self._gpu.call("cuGraphLaunch", program.graph, self._stream)
            else:
                self._enqueue(program)
            self._wait()
        except DeviceError as error:
            self._fail(error)
            raise

    def _fail(self, error: DeviceError) -> None:
        self.failure = str(error)
        log.error("the TensorRT backend is out of service: %s", str(error))

    def _check_healthy(self) -> None:
        if self.failure is not None:
            raise DeviceError(f"the GPU has failed before: {self.failure}")

    def _drop_programs(self) -> None:
        """Graphs, and contexts before the engine."""
        for program in self._programs:
            if program.graph is not None:
                self._gpu.release("cuGraphExecDestroy", program.graph)
        self._programs.clear()

    def _drop_trt_objects(self) -> None:
        self._engines.clear()
        while self._trt_objects:
            self._trt_objects.pop()

    def close(self) -> None:
        """Free everything, from any thread."""
        self._gpu.release("cuCtxSetCurrent", self._gpu.context)
        self._owned.close()
