"""The machine at hand: its fast number types, its name, its clocks."""

import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch


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
