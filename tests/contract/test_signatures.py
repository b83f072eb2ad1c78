"""A function of five or more parameters takes at most two by position: a call that names the rest can be read."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT = Path(__file__).resolve().parents[2]

MANY: Final = 5
POSITIONAL: Final = 2

CALLED_BY_PAHO: Final = "paho-mqtt passes a callback's arguments by position"
EXCEPTIONS: Final = {
    "edge/transports/mqtt/link.py:Link._on_connect": CALLED_BY_PAHO,
    "edge/transports/mqtt/link.py:Link._on_subscribe": CALLED_BY_PAHO,
    "edge/transports/mqtt/link.py:Link._on_disconnect": CALLED_BY_PAHO,
    "edge/transports/mqtt/link.py:Link._on_publish": CALLED_BY_PAHO,
    "host/model/network.py:Denoiser.forward": "model(*rows, cache): the three tensors of a layout, then the cache",
}
"""FILE:QUALIFIED NAME → the reason."""


def functions_of(tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    """(qualified name, parameters, positional ones) of every function; self and cls are not counted."""
    pending: list[tuple[ast.AST, str]] = [(tree, "")]
    while pending:
        parent, prefix = pending.pop()
        for node in ast.iter_child_nodes(parent):
            name = prefix
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{prefix}{node.name}."
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                decorators = {decorator.id for decorator in node.decorator_list if isinstance(decorator, ast.Name)}
                bound = isinstance(parent, ast.ClassDef) and "staticmethod" not in decorators
                positional = len(node.args.posonlyargs) + len(node.args.args) - bound
                yield name[:-1], positional + len(node.args.kwonlyargs), positional
            pending.append((node, name))


def offenders() -> set[str]:
    return {
        f"{path.relative_to(ROOT)}:{name}"
        for package in ("host", "edge", "shared")
        for path in (ROOT / package).rglob("*.py")
        for name, parameters, positional in functions_of(ast.parse(path.read_text("utf-8")))
        if parameters >= MANY and positional > POSITIONAL
    }


def test_signatures_with_many_parameters_are_keyword_only() -> None:
    assert sorted(offenders() - EXCEPTIONS.keys()) == [], "put a `*` after the first or second parameter"


def test_signatures_listed_as_exceptions_still_are() -> None:
    assert sorted(EXCEPTIONS.keys() - offenders()) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(a, b, *, c, d, e): ...", [("f", 5, 2)]),
        ("class C:\n  def f(self, a, b, /, c, *args, **rest): ...", [("C.f", 3, 3)]),
        ("class C:\n  @staticmethod\n  def f(a, b): ...", [("C.f", 2, 2)]),
        ("class C:\n  @classmethod\n  def f(cls, a): ...", [("C.f", 1, 1)]),
        ("if x:\n  def f(a):\n    async def g(b, c): ...", [("f", 1, 1), ("f.g", 2, 2)]),
    ],
)
def test_signatures_are_counted_without_self_and_cls(source: str, expected: list[tuple[str, int, int]]) -> None:
    assert sorted(functions_of(ast.parse(source))) == expected
