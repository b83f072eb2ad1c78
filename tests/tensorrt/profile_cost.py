"""What each optimization profile costs to build: `python -m tests.tensorrt.profile_cost`.

The shipped bundle's CUDA graphs through tensorrt-rtx on a processor, with the first one, two, … of the profiles of an
Orin Nano. It compiles for a GPU that it has not seen and times no kernels: TensorRT on a device does both, and takes
minutes. So the figures say how the cost grows, not what it is there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edge.backends.trt.profiles import buckets, step_profiles
from edge.config import default_bundle
from shared.errors import run_main
from shared.manifest import graph_bytes, read_manifest
from tests.support.packages import installed

BUILDER: Final = "tensorrt-rtx==1.7.1.116"
PROCESSORS: Final = 8
"""Multiprocessors of an Orin Nano."""
ROOT: Final = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Cost:
    """Of one build, in a process of its own. cpu_s: processor time, with the import of TensorRT and the parsing."""

    profiles: int
    cpu_s: float
    engine_mb: float


def cost(graph: Path, shapes: Sequence[tuple[int, int]]) -> Cost:
    """Build an engine with these profiles."""
    command = [sys.executable, str(ROOT / "tests/tensorrt/try_graph.py"), str(installed(BUILDER)), str(graph)]
    before = os.times()
    done = subprocess.run(
        [*command, json.dumps(shapes)], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    after = os.times()
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    spent_s = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(len(shapes), round(spent_s, 1), round(found["engine"] / 1e6, 2))


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.tensorrt.profile_cost", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=default_bundle())
    args = parser.parse_args()
    manifest = read_manifest(args.bundle)
    assert manifest.blocks is not None, "a bundle of blocks"
    profiles = {
        "step": step_profiles(manifest.model.canvas_len, manifest.blocks.window),
        "canvas": buckets(manifest, PROCESSORS),
    }
    for one in manifest.graphs:
        if one.target != "cuda" or one.role not in profiles:
            continue
        shapes = profiles[one.role]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "graph.onnx"
            file.write_bytes(graph_bytes(args.bundle, manifest, one))
            for count in range(1, len(shapes) + 1):
                made = cost(file, shapes[:count])
                print(f"{one.role} {one.precision} {made} {shapes[count - 1]}", flush=True)
    return 0


if __name__ == "__main__":
    run_main(main)
