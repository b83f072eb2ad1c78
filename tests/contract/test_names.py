"""Names that can be predicted: tests are called after their subject, loggers after their module."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parents[2]

STOP_WORDS: Final = {
    "a",
    "an",
    "the",
    "each",
    "every",
    "all",
    "any",
    "some",
    "both",
    "other",
    "no",
    "not",
    "nor",
    "nothing",
    "nobody",
    "none",
    "only",
    "one",
    "two",
    "three",
    "what",
    "who",
    "whose",
    "which",
    "where",
    "when",
    "while",
    "how",
    "if",
    "it",
    "its",
    "this",
    "that",
    "so",
    "and",
    "or",
    "with",
    "without",
    "as",
    "after",
    "before",
}
"""No subject of a test begins with one of these: `test_<subject>_<case>`."""


def functions(folder: str) -> Iterator[tuple[str, str]]:
    """(file, name) of every function below a folder."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield str(path.relative_to(ROOT)), node.name


def test_names_of_tests_begin_with_their_subject() -> None:
    tests = [(file, name) for file, name in functions("tests") if name.startswith("test_")]
    assert len(tests) > 500
    filler = [(file, name) for file, name in tests if name.split("_")[1] in STOP_WORDS]
    assert [f"{file}: {name}" for file, name in filler] == []


def test_names_of_loggers_are_those_of_their_modules() -> None:
    named = [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"
        for package in ("host", "edge", "shared")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "getLogger"
        if [ast.unparse(argument) for argument in node.args] not in ([], ["__name__"])  # none: the root logger
    ]
    assert named == []
