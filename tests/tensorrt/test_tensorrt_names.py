"""Every name of TensorRT that our code uses exists in each version we serve: asked of the real bindings.

The bindings are small; the libraries below them are not to be had from the index, so nine empty functions stand for
them. That is enough to import, and to list what is there.
"""

import ast
import inspect
import json
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.emulator import builder
from tests.support.emulator.fakes import FakeDriver
from tests.support.packages import installed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.proof("2. every TensorRT name we use exists in 10.3, 10.13, 10.16 and 11.4"),
    pytest.mark.timeout(200),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="10.3's bindings on the index are for x86-64 alone"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is installed (apt: gcc)"),
]

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("backend", "blocks", "captured", "drafter", "engine_builder", "find_tensorrt")
SOURCES = tuple(f"edge/backends/trt/{name}.py" for name in NAMES)
VERSIONS = {
    "10.3": "tensorrt-cu12-bindings==10.3.0",
    "10.13": "tensorrt-cu13-bindings==10.13.3.9",
    "10.16": "tensorrt-cu13-bindings==10.16.1.11",
    "11.4": "tensorrt-cu13-bindings==11.4.0.106",
}
USED = {
    "Runtime": {"deserialize_cuda_engine"},
    "ICudaEngine": {"create_execution_context", "device_memory_size_v2"},
    "IExecutionContext": {
        "set_device_memory",
        "set_optimization_profile_async",
        "set_input_shape",
        "set_tensor_address",
        "infer_shapes",
        "get_tensor_shape",
        "execute_async_v3",
    },
    "Builder": {
        "create_network",
        "create_builder_config",
        "create_optimization_profile",
        "build_serialized_network",
    },
    "INetworkDefinition": {"num_inputs", "get_input"},
    "IBuilderConfig": {
        "set_memory_pool_limit",
        "builder_optimization_level",
        "max_aux_streams",
        "create_timing_cache",
        "set_timing_cache",
        "get_timing_cache",
        "progress_monitor",
        "add_optimization_profile",
    },
    "ITimingCache": {"serialize"},
    "IOptimizationProfile": {"set_shape"},
    "OnnxParser": {"parse", "num_errors", "get_error"},
    "ParserError": {"desc", "node"},
    "ITensor": {"name", "shape"},
    "IProgressMonitor": {"phase_start", "step_complete", "phase_finish"},
    "ILogger": {"log", "Severity", "WARNING", "ERROR", "INTERNAL_ERROR"},
}
"""Class → what we use of it."""

REMOVED = {
    "EXPLICIT_BATCH",
    "device_memory_size",
    "create_execution_context_without_device_memory",
    "supports_model",
    "platform_has_fast_int8",
    "platform_has_fast_fp16",
    "int8_calibrator",
    "algorithm_selector",
    "FP16",
    "INT8",
    "set_tactic_sources",
    "execute_v2",
    "execute_async_v2",
    "max_batch_size",
    "binding_is_input",
}
"""Gone in TensorRT 11, or on their way out."""

STUB = """
#define NOTHING(name) void* name(void) { return 0; }
NOTHING(createInferBuilder_INTERNAL) NOTHING(createInferRefitter_INTERNAL) NOTHING(createInferRuntime_INTERNAL)
NOTHING(createNvOnnxParserRefitter_INTERNAL) NOTHING(createNvOnnxParser_INTERNAL) NOTHING(getBuilderPluginRegistry)
NOTHING(getPluginRegistry)
int getNvOnnxParserVersion(void) { return 0; }
_Bool initLibNvInferPlugins(void* logger, const char* space) { return 0; }
"""

PROBE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import tensorrt_bindings as trt
found, documents = {"": sorted(dir(trt))}, {}
for name in dir(trt):
    kind = getattr(trt, name)
    if isinstance(kind, type):
        found[name] = sorted(dir(kind))
        documents[name] = {one: getattr(kind, one).__doc__ or "" for one in dir(kind)}
print(json.dumps([trt.__version__, found, documents]))
"""

SIGNATURE = re.compile(r"(?:\d+\. )?(\w+)\(self: (?:[^,()]|\([^()]*\))*?(?:, (.*))?\) -> ")
"""A line of a method's document, once for each overload: its name and the parameters after `self`."""


@dataclass(frozen=True)
class Bindings:
    """One version. names: class → its attributes; "" → the module's. documents: class → method → its document."""

    names: dict[str, set[str]]
    documents: dict[str, dict[str, str]]

    def overloads(self, kind: str, method: str) -> list[tuple[list[str], int]]:
        """→ of each overload, the parameters' names, and how many are required"""
        found = []
        for line in self.documents[kind][method].splitlines():
            if (match := SIGNATURE.match(line.strip())) is not None and match[1] == method:
                parameters = re.findall(r"(?:^|, )(\w+): ([^=]*?)( = .*?)?(?=, \w+: |$)", match[2] or "")
                found.append(([name for name, _, _ in parameters], sum(not default for _, _, default in parameters)))
        return found


