"""Build the TensorRT engines of a bundle on this device: `python -m edge.build`. Takes minutes, once.

The build runs in a process of its own, whose memory is freed before the service starts.
"""

import argparse
import sys
from pathlib import Path
from typing import Final

from edge.backends.trt.build_process import WORKSPACE_MIB, run_build
from edge.backends.trt.engine_builder import Order
from edge.backends.trt.engine_cache import built_roles, writable_cache
from edge.config import default_bundle
from shared.errors import ConfigError, command_name, run_main
from shared.manifest import find_graph, read_manifest

EPILOG: Final = """exit codes: 0 the engines exist, 66 a fault of the bundle, 69 of GPU, driver or TensorRT,
78 of a flag

example: python -m edge.build --bundle bundles/mine"""


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, build, print each engine's folder."""
    parser = argparse.ArgumentParser(
        prog=command_name("edge.build"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("--bundle", type=Path, default=default_bundle(), help="folder (default: the shipped one)")
    parser.add_argument("--cache", type=Path, help="folder for engines (default: the service's, or this user's)")
    parser.add_argument(
        "--workspace-mib", type=int, default=WORKSPACE_MIB, help="the builder's scratch memory (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="build even if there is an engine")
    parser.add_argument("--quiet", action="store_true", help="print only the result")
    args = parser.parse_args(argv)
    if args.workspace_mib < 16:
        raise ConfigError("--workspace-mib must be at least 16")
    manifest = read_manifest(args.bundle)
    roles = built_roles(manifest)
    if not roles:
        find_graph(args.bundle, manifest, "cuda")  # raises
    if args.cache is not None and not args.cache.is_dir():
        raise ConfigError(f"--cache {args.cache} is not a folder")
    cache = args.cache or writable_cache()

    for role in roles:  # each in a process of its own
        order = Order(str(args.bundle.absolute()), str(cache.absolute()), args.workspace_mib, args.force, role)
        print(run_build(order, lambda line: None if args.quiet else print(line, file=sys.stderr)))
    return 0


if __name__ == "__main__":
    run_main(main)
