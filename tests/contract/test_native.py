"""The compiled library: its sources are declared, and compile as pip compiles them, without a warning."""

import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import tomli as tomllib

ROOT: Final = Path(__file__).resolve().parents[2]
FOLDER: Final = ROOT / "edge" / "native"


def extension() -> dict[str, Any]:
    """What pyproject.toml says of the library."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["ext-modules"]
    assert [table["name"] for table in tables] == ["edge.native._rows"] and tables[0]["optional"]
    table: dict[str, Any] = tables[0]
    return table


def test_native_sources_and_headers_are_all_declared() -> None:
    """A header that is not would be missing from the source distribution, and its changes from the next build."""
    declared = extension()["sources"] + extension()["depends"]
    assert sorted(declared) == sorted(str(p.relative_to(ROOT)) for p in FOLDER.iterdir() if p.suffix in {".cpp", ".h"})


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler is installed (apt: g++)")
def test_native_sources_compile_without_a_warning(tmp_path: Path) -> None:
    flags = [*extension()["extra-compile-args"], "-fPIC", "-c", "-Werror", "-o", str(tmp_path / "rows.o")]
    done = subprocess.run(["g++", *flags, *extension()["sources"]], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
