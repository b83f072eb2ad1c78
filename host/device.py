"""The machine at hand: its fast number types, its name, its clocks, its peak."""

import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

PEAK_SIZE: Final = 1024
PEAK_SIZE_CUDA: Final = 8192  # smaller products leave a data-centre GPU idle
REPEATS: Final = 15
WARM_UP: Final = 3


def best_device() -> torch.device:
    """A GPU where torch finds one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mixed_precision_dtype(device: torch.device) -> torch.dtype | None:
    """bf16 where the chip supports it, FP16 on older GPUs, None (float32) on CPUs that would emulate bf16."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else None


def machine_of(device: torch.device) -> str:
    """The processor's name, a CPU's vector instructions, and the type that training multiplies in."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpu_info = Path("/proc/cpuinfo")
        model = re.search(r"^model name\s*: (.+)$", cpu_info.read_text() if cpu_info.exists() else "", re.MULTILINE)
        name = f"{model[1] if model else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{name}, {str(mixed_precision_dtype(device) or torch.float32).removeprefix('torch.')}"


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
