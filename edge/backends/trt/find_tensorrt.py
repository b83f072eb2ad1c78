"""Imports TensorRT, or says in one sentence why Python does not find it; passes its messages to the log."""

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from shared.errors import DeviceError

log = logging.getLogger(__name__)

SYSTEM_PACKAGES: Final = (
    ("/usr/lib", "python3*/dist-packages"),  # apt: python3.10 on JetPack 6, python3.12 on JetPack 7
    ("/usr/local/lib", "python3*/dist-packages"),  # pip as root
    ("~/.local/lib", "python3*/site-packages"),  # pip as this user
)
TEGRA: Final = (Path("/etc/nv_tegra_release"), Path("/proc/device-tree/model"))
DRIVER_NODE: Final = Path("/dev/nvidiactl")
OLDEST: Final = (10, 3)


def on_jetson() -> bool:
    """Whether this is one of NVIDIA's boards."""
    if TEGRA[0].exists():
        return True
    try:
        return b"NVIDIA" in TEGRA[1].read_bytes()
    except OSError:
        return False


def is_gpu_device() -> bool:
    """Whether this machine is meant to compute on an NVIDIA GPU: one of their boards, or with their driver loaded."""
    return on_jetson() or DRIVER_NODE.exists()


def why_absent() -> str:
    """Why TensorRT cannot be imported, with the remedy."""
    for base, pattern in SYSTEM_PACKAGES:
        for folder in Path(base).expanduser().glob(f"{pattern}/tensorrt"):
            return (
                f"TensorRT is in {folder}, but this virtual environment does not see it: "
                "make it again with that Python's -m venv --system-site-packages"
            )
    if on_jetson():
        return "TensorRT is not installed: sudo apt install python3-libnvinfer (a part of nvidia-jetpack)"
    return "TensorRT is not installed: pip install 'diffusion-llm[tensorrt]', or take the backend 'ort'"


def import_tensorrt() -> ModuleType:
    """The module, of a supported version. Raises DeviceError."""
    try:
        trt = importlib.import_module("tensorrt")
    except ModuleNotFoundError:
        raise DeviceError(why_absent()) from None
    except (ImportError, OSError) as error:  # the bindings exist, their libraries do not
        raise DeviceError(f"TensorRT cannot be imported: {error}") from None
    found = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if found < OLDEST:
        raise DeviceError(f"TensorRT {trt.__version__} is too old: 10.3 (JetPack 6.2) is the first that fits")
    return trt


def make_logger(trt: ModuleType, report: Callable[[str, str], None]) -> Any:
    """A TensorRT logger that hands (severity, message) of warnings and errors to `report`."""
    base: Any = trt.ILogger
    kinds = trt.ILogger.Severity

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # the bindings require it, in this spelling

        def log(self, severity: Any, message: str) -> None:
            if severity in (kinds.WARNING, kinds.ERROR, kinds.INTERNAL_ERROR):
                report(str(getattr(severity, "name", severity)), message)

    return Logger()


def log_messages(severity: str, message: str) -> None:
    """Pass TensorRT's messages to the log."""
    log.log(logging.WARNING if severity == "WARNING" else logging.ERROR, "TensorRT: %s", message)
