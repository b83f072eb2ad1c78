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

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge.backends.trt.profiles import step_profiles
from edge.config import default_bundle
from host.export.__main__ import export_untrained
from host.export.cuda_qdq import activation_ranges, quantize_linears
from host.export.pipeline import Wanted
from shared.manifest import SamplingDefaults, graph_bytes, read_manifest
from shared.tokens import BOS, MASK
from tests.support.packages import installed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.proof("1. TensorRT's parser and builder take the CUDA graphs"),
    pytest.mark.timeout(400),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="tensorrt-rtx 1.4 has wheels for x86-64 alone"),
]

CANVAS = 256  # of the shipped bundle
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


@pytest.fixture(params=["debug-fp16", "debug-int8", "shipped-fp16", "shipped-int8"])
def graph(request: pytest.FixtureRequest, debug_bundle: Path, tmp_path: Path) -> Path:
    whose, precision = request.param.split("-")
    bundle, file = debug_bundle if whose == "debug" else default_bundle(), tmp_path / "canvas.onnx"
    if request.param == "debug-int8":  # the tests' bundle has no INT8 graph for CUDA
        canvas = np.full(64, MASK, np.int32)
        canvas[0] = BOS
        half = onnx.load_from_string(whole_graph(bundle, "canvas", "fp16"))
        onnx.save(quantize_linears(half, activation_ranges(half, [(canvas, 1.0)])["largest"], []), file)
    else:
        file.write_bytes(whole_graph(bundle, "canvas", precision))
    quantized = {node.op_type for node in onnx.load(file).graph.node} & {"QuantizeLinear"}
    assert bool(quantized) == (precision == "int8")
    return file


def whole_graph(bundle: Path, role: str, precision: str) -> bytes:
    """As the builder gives it to TensorRT."""
    manifest = read_manifest(bundle)
    kind = (role, "cuda", precision)
    (graph,) = (one for one in manifest.graphs if (one.role, one.target, one.precision) == kind)
    return graph_bytes(bundle, manifest, graph)


@pytest.fixture(params=["fp16", "int8"])
def step(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The shipped network's rows of blocks."""
    file = tmp_path / "step.onnx"
    file.write_bytes(whole_graph(default_bundle(), "step", request.param))
    return file


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of random weights for CUDA whose rows read conditions."""
    folder = tmp_path_factory.mktemp("bundles") / "conditions"
    wanted = Wanted(cuda_fp16=True, cuda_int8=True)
    export_untrained("debug", folder, wanted=wanted, defaults=SamplingDefaults(), conditions=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("role", ["step", "encode.text", "encode.image"])
def test_graphs_of_conditions_build_and_parse(conditioned: Path, tmp_path: Path, role: str, precision: str) -> None:
    file = tmp_path / "graph.onnx"
    file.write_bytes(whole_graph(conditioned, role, precision))
    canvas_len = read_manifest(conditioned).model.canvas_len
    shapes = step_profiles(canvas_len, window=3, paired=True) if role == "step" else [(1, 1)]
    for found in (tried(BUILDS, file, shapes), tried(PARSES, file, [])):
        assert "error" not in found
        assert unexpected(found) == []


@pytest.mark.slow
def test_graph_builds_in_the_newest_tensorrt_rtx(graph: Path) -> None:
    found = tried(BUILDS, graph, [(1, 64), (2, 256)])
    assert "error" not in found
    assert unexpected(found) == []
    assert found["engine"] > 100_000
    assert found["timings"] > 0
    assert found["phases"]


@pytest.mark.slow
def test_step_graph_builds_for_rows_of_several_requests(step: Path) -> None:
    """Every profile of an Orin Nano, the constants that kernels alone read among the graph's."""
    found = tried(BUILDS, step, step_profiles(CANVAS, window=3))
    assert "error" not in found
    assert unexpected(found) == []
    assert found["engine"] > 1_000_000


def test_step_graph_parses_in_the_oldest_tensorrt_rtx(step: Path) -> None:
    found = tried(PARSES, step, [])
    assert "error" not in found
    assert unexpected(found) == []
    assert found["layers"] > 50


def test_graph_parses_in_the_oldest_tensorrt_rtx(graph: Path) -> None:
    found = tried(PARSES, graph, [])
    assert "error" not in found
    assert unexpected(found) == []
    assert found["layers"] > 50


def test_graph_that_breaks_the_typing_rules_is_refused_with_the_parsers_message(tmp_path: Path) -> None:
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
