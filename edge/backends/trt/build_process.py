"""The builder's process, from outside: its gigabytes are free again when it ends, and it never runs as root.

A bundle's graph is a stranger's bytes. As root the builder becomes nobody and works in a folder of its own, from which
what it made is copied.
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


def run_build(order: Order, tell: Callable[[str], None], command: tuple[str, ...] = COMMAND) -> Path:
    """Build in another process.  → the engine's folder

    tell: gets a line for the screen now and then. command: stands for the builder's process in tests.
    Raises DeviceError or BundleError in one sentence.
    """
    if not is_root():
        return _run(order, tell, command)
    cache = Path(order.cache)
    with _folder_of_nobody(cache) as scratch:
        built = _run(msgspec.structs.replace(order, cache=str(scratch)), tell, command)
        return engine_cache.adopt(built, cache)


@contextmanager
def _folder_of_nobody(cache: Path) -> Iterator[Path]:
    """With a copy of the timing caches, which come back with what was measured."""
    with tempfile.TemporaryDirectory(prefix="edgelm-build-") as name:
        scratch = Path(name)
        for file in cache.glob(engine_cache.TIMINGS):
            shutil.copy(file, scratch)
        for path in (scratch, *scratch.iterdir()):
            os.chown(path, NOBODY, NOBODY)
        yield scratch


def _run(order: Order, tell: Callable[[str], None], command: tuple[str, ...]) -> Path:
    started = time.monotonic()
    process = subprocess.Popen([*command, msgspec.json.encode(order).decode()], stdout=subprocess.PIPE)
    assert process.stdout is not None
    last: dict[str, Any] = {}
    try:
        for line in process.stdout:
            try:
                last = msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.DecodeError:  # a library that prints
                tell(line.decode(errors="replace").rstrip())
                continue
            if "message" in last:
                tell(f"TensorRT: {last['severity'].lower()}: {last['message']}")
            elif "phase" in last:
                tell(f"{time.monotonic() - started:6.0f} s  {last['phase']} {last['done']}/{last['of']}")
        status = process.wait()
    finally:
        process.kill()  # Ctrl-C; a process that has ended does not mind
        process.wait()
        process.stdout.close()
    if "engine" in last:
        return Path(last["engine"])
    if "error" not in last:
        raise DeviceError(_died(status, order))
    raise (BundleError if status == BundleError.exit_code else DeviceError)(str(last["error"]))


def _died(status: int, order: Order) -> str:
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return no_room("the system ended the builder, most likely for want of memory", order.workspace_mib)
    if status < 0:
        return f"the builder crashed ({signal.Signals(-status).name}): its own words are above"
    return f"the builder ended with status {status} and no word; what it printed is above"
