"""TensorRT's own ONNX parser and builder take the CUDA graphs, without a GPU: tensorrt-rtx is its sibling product.

1.4 has the interface of TensorRT 10, 1.7 that of 11. What this cannot show is the choice of kernels on a Jetson.
"""

import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from edge.config import default_bundle
from shared.manifest import read_manifest
from tests.packages import installed

pytestmark = [
    pytest.mark.proof("TensorRT's parser and builder take the CUDA graphs"),
    pytest.mark.timeout(400),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="tensorrt-rtx 1.4 has wheels for x86-64 alone"),
]

ROOT = Path(__file__).resolve().parents[2]
BUILDS, PARSES = "tensorrt-rtx==1.7.1.116", "tensorrt-rtx==1.4.0.76"
ALLOWED = re.compile(r"(?!)")
"""Warnings to overlook: none, our graphs give none."""


def tried(requirement: str, graph: Path, shapes: list[tuple[int, int]]) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "tests/tensorrt/try_graph.py"), str(installed(requirement)), str(graph)]
    done = subprocess.run([*command, json.dumps(shapes)], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def unexpected(found: dict[str, Any]) -> list[str]:
    return [text for _, text in found["messages"] if not ALLOWED.match(text)]


@pytest.fixture(params=["debug", "shipped"])
def bundle(request: pytest.FixtureRequest, debug_bundle: Path) -> Path:
    return debug_bundle if request.param == "debug" else default_bundle()


def cuda_graphs(bundle: Path) -> list[Path]:
    graphs = [bundle / graph.file for graph in read_manifest(bundle).graphs if graph.target == "cuda"]
    assert graphs
    return graphs


def test_the_newer_one_builds_an_engine(bundle: Path) -> None:
    length = read_manifest(bundle).model.canvas_len
    for graph in cuda_graphs(bundle):
        found = tried(BUILDS, graph, [(1, length // 4), (2, length)])
        assert "error" not in found
        assert unexpected(found) == []
        assert found["engine"] > 100_000
        assert found["timings"] > 0
        assert found["phases"]


def test_the_older_one_reads_the_graph(bundle: Path) -> None:
    for graph in cuda_graphs(bundle):
        found = tried(PARSES, graph, [])
        assert "error" not in found
        assert unexpected(found) == []
        assert found["layers"] > 50


def test_a_graph_that_breaks_the_typing_rules_is_refused_with_the_parsers_words(tmp_path: Path) -> None:
    """FP16 plus FP32: the proof above can fail."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["c"])],
        "mixed",
        [info("a", TensorProto.FLOAT16, [4]), info("b", TensorProto.FLOAT, [4])],
        [info("c", TensorProto.FLOAT16, [4])],
    )
    path = tmp_path / "mixed.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    found = tried(BUILDS, path, [])
    assert "cannot read the bundle's CUDA graph" in found["error"]
