"""What pip installs of a checkout, with a C++ compiler and without; the network is not asked."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
NATIVE: Final = "edge/native"
PIP: Final = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
OFFLINE: Final = ["--no-index", "--no-deps", "--no-build-isolation"]
NO_COMPILER: Final = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
COMPILED: Final = pytest.param(
    {}, 1, id="compiler", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (apt: g++)")
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What deploy/install.sh gives pip, with nothing built."""
    folder = tmp_path / "checkout"
    for name in ("edge", "shared"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def output(*command: str, cwd: Path, environment: dict[str, str]) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    done = subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["copied", "editable"])
@pytest.mark.parametrize(("environment", "libraries"), [COMPILED, pytest.param(NO_COMPILER, 0, id="no compiler")])
def test_installation_has_the_library_where_there_is_a_compiler(
    checkout: Path, environment: dict[str, str], libraries: int, editable: bool
) -> None:
    site = checkout.parent / "site"
    output(*PIP, *OFFLINE, "--target", str(site), *["-e"] * editable, ".", cwd=checkout, environment=environment)
    packages = checkout if editable else site
    assert len(list((packages / NATIVE).glob("_rows*.so"))) == libraries
    assert editable or not list((site / NATIVE).glob("*.cpp"))
    imported = "import edge.native; print(edge.native.__file__)"
    file = output(sys.executable, "-c", imported, cwd=site, environment={"PYTHONPATH": str(packages)})
    assert Path(file) == packages / NATIVE / "__init__.py"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (apt: g++)")
def test_installation_from_a_source_distribution_can_compile(checkout: Path) -> None:
    script = "from setuptools.build_meta import build_sdist; build_sdist('.')"
    output(sys.executable, "-c", script, cwd=checkout, environment={})
    (archive,) = checkout.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {Path(*Path(name).parts[1:]) for name in opened.getnames()}
    assert {p.relative_to(checkout) for p in (checkout / NATIVE).iterdir() if p.suffix in {".cpp", ".h"}} <= held
