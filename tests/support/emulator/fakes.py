"""A CUDA driver that records every call and does the work on this processor; a TensorRT goes with it.

Device memory is this process's memory, kernels are the emulator's, and the engine is the bundle's own CUDA graph run
by ONNX Runtime: the backend above them is the real one, and what it generates is real. What a device would refuse, or
do wrong without a word, is an AssertionError here; test_recording_driver tries each.
"""

import bisect
import ctypes
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum, IntEnum, IntFlag
from types import SimpleNamespace
from typing import Any

import numpy as np
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


STALE = b"an engine of another TensorRT"
PROCESSORS = 8  # as an Orin Nano has, and the major version of its architecture, too

MAKES = {
    "cuDevicePrimaryCtxRetain": "cuDevicePrimaryCtxRelease",
    "cuStreamCreate": "cuStreamDestroy",
    "cuEventCreate": "cuEventDestroy",
    "cuModuleLoadData": "cuModuleUnload",
    "cuMemAlloc": "cuMemFree",
    "cuMemHostAlloc": "cuMemFreeHost",
    "cuStreamEndCapture": "cuGraphDestroy",
    "cuGraphInstantiate": "cuGraphExecDestroy",
}
"""Function that makes something → function that must free it."""

PARAMETERS = {
    "cuInit": 1,
    "cuDeviceGetCount": 0,
    "cuDeviceGet": 1,
    "cuDeviceGetName": 2,
    "cuDeviceGetAttribute": 2,
    "cuDriverGetVersion": 0,
    "cuDevicePrimaryCtxRetain": 1,
    "cuDevicePrimaryCtxRelease": 1,
    "cuCtxSetCurrent": 1,
    "cuMemGetInfo": 0,
    "cuMemAlloc": 1,
    "cuMemFree": 1,
    "cuMemHostAlloc": 2,
    "cuMemFreeHost": 1,
    "cuMemHostGetDevicePointer": 2,
    "cuMemcpyHtoD": 3,
    "cuMemsetD8Async": 4,
    "cuStreamCreate": 1,
    "cuStreamDestroy": 1,
    "cuStreamBeginCapture": 2,
    "cuStreamEndCapture": 1,
    "cuEventCreate": 1,
    "cuEventDestroy": 1,
    "cuEventRecord": 2,
    "cuEventSynchronize": 1,
    "cuGraphInstantiate": 2,
    "cuGraphDestroy": 1,
    "cuGraphExecDestroy": 1,
    "cuGraphLaunch": 2,
    "cuModuleLoadData": 1,
    "cuModuleUnload": 1,
    "cuModuleGetFunction": 2,
    "cuLaunchKernel": 11,
}
"""Of each function that may be called, as the bindings have it: test_driver_takes_as_many_arguments asks them."""

