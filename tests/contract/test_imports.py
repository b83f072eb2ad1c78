"""Who may import whom: the edge stays lean because nothing heavy can slip in."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT = Path(__file__).resolve().parents[2]

MAY_IMPORT: Final[dict[str, frozenset[str]]] = {
    "shared": frozenset({"shared", "msgspec"}),
    "edge": frozenset(
        {
            "edge",
            "shared",
            "numpy",
            "msgspec",
            "tokenizers",
            "paho",
            "h11",
            "tomli",
            "onnxruntime",
            "tensorrt",
            "cuda",
            "pycuda",
            "gguf",
            "llama_cpp",
            "PIL",
        }
    ),
}
"""Beside the standard library. The training host may import anything."""

RUNTIMES: Final = frozenset({"onnxruntime", "tensorrt", "cuda", "pycuda"})
"""A device has one of them: each is imported by the function that needs it, never by a module as it loads."""

PEERS: Final = frozenset({"gguf", "llama_cpp"})
"""What `edge.bench --peers` measures beside ours: of that one file, and late."""

PICTURES: Final = frozenset({"PIL"})
"""Loads with the first picture, in the one file that decodes them."""

HOST_ONLY: Final = ("host", "torch", "onnx", "onnx_graphsurgeon", "datasets", "pyarrow", "safetensors", "matplotlib")


def modules_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(top-level package, line) of everything below a node that imports, by statement or by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0], node.lineno
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in {"import_module", "__import__"}:
                yield str(node.args[0].value).split(".")[0], node.lineno


def imports_at_load(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Those of `imports` that run when the module loads: outside functions, and not for type checkers only."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            pending.extend(node.orelse)
        elif isinstance(node, ast.Import | ast.ImportFrom | ast.Call):
            yield from imports(node)
        else:
            pending.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_of_a_package_are_those_allowed(package: str) -> None:
    allowed = MAY_IMPORT[package] | sys.stdlib_module_names
    files = modules_of(package)
    assert files
    broken = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for name, line in imports(ast.parse(path.read_text("utf-8")))
        if name not in allowed
    ]
    assert broken == []


def test_imports_of_a_runtime_are_late() -> None:
    broken = [
        f"{path.relative_to(ROOT)}:{line} imports {name} as it loads"
        for path in modules_of("edge")
        for name, line in imports_at_load(ast.parse(path.read_text("utf-8")))
        if name in RUNTIMES | PEERS | PICTURES
    ]
    assert broken == []


@pytest.mark.parametrize(
    ("packages", "file"), [(PEERS, "peers.py"), (PICTURES, "pictures.py")], ids=["peers", "pictures"]
)
def test_imports_of_an_optional_package_are_of_one_file_alone(packages: frozenset[str], file: str) -> None:
    files = modules_of("edge")
    importers = {p.name for p in files for name, _ in imports(ast.parse(p.read_text("utf-8"))) if name in packages}
    assert importers == {file}


@pytest.mark.parametrize(
    ("source", "found", "at_load"),
    [
        ("import torch.nn as nn", {"torch"}, {"torch"}),
        ("from torch import nn", {"torch"}, {"torch"}),
        ("import importlib\nimportlib.import_module('torch.nn')", {"importlib", "torch"}, {"importlib", "torch"}),
        ("torch = __import__('torch')", {"torch"}, {"torch"}),
        ("try:\n    import torch\nexcept ImportError:\n    pass", {"torch"}, {"torch"}),
        ("class A:\n    import torch", {"torch"}, {"torch"}),
        ("def f():\n    import torch", {"torch"}, set()),
        ("if TYPE_CHECKING:\n    import torch\nelse:\n    import json", {"torch", "json"}, {"json"}),
        ("from . import unmask", set(), set()),
    ],
)
def test_imports_are_found_however_written(source: str, found: set[str], at_load: set[str]) -> None:
    tree = ast.parse(source)
    assert {name for name, _ in imports(tree)} == found
    assert {name for name, _ in imports_at_load(tree)} == at_load


def run_without(blocked: tuple[str, ...], script: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process where importing any of these packages fails, warnings being errors."""
    preamble = f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", preamble + script, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_imports_of_edge_modules_need_neither_host_nor_runtime() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in modules_of("edge")
    ]
    assert "edge.serving.loaded_bundle" in names
    script = "import importlib\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    done = run_without((*HOST_ONLY, *RUNTIMES, *PEERS, *PICTURES), script, *names)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_imports_of_a_whole_request_need_no_host(debug_bundle: Path) -> None:
    script = """
from pathlib import Path
from edge.serving.loaded_bundle import LoadedBundle
from shared.messages import GenerateRequest
loaded = LoadedBundle.load(Path(sys.argv[1]), "ort")
print(loaded.run(loaded.prepare(GenerateRequest(prompt="abc", seed=1, steps=4))).steps)
loaded.close()
"""
    done = run_without(HOST_ONLY, script, str(debug_bundle))
    assert (done.returncode, done.stderr) == (0, "")
    assert 1 <= int(done.stdout) <= 4


def test_imports_of_a_daemon_without_http_load_nothing_of_it() -> None:
    """A device that serves no HTTP pays nothing: neither an event loop nor a parser, nor the room itself."""
    script = """
import edge.daemon, edge.transports.mqtt.client
theirs = ("asyncio", "h11", "edge.transports.http")
print([name for name, module in sys.modules.items() if module and name.startswith(theirs)])
"""
    done = run_without(("h11",), script)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_imports_of_h11_are_of_its_room_alone() -> None:
    files = modules_of("edge")
    rooms = {p.parent.name for p in files for name, _ in imports(ast.parse(p.read_text("utf-8"))) if name == "h11"}
    assert rooms == {"http"}
