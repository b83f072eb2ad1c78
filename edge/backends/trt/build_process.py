"""Runs the engine builder in a process of its own: its gigabytes are freed when it ends, and it never runs as root.

A bundle's graph is untrusted input. Started by root, the builder runs as the user nobody in a temporary folder, from
which the engine is copied.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from edge.backends.trt import engine_cache
from edge.backends.trt.engine_builder import Order, no_room
from edge.system.privileges import NOBODY, is_root
from shared.errors import BundleError, DeviceError

WORKSPACE_MIB: Final = 512
COMMAND: Final = (sys.executable, "-m", "edge.backends.trt.engine_builder")


def run_build(order: Order, report: Callable[[str], None], command: tuple[str, ...] = COMMAND) -> Path:
    """Build in another process.  → the engine's folder

    report: gets lines of progress. command: replaces the builder's process in tests.
    Raises DeviceError or BundleError in one sentence.
    """
    if not is_root():
        return _run(order, report, command)
    cache = Path(order.cache)
    with _folder_of_nobody(cache) as scratch:
        built = _run(msgspec.structs.replace(order, cache=str(scratch)), report, command)
        return engine_cache.adopt(built, cache)


@contextmanager
def _folder_of_nobody(cache: Path) -> Iterator[Path]:
    """A folder for user nobody, with a copy of the timing caches, which are copied back after the build."""
    with tempfile.TemporaryDirectory(prefix="edgelm-build-") as name:
        scratch = Path(name)
        for file in cache.glob(engine_cache.TIMINGS):
            shutil.copy(file, scratch)
        for path in (scratch, *scratch.iterdir()):
            os.chown(path, NOBODY, NOBODY)
        yield scratch


def _run(order: Order, report: Callable[[str], None], command: tuple[str, ...]) -> Path:
    started = time.monotonic()
    process = subprocess.Popen([*command, msgspec.json.encode(order).decode()], stdout=subprocess.PIPE)
    assert process.stdout is not None
    last: dict[str, Any] = {}
    try:
        for line in process.stdout:
            try:
                last = msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.DecodeError:  # printed by a library
                report(line.decode(errors="replace").rstrip())
                continue
            if "message" in last:
                report(f"TensorRT: {last['severity'].lower()}: {last['message']}")
            elif "phase" in last:
                report(f"{time.monotonic() - started:6.0f} s  {last['phase']} {last['done']}/{last['of']}")
        status = process.wait()
    finally:
        process.kill()  # after Ctrl-C; no effect on a process that has ended
        process.wait()
        process.stdout.close()
    if "engine" in last:
        return Path(last["engine"])
    if "error" not in last:
        raise DeviceError(_died(status, order))
    raise (BundleError if status == BundleError.exit_code else DeviceError)(str(last["error"]))


def _died(status: int, order: Order) -> str:
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return no_room("the system killed the builder, most likely because memory ran out", order.workspace_mib)
    if status < 0:
        return f"the builder crashed ({signal.Signals(-status).name}): its output is above"
    return f"the builder ended with status {status} and no message; its output is above"
