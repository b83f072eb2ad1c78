"""Build the TensorRT engine of a bundle on this device: `python -m edge.build`. Takes minutes, once.

The build runs in a process of its own, whose gigabytes are free again before the service starts.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from edge.backends.trt.engine_builder import Order, no_room
from edge.backends.trt.engine_cache import writable_cache
from edge.config import default_bundle
from shared.errors import BundleError, ConfigError, DeviceError, command_name, run_main
from shared.manifest import find_graph, read_manifest

WORKSPACE_MIB: Final = 512

EPILOG: Final = """exit codes: 0 the engine is there, 66 the bundle does not fit, 69 GPU, driver or TensorRT do not,
78 a flag is wrong

example: python -m edge.build --bundle bundles/mine"""


def run_build(order: Order, tell: Callable[[str], None], command: tuple[str, ...] = ()) -> Path:
    """Build in another process.  → the engine's folder

    tell: gets a line for the screen now and then. command: stands for the builder's process in tests.
    Raises DeviceError or BundleError in one sentence.
    """
    command = command or (sys.executable, "-m", "edge.backends.trt.engine_builder")
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


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, build, say where."""
    parser = argparse.ArgumentParser(
        prog=command_name("edge.build"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("--bundle", type=Path, default=default_bundle(), help="folder (default: the shipped one)")
    parser.add_argument("--cache", type=Path, help="folder for engines (default: the first writable of the service's)")
    parser.add_argument("--workspace-mib", type=int, default=WORKSPACE_MIB, help="the builder's scratch memory")
    parser.add_argument("--force", action="store_true", help="build even if there is an engine already")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")
    args = parser.parse_args(argv)
    if args.workspace_mib < 16:
        raise ConfigError("--workspace-mib must be at least 16")
    find_graph(args.bundle, read_manifest(args.bundle), "cuda")
    if args.cache is not None and not args.cache.is_dir():
        raise ConfigError(f"--cache {args.cache} is no folder")
    cache = args.cache or writable_cache()

    def tell(line: str) -> None:
        if not args.quiet:
            print(line, file=sys.stderr)

    order = Order(str(args.bundle.absolute()), str(cache.absolute()), args.workspace_mib, args.force)
    print(run_build(order, tell))
    return 0


if __name__ == "__main__":
    run_main(main)
