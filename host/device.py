"""The machine at hand: its fast number types, its name, its clocks, its peak."""

import functools
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, NamedTuple

import torch

PEAK_SIZE: Final = 1024
PEAK_SIZE_CUDA: Final = 8192  # smaller products leave a data-centre GPU idle
REPEATS: Final = 15
WARM_UP: Final = 3
CPU_PRODUCT: Final = (512, 256, 1024)  # rows, width in and out: of a step of `tiny`
CPU_ROUNDS: Final = 4  # of a product in each type, 35 ms in all

CpuDtype = Literal["float32", "bfloat16"]


def best_device() -> torch.device:
    """A GPU where torch finds one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class CpuSpeeds(NamedTuple):
    """Of a CPU's matrix products by type, in GFLOP/s."""

    float32: float
    bfloat16: float


@functools.cache
def cpu_speeds() -> CpuSpeeds:
    """The fastest products of each type, taking turns; timed once in a process, so that its choice stays.

    Instructions for bf16 do not tell: with AVX-512 alone, bf16 is twice as fast as float32 on an AMD EPYC, and takes
    almost twice as long on an Intel Xeon.
    """
    rows, width, out = CPU_PRODUCT
    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(CPU_ROUNDS):
        for dtype, seconds in times.items():
            a, b = torch.ones(rows, width, dtype=dtype), torch.ones(out, width, dtype=dtype)  # draws no random number
            started = time.perf_counter()
            a @ b.T
            seconds.append(time.perf_counter() - started)
    return CpuSpeeds(*(2 * rows * width * out / min(seconds) / 1e9 for seconds in times.values()))


def has_bf16_instructions() -> bool:
    """Whether this CPU multiplies bf16; emulated, a product takes 80 times as long as in float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def mixed_precision_dtype(device: torch.device, kept: CpuDtype | None = None) -> torch.dtype | None:
    """bf16 where the GPU supports it or the CPU multiplies it faster, FP16 on older GPUs, else None: float32.

    kept: what a run on a CPU has been in so far; it stays in it, to repeat itself, unless bf16 would be emulated.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if not has_bf16_instructions():
        return None
    speeds = cpu_speeds()
    faster = "bfloat16" if speeds.bfloat16 > speeds.float32 else "float32"
    return torch.bfloat16 if (kept or faster) == "bfloat16" else None


def machine_of(device: torch.device, dtype: torch.dtype | None) -> str:
    """The processor's name, a CPU's vector instructions, and the type of mixed precision, on a CPU with its reason."""
    used = str(dtype or torch.float32).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {used}"
    cpu_info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)$", cpu_info.read_text() if cpu_info.exists() else "", re.MULTILINE)
    name = f"{model[1] if model else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    if not has_bf16_instructions():
        return f"{name}, {used}"
    speeds = cpu_speeds()
    return f"{name}, {used} (products: float32 {speeds.float32:.0f}, bf16 {speeds.bfloat16:.0f} GFLOP/s)"


def work_clock(device: torch.device) -> Callable[[], float]:
    """Clock of compute time in seconds: CPU time of all threads, or wall time where a GPU works."""
    return time.perf_counter if device.type == "cuda" else time.process_time


def median_s(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median seconds of a call, after a few to warm up."""
    times = []
    for _ in range(WARM_UP + repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP:])


def wait_for(device: torch.device) -> None:
    """Return when a GPU has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def torch_gflops(device: torch.device, dtype: torch.dtype, repeats: int = REPEATS) -> float:
    """Peak of torch's matrix products, in GFLOP/s: of a square one."""
    n = PEAK_SIZE_CUDA if device.type == "cuda" else PEAK_SIZE
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    wait_for(device)

    def product() -> None:
        a @ b
        wait_for(device)

    return 2 * n**3 / median_s(product, repeats) / 1e9