ANYWHERE = {name for name in PARAMETERS if name.startswith(("cuDe", "cuDr"))} | {"cuInit", "cuCtxSetCurrent"}
"""Needs no current context."""
HANDLES = {
    "cuStreamDestroy": {0: "stream"},
    "cuStreamBeginCapture": {0: "stream"},
    "cuStreamEndCapture": {0: "stream"},
    "cuEventDestroy": {0: "event"},
    "cuEventRecord": {0: "event", 1: "stream"},
    "cuEventSynchronize": {0: "event"},
    "cuGraphInstantiate": {0: "graph"},
    "cuGraphLaunch": {0: "executable graph", 1: "stream"},
    "cuModuleGetFunction": {0: "module"},
    "cuMemsetD8Async": {3: "stream"},
    "cuLaunchKernel": {8: "stream"},
}
"""Which arguments are handles, of what."""
FREES = {
    "stream": "cuStreamDestroy",
    "event": "cuEventDestroy",
    "graph": "cuGraphDestroy",
    "executable graph": "cuGraphExecDestroy",
    "module": "cuModuleUnload",
}


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
        self.buffers: dict[int, Any] = {}  # of memory that is not freed
        self.sizes: dict[int, int] = {}
        self.checked = Counter[str]()  # codes that somebody compared
        self.capturing: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self._next = 1000
        self._freed: list[Any] = []  # kept, so that no address comes again
        self._functions: dict[str, int] = {}  # name → its module
        self._started = False
        self._thread = threading.local()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        work = getattr(self, f"_{name}", lambda *arguments: ())

        assert name in PARAMETERS, f"{name}: whoever calls a function more adds it to PARAMETERS"

        def function(*arguments: Any) -> tuple[Any, ...]:
            self._check(name, arguments)
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

    def _check(self, name: str, arguments: Sequence[Any]) -> None:
        """That the call is one that a driver takes now, in this thread."""
        assert len(arguments) == PARAMETERS[name], f"{name} takes {PARAMETERS[name]} arguments, not {len(arguments)}"
        assert name == "cuInit" or self._started, f"{name} before cuInit"
        current = getattr(self._thread, "context", None)
        assert name in ANYWHERE or current in self.live["cuDevicePrimaryCtxRelease"], f"{name} without a context"
        for place, kind in HANDLES.get(name, {}).items():
            living = self.live.get(FREES[kind], set())
            assert arguments[place] in living, f"{name}: its argument {place} is no living {kind}"

    def holds(self, address: int, size: int = 1) -> bool:
        """Whether these bytes lie in memory that was taken and not freed."""
        starts = sorted(self.buffers)
        at = bisect.bisect(starts, address) - 1
        return at >= 0 and address + size <= starts[at] + self.sizes[starts[at]]

    def _handle(self) -> tuple[int]:
        self._next += 1
        return (self._next,)

    def run(self, work: Callable[[], None]) -> None:
        """What a stream does: now, or later when it is being recorded."""
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def _cuInit(self, flags: int) -> tuple[()]:
        self._started = True
        return ()

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
        assert flags & EventFlags.CU_EVENT_BLOCKING_SYNC, "the host would spin while it waits"
        return self._handle()

    def _cuModuleLoadData(self, cubin: bytes) -> tuple[int]:
        return self._handle()

    def _cuModuleGetFunction(self, module: int, name: bytes) -> tuple[str]:
        self._functions[name.decode()] = module
        return (name.decode(),)

    def _cuCtxSetCurrent(self, context: int) -> tuple[()]:
        self._thread.context = context
        return ()

    def _cuMemAlloc(self, size: int) -> tuple[int]:
        assert self.capturing is None, "memory is taken while a stream is captured"
        buffer = (ctypes.c_uint8 * (size + 256))()
        ctypes.memset(buffer, 0xFF, size + 256)  # no number in FP16: a device's memory is not zeroed either
        address = -(-ctypes.addressof(buffer) // 256) * 256
        self.buffers[address], self.sizes[address] = buffer, size
        return (address,)

    def _cuMemFree(self, address: int) -> tuple[()]:
        assert self.capturing is None, "memory is freed while a stream is captured"
        self._freed.append(self.buffers.pop(address))
        return ()

    _cuMemFreeHost = _cuMemFree

    def _cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> tuple[()]:
        assert self.holds(address, size), "memory that is not the caller's"

        def fill() -> None:
            ctypes.memset(address, value, size)

        self.run(fill)
        return ()

    def _cuMemcpyHtoD(self, address: int, host: int, size: int) -> tuple[()]:
        assert self.capturing is None, "a copy that waits, while a stream is captured"
        assert self.holds(address, size), "memory that is not the caller's"
        ctypes.memmove(address, host, size)
        return ()

    def _cuEventRecord(self, event: int, stream: int) -> tuple[()]:
        assert self.capturing is None, "an event of the host's in a captured stream"
        return ()

    def _cuEventSynchronize(self, event: int) -> tuple[()]:
        assert self.capturing is None, "waiting for a stream that is being captured"
        return ()

    def _cuMemHostAlloc(self, size: int, flags: int) -> tuple[int]:
        assert flags == self.CU_MEMHOSTALLOC_DEVICEMAP, "memory that the device does not see"
        return self._cuMemAlloc(size)

    def _cuMemHostGetDevicePointer(self, host: int, flags: int) -> tuple[int]:
        return (host,)

    def _cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[()]:
        assert self.capturing is None, "a stream is captured twice"
        self.capturing = []
        return ()

    def _cuStreamEndCapture(self, stream: int) -> tuple[int]:
        (graph,) = self._handle()
        assert self.capturing is not None, "no stream is captured"
        self.graphs[graph], self.capturing = self.capturing, None
        return (graph,)

    def _cuGraphInstantiate(self, graph: int, flags: int) -> tuple[int]:
        (executable,) = self._handle()
        self.graphs[executable] = list(self.graphs[graph])
        return (executable,)

    def _cuGraphDestroy(self, graph: int) -> tuple[()]:
        del self.graphs[graph]
        return ()

    _cuGraphExecDestroy = _cuGraphDestroy

    def _cuGraphLaunch(self, graph: int, stream: int) -> tuple[()]:
        assert self.capturing is None, "a graph is launched while a stream is captured"
        for work in self.graphs[graph]:
            work()
        return ()

    def _cuLaunchKernel(self, function: str, *rest: Any) -> tuple[()]:
        gx, gy, gz, threads, _, _, _, _, (values, kinds), _ = rest
        assert threads == kernels.THREADS, "the kernels are written for blocks of another size"
        assert len(values) == len(kinds), "arguments without a kind"
        assert min(gx, gy, gz) >= 1 and max(gy, gz) <= 65535, "no grid that a device takes"
        assert self._functions.get(function) in self.live["cuModuleUnload"], f"{function} is of no loaded module"
        pointers = [v for v, kind in zip(values, kinds, strict=True) if kind is ctypes.c_void_p]

        def work() -> None:
            assert all(map(self.holds, pointers)), f"{function} is given memory that is not the caller's"
            self.emulator.launch(function, (gx, gy, gz), values)

        self.run(work)
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