@pytest.fixture(scope="module", params=VERSIONS)
def bindings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bindings:
    """The real ones."""
    folder = installed(VERSIONS[request.param], "--no-deps")
    stub = tmp_path_factory.mktemp("stub")
    (stub / "stub.c").write_text(STUB)
    for library in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        soname = f"lib{library}.so.{request.param.split('.')[0]}"
        subprocess.run(
            ["cc", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", soname, "stub.c"], cwd=stub, check=True
        )
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder)], env={"LD_LIBRARY_PATH": str(stub)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    version, found, documents = json.loads(done.stdout)
    assert version.startswith(request.param)
    return Bindings({name: set(attributes) for name, attributes in found.items()}, documents)


@pytest.fixture(scope="module")
def names(bindings: Bindings) -> dict[str, set[str]]:
    """Class → its attributes; "" → the module's."""
    return bindings.names


def module_chains() -> set[tuple[str, ...]]:
    """("Runtime",), ("MemoryPoolType", "WORKSPACE") …: what stands behind `trt.` in our sources."""
    chains = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse((ROOT / source).read_text("utf-8"))):
            parts: list[str] = []
            while isinstance(node, ast.Attribute):
                parts.insert(0, node.attr)
                node = node.value
            if isinstance(node, ast.Name) and node.id == "trt":
                chains.add(tuple(parts))
            elif parts[:1] == ["_trt"]:
                chains.add(tuple(parts[1:]))
    return {chain for chain in chains if chain and chain[0] not in {"load", "TrtBackend"}}


def attributes() -> set[str]:
    """Every name behind a dot in our sources."""
    trees = [ast.parse((ROOT / source).read_text("utf-8")) for source in SOURCES]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_tensorrt_names_used_from_the_module_exist(names: dict[str, set[str]]) -> None:
    chains = module_chains()
    assert ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED") in chains
    assert ("ExecutionContextAllocationStrategy", "USER_MANAGED") in chains
    for chain in chains:
        assert chain[0] in names[""], f"tensorrt.{chain[0]}"
        if len(chain) > 1 and chain[0] in names:  # not of `trt.__version__`, a text
            assert chain[1] in names[chain[0]], f"tensorrt.{'.'.join(chain)}"


def test_tensorrt_names_used_from_its_classes_exist(names: dict[str, set[str]]) -> None:
    for kind, used in USED.items():
        assert used <= names[kind], f"{kind} lacks {used - names[kind]}"


def test_tensorrt_names_table_is_complete(names: dict[str, set[str]]) -> None:
    """Any attribute in our sources that a TensorRT class also has must be in the table, or plainly be another's."""
    others = {"file", "engine"}  # of the manifest's graphs, of a built engine
    touched = attributes()
    known = set().union(*USED.values())
    theirs = set().union(*(names[kind] for kind in USED))
    assert {name for name in touched & theirs if not name.startswith("__")} - known - others == set()


def recorded() -> dict[tuple[str, str], list[str]]:
    """The recording TensorRT's methods, with their parameters' names."""
    driver: Any = FakeDriver(None)  # type: ignore[arg-type]
    trt: Any = builder.BuildingTensorRT(driver, [])
    kinds = {name: getattr(trt, name, None) for name in USED}
    kinds |= {"IBuilderConfig": builder.Config, "ITimingCache": builder.Cache, "IOptimizationProfile": builder.Profile}
    methods = {(kind, name): getattr(kinds[kind], name, None) for kind, used in USED.items() for name in used}
    return {
        method: [name for name in inspect.signature(one).parameters if name != "self"]
        for method, one in methods.items()
        if inspect.isfunction(one)
    }


def test_tensorrt_names_and_parameters_of_the_recording_one_are_the_bindings(bindings: Bindings) -> None:
    """So what the recording TensorRT lets pass is a call that the bindings take."""
    methods = recorded()
    assert len(methods) >= 18
    for (kind, method), parameters in methods.items():
        overloads = bindings.overloads(kind, method)
        fits = [names[: len(parameters)] == parameters and len(parameters) >= least for names, least in overloads]
        assert any(fits), f"{kind}.{method}({', '.join(parameters)}): the bindings have {overloads}"


def test_tensorrt_names_removed_ones_are_not_used() -> None:
    assert attributes() & REMOVED == set()
