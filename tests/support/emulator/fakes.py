"""A CUDA driver and a TensorRT that record every call and do the work on this processor.

Device memory is this process's memory, kernels are the emulator's, and the engine is the bundle's own CUDA graph run
by ONNX Runtime: the backend above them is the real one, and what it generates is real.
"""

import ctypes
import gc
from collections import Counter
from collections.abc import Callable
from enum import Enum, IntEnum, IntFlag
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge.backends.trt import kernels
from tests.support.emulator import Emulator


class Result(Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900


class EventFlags(IntFlag):
    CU_EVENT_BLOCKING_SYNC = 1
    CU_EVENT_DISABLE_TIMING = 2


class Attribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


NUMPY = {"tensor(int32)": np.int32, "tensor(float)": np.float32, "tensor(float16)": np.float16}
STALE = b"an engine of another TensorRT"
PROCESSORS = 8  # as an Orin Nano has, and the major version of its architecture, too

MAKES = {
    "cuDevicePrimaryCtxRetain": "cuDevicePrimaryCtxRelease", "cuStreamCreate": "cuStreamDestroy",
    "cuEventCreate": "cuEventDestroy", "cuModuleLoadData": "cuModuleUnload", "cuMemAlloc": "cuMemFree",
    "cuMemHostAlloc": "cuMemFreeHost", "cuStreamEndCapture": "cuGraphDestroy",
    "cuGraphInstantiate": "cuGraphExecDestroy",
}  # fmt: skip
"""Function that makes something → function that must free it."""


def array_at(address: int, dtype: Any, *shape: int) -> NDArray[Any]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)


