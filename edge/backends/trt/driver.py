"""The CUDA driver with every return code checked, and the two kinds of memory that the backend takes from it.

Only the driver's interface (libcuda) is used: it comes with the device, so that bindings newer than the device's CUDA
still work. The primary context is used throughout, the one that TensorRT and pycuda's `autoprimaryctx` use too.
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
        """driver: cuda.bindings.driver, or what stands for it. Raises DeviceError."""
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
            self._learn()
        except DeviceError:
            self.release("cuDevicePrimaryCtxRelease", self._device)
            raise

    def _learn(self) -> None:
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
        """Call a function of the driver.  → what it gives besides its code; raises DeviceError naming the two"""
        try:
            code, *values = getattr(self.driver, name)(*arguments)
        except RuntimeError as error:
            raise Uncallable(f"{name} cannot be called: {' '.join(str(error).split())}") from None
        if code != self.driver.CUresult.CUDA_SUCCESS:
            raise DeviceError(f"{name} failed: {getattr(code, 'name', code)}")
        return values[0] if len(values) == 1 else tuple(values) or None

    def release(self, name: str, *arguments: object) -> None:
        """`call` for freeing: a failure is logged, so that the rest is freed too."""
        try:
            self.call(name, *arguments)
        except DeviceError as error:
            log.warning("while freeing the GPU: %s", str(error))

    def use(self) -> None:
        """Make the context the calling thread's own. Cheaper than to know whether it is, since threads come and go."""
        self.call("cuCtxSetCurrent", self.context)

    def free_memory(self) -> tuple[int, int]:
        """→ bytes free, bytes in all"""
        free, total = self.call("cuMemGetInfo")
        return int(free), int(total)

    def close(self) -> None:
        """Let go of the context."""
        self.release("cuDevicePrimaryCtxRelease", self._device)


class Memory(Protocol):
    """Hands out memory once, at the start, and frees all of it together."""

    graphs: bool
    """Whether what it hands out may be used inside CUDA graphs."""

    def device(self, size: int) -> int:
        """→ the address of so many bytes on the device"""

    def mapped(self, size: int) -> tuple[NDArray[np.uint8], int]:
        """Zeroed bytes that both sides see, for small things.  → the host's view, their address on the device"""

    def free(self) -> None:
        """Free everything that was handed out; the views are dead from then on."""


class CudaMemory:
    """From the driver. On a Jetson, mapped memory is the same DRAM for both sides, coherent and cached by the CPU."""

    graphs = True

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._owned = ExitStack()

    def device(self, size: int) -> int:
        """As the protocol says."""
        try:
            address = self._gpu.call("cuMemAlloc", size)
        except DeviceError as error:
            free, total = self._gpu.free_memory()
            left = f"{free >> 20} of {total >> 20} MiB are free"
            raise DeviceError(
                f"the GPU cannot give {size >> 20} MiB, {left}: stop what else uses it ({error})"
            ) from None
        self._owned.callback(self._gpu.release, "cuMemFree", address)
        return int(address)

    def mapped(self, size: int) -> tuple[NDArray[np.uint8], int]:
        """As the protocol says."""
        host = int(self._gpu.call("cuMemHostAlloc", size, self._gpu.driver.CU_MEMHOSTALLOC_DEVICEMAP))
        self._owned.callback(self._gpu.release, "cuMemFreeHost", host)
        view = np.frombuffer(memoryview((ctypes.c_uint8 * size).from_address(host)), np.uint8)
        view[:] = 0
        return view, int(self._gpu.call("cuMemHostGetDevicePointer", host, 0))

    def free(self) -> None:
        """As the protocol says."""
        self._owned.close()


class PycudaMemory:
    """For a process that already lives in a pycuda context: its allocator, its primary context, no CUDA graphs."""

    graphs = False

    def __init__(self) -> None:
        """Raises DeviceError when pycuda is absent or finds no GPU."""
        try:
            import pycuda.autoprimaryctx  # `autoinit` would make a context of its own, where TensorRT's memory is not
            import pycuda.driver
        except ModuleNotFoundError:
            raise DeviceError("pycuda is not installed: pip install 'diffusion-llm[pycuda]'") from None
        except Exception as error:  # no libcuda: ImportError; else pycuda's own, which exist only once it is imported
            raise DeviceError(f"pycuda finds no GPU: {error}") from None
        self._cuda: Any = pycuda.driver
        self._device: list[Any] = []
        self._mapped: list[Any] = []

    def device(self, size: int) -> int:
        """As the protocol says."""
        try:
            self._device.append(self._cuda.mem_alloc(size))
        except self._cuda.Error as error:
            raise DeviceError(f"pycuda cannot give {size >> 20} MiB: {error}") from None
        return int(self._device[-1])

    def mapped(self, size: int) -> tuple[NDArray[np.uint8], int]:
        """As the protocol says."""
        flags = self._cuda.host_alloc_flags.DEVICEMAP
        try:
            view: NDArray[np.uint8] = self._cuda.pagelocked_zeros(size, np.uint8, mem_flags=flags)
        except self._cuda.Error as error:
            raise DeviceError(f"pycuda cannot give {size} mapped bytes: {error}") from None
        self._mapped.append(view)
        return view, int(view.base.get_device_pointer())  # type: ignore[union-attr]

    def free(self) -> None:
        """As the protocol says."""
        while self._device:
            self._device.pop().free()
        while self._mapped:
            self._mapped.pop().base.free()
