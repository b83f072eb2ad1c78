"""The CUDA driver with every return code checked, and the two kinds of memory that the backend takes from it.

Only the driver API (libcuda) is used: it comes with the device, so bindings newer than the device's CUDA still work.
Everything shares the primary context, as TensorRT and pycuda's `autoprimaryctx` do.
"""

import ctypes
import logging
from contextlib import ExitStack
from types import ModuleType
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from shared.errors import DeviceError

log = logging.getLogger(__name__)

NO_BINDINGS: Final = (
    "cuda-python is not installed: pip install 'diffusion-llm[cuda13]' ('diffusion-llm[cuda12]' on JetPack 6)"
)
NO_DRIVER: Final = "no NVIDIA driver can be loaded: this machine has no GPU, or its driver is not installed"
CLOSED: Final = "this user may lack the groups of its device nodes, on a Jetson video and render (sudo usermod -aG)"


class Uncallable(DeviceError):
    """The bindings find no libcuda, or not this function in it."""


class Gpu:
    """The first GPU and its primary context."""

    def __init__(self, driver: ModuleType | None = None) -> None:
        """driver: cuda.bindings.driver, or a replacement in tests. Raises DeviceError."""
        if driver is None:
            try:
                from cuda.bindings import driver as real
            except ImportError:
                raise DeviceError(NO_BINDINGS) from None
            driver = real
        self.driver: Any = driver
        try:
            self.call("cuInit", 0)
        except Uncallable as error:
            raise DeviceError(f"{NO_DRIVER} ({error})") from None
        except DeviceError as error:
            raise DeviceError(f"the NVIDIA driver does not start ({error}): {CLOSED}") from None
        if self.call("cuDeviceGetCount") == 0:
            raise DeviceError(f"the NVIDIA driver finds no GPU: {CLOSED}")
        self._device = self.call("cuDeviceGet", 0)
        self.context = self.call("cuDevicePrimaryCtxRetain", self._device)
        try:
            self._read_properties()
        except DeviceError:
            self.release("cuDevicePrimaryCtxRelease", self._device)
            raise

    def _read_properties(self) -> None:
        self.use()
        self.name = bytes(self.call("cuDeviceGetName", 128, self._device)).split(b"\0")[0].decode()
        attribute = self.driver.CUdevice_attribute
        major, minor, self.processors = (
            int(self.call("cuDeviceGetAttribute", which, self._device))
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            )
        )
        self.architecture = f"sm_{major}{minor}"
        version = int(self.call("cuDriverGetVersion"))
        self.cuda_version = f"{version // 1000}.{version % 1000 // 10}"

    def call(self, name: str, *arguments: object) -> Any:
        """Call a function of the driver.  → its results without the code; raises DeviceError naming both"""
        try:
            code, *values = getattr(self.driver, name)(*arguments)
        except RuntimeError as error:
            raise Uncallable(f"{name} cannot be called: {' '.join(str(error).split())}") from None
        if code != self.driver.CUresult.CUDA_SUCCESS:
            raise DeviceError(f"{name} failed: {getattr(code, 'name', code)}")
        return values[0] if len(values) == 1 else tuple(values) or None

    def release(self, name: str, *arguments: object) -> None:
        """`call` for freeing: a failure is only logged, so that the rest is freed, too."""
        try:
            self.call(name, *arguments)
        except DeviceError as error:
            log.warning("while freeing the GPU: %s", str(error))

    def use(self) -> None:
        """Make the context current in this thread. Cheaper than tracking in which threads it already is."""
        self.call("cuCtxSetCurrent", self.context)

    def free_memory(self) -> tuple[int, int]:
        """→ free bytes, total bytes"""
        free, total = self.call("cuMemGetInfo")
        return int(free), int(total)

    def close(self) -> None:
        """Release the context."""
        self.release("cuDevicePrimaryCtxRelease", self._device)


class Memory(Protocol):
    """Allocates memory at the start, and frees all of it together."""

    graphs: bool
    """Whether its memory may be used inside CUDA graphs."""

    def device(self, size: int) -> int:
        """→ the device address of `size` bytes"""

    def mapped(self, size: int) -> tuple[NDArray[np.uint8], int]:
        """Zeroed bytes that host and device share, for small arrays.  → the host's view, the device address"""

    def free(self) -> None:
        """Free everything; the views must not be used afterwards."""


class CudaMemory:
    """Memory from the driver. On a Jetson, mapped memory is one DRAM for both sides, coherent and cached by the CPU."""

    graphs = True

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._owned = ExitStack()

    def device(self, size: int) -> int:
        """See Memory."""
        try:
            address = self._gpu.call("cuMemAlloc", size)
        except DeviceError as error:
            free, total = self._gpu.free_memory()
            left = f"{free >> 20} of {total >> 20} MiB are free"
            raise DeviceError(
                f"the GPU cannot allocate {size >> 20} MiB, {left}: stop what else uses it ({error})"
            ) from None
        self._owned.callback(self._gpu.release, "cuMemFree", address)
        return int(address)

    def mapped(self, size: int) -> tuple[NDArray[np.uint8], int]:
        """See Memory."""
        host = int(self._gpu.call("cuMemHostAlloc", size, self._gpu.driver.CU_MEMHOSTALLOC_DEVICEMAP))
        self._owned.callback(self._gpu.release, "cuMemFreeHost", host)
        view = np.frombuffer(memoryview((ctypes.c_uint8 * size).from_address(host)), np.uint8)
        view[:] = 0
        return view, int(self._gpu.call("cuMemHostGetDevicePointer", host, 0))

    def free(self) -> None:
        """See Memory."""
        self._owned.close()


class PycudaMemory:
    """For a process that already lives in a pycuda context: its allocator, its primary context, no CUDA graphs."""

    graphs = False

    def __init__(self) -> None:
        """Raises DeviceError when pycuda is absent or finds no GPU."""
        try:
            import pycuda.autoprimaryctx  # not `autoinit`: it makes a context of its own, without TensorRT's memory
            import pycuda.driver
        except ModuleNotFoundError:
            raise DeviceError("pycuda is not installed: pip install 'diffusion-llm[pycuda]'") from None
        except Exception as error:  # ImportError without libcuda, else pycuda's own types, which need the import
            raise DeviceError(f"pycuda finds no GPU: {error}") from None
        self._cuda: Any = pycuda.driver
        self._device: list[Any] = []
        self._mapped: list[Any] = []

    def device(self, size: int) -> int:
        """See Memory."""
        try:
            self._device.append(self._cuda.mem_alloc(size))
        except self._cuda.Error as error:
            raise DeviceError(f"pycuda cannot allocate {size >> 20} MiB: {error}") from None
        return int(self._device[-1])

    def mapped(self, size: int) -> tuple[NDArray[np.uint8], int]:
        """See Memory."""
        flags = self._cuda.host_alloc_flags.DEVICEMAP
        try:
            view: NDArray[np.uint8] = self._cuda.pagelocked_zeros(size, np.uint8, mem_flags=flags)
        except self._cuda.Error as error:
            raise DeviceError(f"pycuda cannot allocate {size} mapped bytes: {error}") from None
        self._mapped.append(view)
        return view, int(view.base.get_device_pointer())  # type: ignore[union-attr]

    def free(self) -> None:
        """See Memory."""
        while self._device:
            self._device.pop().free()
        while self._mapped:
            self._mapped.pop().base.free()