class FakeDriver:
    """Stands for the module cuda.bindings.driver."""

    CUresult = Result
    CUdevice_attribute = Attribute
    CUevent_flags = EventFlags
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CU_MEMHOSTALLOC_DEVICEMAP = 2

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.calls: list[str] = []
        self.fails: dict[str, Result] = {}  # function → the code it gives from now on
        self.live: dict[str, set[int]] = {}  # function that frees → handles it has yet to free
        self.buffers: dict[int, Any] = {}
        self.checked = Counter[str]()  # codes that somebody compared
        self.capturing: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self._next = 1000

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        work = getattr(self, f"_{name}", lambda *arguments: ())

        def function(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            code = Code(self, name, self.fails.get(name, Result.CUDA_SUCCESS))
            if code.result is not Result.CUDA_SUCCESS:
                if name == "cuStreamEndCapture":
                    self.capturing = None
                return (code, None)
            values: Any = work(*arguments)
            if name in MAKES:
                self.live.setdefault(MAKES[name], set()).add(int(values[0]))
            if name in MAKES.values():
                self.live[name].remove(int(arguments[0]))  # KeyError: freed twice, or never made
            return (code, *values)

        return function

    def _handle(self) -> tuple[int]:
        self._next += 1
        return (self._next,)

    def run(self, work: Callable[[], None]) -> None:
        """What a stream does: now, or later when it is being recorded."""
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def _cuDeviceGetCount(self) -> tuple[int]:
        return (1,)

    def _cuDeviceGet(self, ordinal: int) -> tuple[int]:
        return (7,)

    def _cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int]:
        return (device,)

    def _cuDeviceGetName(self, size: int, device: int) -> tuple[bytes]:
        return (b"Orin".ljust(size, b"\0"),)

    def _cuDeviceGetAttribute(self, which: Attribute, device: int) -> tuple[int]:
        return ({Attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: 7}.get(which, PROCESSORS),)  # sm_87

    def _cuDriverGetVersion(self) -> tuple[int]:
        return (12060,)

    def _cuMemGetInfo(self) -> tuple[int, int]:
        return (1 << 30, 8 << 30)

    def _cuStreamCreate(self, flags: int) -> tuple[int]:
        assert flags == 1, "the legacy stream waits for every other"
        return self._handle()

    def _cuEventCreate(self, flags: int) -> tuple[int]:
        assert flags & EventFlags.CU_EVENT_BLOCKING_SYNC
        return self._handle()

    def _cuModuleLoadData(self, cubin: bytes) -> tuple[int]:
        return self._handle()

    def _cuModuleGetFunction(self, module: int, name: bytes) -> tuple[str]:
        return (name.decode(),)

    def _cuMemAlloc(self, size: int) -> tuple[int]:
        assert self.capturing is None, "memory is taken while a stream is captured"
        buffer = (ctypes.c_uint8 * (size + 256))()
        ctypes.memset(buffer, 0xFF, size + 256)  # no number in FP16: a device's memory is not zeroed either
        address = -(-ctypes.addressof(buffer) // 256) * 256
        self.buffers[address] = buffer
        return (address,)

    def _cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> tuple[()]:
        assert address in self.buffers

        def fill() -> None:
            ctypes.memset(address, value, size)

        self.run(fill)
        return ()

    def _cuMemcpyHtoD(self, address: int, host: int, size: int) -> tuple[()]:
        assert self.capturing is None, "a copy that waits, while a stream is captured"
        assert address in self.buffers
        ctypes.memmove(address, host, size)
        return ()

    def _cuEventRecord(self, event: int, stream: int) -> tuple[()]:
        assert self.capturing is None, "an event of the host's in a captured stream"
        return ()

    def _cuEventSynchronize(self, event: int) -> tuple[()]:
        assert self.capturing is None, "waiting for a stream that is being captured"
        return ()

    def _cuMemHostAlloc(self, size: int, flags: int) -> tuple[int]:
        assert flags == self.CU_MEMHOSTALLOC_DEVICEMAP
        return self._cuMemAlloc(size)

    def _cuMemHostGetDevicePointer(self, host: int, flags: int) -> tuple[int]:
        return (host,)

    def _cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[()]:
        assert self.capturing is None, "a stream is captured twice"
        self.capturing = []
        return ()

    def _cuStreamEndCapture(self, stream: int) -> tuple[int]:
        (graph,) = self._handle()
        assert self.capturing is not None
        self.graphs[graph], self.capturing = self.capturing, None
        return (graph,)

    def _cuGraphInstantiate(self, graph: int, flags: int) -> tuple[int]:
        (executable,) = self._handle()
        self.graphs[executable] = self.graphs[graph]
        return (executable,)

    def _cuGraphDestroy(self, graph: int) -> tuple[()]:
        del self.graphs[graph]
        return ()

    _cuGraphExecDestroy = _cuGraphDestroy

    def _cuGraphLaunch(self, graph: int, stream: int) -> tuple[()]:
        assert self.capturing is None and graph in self.live["cuGraphExecDestroy"], "not an executable graph"
        for work in self.graphs[graph]:
            work()
        return ()

    def _cuLaunchKernel(self, function: str, *rest: Any) -> tuple[()]:
        gx, gy, gz, threads, _, _, _, _, (values, kinds), _ = rest
        assert threads == kernels.THREADS
        assert len(values) == len(kinds)
        assert min(gx, gy, gz) >= 1 and max(gy, gz) <= 65535
        self.run(lambda: self.emulator.launch(function, (gx, gy, gz), values))
        return ()


class Code:
    """A driver's return code that notices whether anybody looks at it."""

    def __init__(self, driver: FakeDriver, name: str, result: Result) -> None:
        self._driver, self._name, self.result = driver, name, result
        self.name = result.name

    def __eq__(self, other: object) -> bool:
        self._driver.checked[self._name] += 1
        return self.result is other

    __hash__ = None  # type: ignore[assignment]


class FakeTensorRT:
    """Stands for the module tensorrt; engines are ONNX graphs."""

    __version__ = "10.3.0"

    class ILogger:
        Severity = Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])

        def __init__(self, _: object = None) -> None:
            pass

    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")

    def __init__(self, driver: FakeDriver, shapes: list[tuple[int, int]]) -> None:
        self.driver, self.shapes = driver, shapes
        self.live: list[str] = []
        self.profiles: set[int] = set()  # that a context was made for
        self.refuses: set[str] = set()
        self.runs = 0
        outer = self

        class Counted:
            def __init__(self, *_: object) -> None:
                outer.live.append(type(self).__name__)

            def __del__(self) -> None:
                outer.live.remove(type(self).__name__)

        class Runtime(Counted):
            def deserialize_cuda_engine(self, engine: bytes) -> Any:
                outer.profiles.clear()
                return None if "engine" in outer.refuses or engine == STALE else Engine(engine)

        class Engine(Counted):
            device_memory_size_v2 = 4096

            def __init__(self, graph: bytes) -> None:
                super().__init__()
                options = ort.SessionOptions()
                options.log_severity_level = 3
                self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
                self.inputs = {value.name: value for value in self.session.get_inputs()}
                self.outputs = {value.name: value for value in self.session.get_outputs()}

            def create_execution_context(self, strategy: str) -> Any:
                assert strategy == "user managed"
                return Context(self)

        class Context(Counted):
            """One shape for good: whoever captured it must not find another one in its place."""

            def __init__(self, engine: Engine) -> None:
                super().__init__()
                self.engine, self.at, self.shape = engine, dict[str, int](), dict[str, tuple[int, ...]]()
                self.profile: int | None = None
                self.scratch = False
                self.enqueued = 0

            def changes(self) -> None:
                assert outer.driver.capturing is None, "a context is changed while a stream is captured"
                assert not self.enqueued, "a context that was run is reused for another shape or address"

            def set_device_memory(self, address: int, size: int) -> None:
                self.changes()
                assert size >= 4096
                assert address in outer.driver.buffers
                self.scratch = True

            def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
                self.changes()
                assert not self.shape, "shapes are those of a profile: it comes first"
                assert profile not in outer.profiles, "two contexts of one profile"
                outer.profiles.add(profile)
                self.profile = profile
                return profile < len(outer.shapes)

            def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
                self.changes()
                assert self.profile is not None, "a shape before its profile"
                free = iter(outer.shapes[self.profile])
                wanted = tuple(next(free) if isinstance(d, str) else d for d in self.engine.inputs[name].shape)
                self.shape[name] = shape
                return shape == wanted and "shape" not in outer.refuses

            def set_tensor_address(self, name: str, address: int) -> bool:
                self.changes()
                assert name in self.engine.inputs or name in self.engine.outputs
                assert address % 256 == 0, f"{name} lies at an address that TensorRT refuses"
                self.at[name] = address
                return True

            def infer_shapes(self) -> list[str]:
                return [name for name in self.engine.inputs if name not in self.shape]

            def get_tensor_shape(self, name: str) -> tuple[int, ...]:
                sizes: dict[str, int] = {}
                for value in self.engine.inputs.values():
                    sizes |= {
                        d: n for d, n in zip(value.shape, self.shape[value.name], strict=True) if isinstance(d, str)
                    }
                return tuple(sizes[d] if isinstance(d, str) else d for d in self.engine.outputs[name].shape)

            def execute_async_v3(self, stream: int) -> bool:
                assert self.scratch and {*self.engine.inputs, *self.engine.outputs} == set(self.at), "unbound tensors"
                assert not self.infer_shapes(), "inputs without a shape"
                if "capture" in outer.refuses and outer.driver.capturing is not None:
                    return False
                assert self.enqueued or outer.driver.capturing is None, (
                    "captured before it ever ran: TensorRT loads lazily"
                )
                self.enqueued += 1
                outer.driver.run(self.run)
                return "enqueue" not in outer.refuses

            def run(self) -> None:
                outer.runs += 1
                feed = {
                    name: array_at(self.at[name], NUMPY[value.type], *self.shape[name])
                    for name, value in self.engine.inputs.items()
                }
                for name, array in feed.items():
                    if array.dtype == np.float16:
                        assert np.isfinite(array).all(), f"{name} holds what was never written"
                made = self.engine.session.run(list(self.engine.outputs), feed)
                for name, array in zip(self.engine.outputs, made, strict=True):
                    array_at(self.at[name], array.dtype, *array.shape)[...] = array

        self.Runtime = Runtime

    def nothing_lives(self) -> bool:
        gc.collect()
        return not self.live
