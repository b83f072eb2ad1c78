"""The Makefile's installation, with a stand-in for pip: a real one would need the network and minutes."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = """#!/bin/sh
[ "$1" = -c ] && { echo True; exit; }  # make asks whether this Python can be used
echo "Collecting torch"
echo "  Downloading torch-2.13.0.whl.metadata (29 kB)"
echo "  Downloading torch-2.13.0.whl (200.1 MB)"
until [ -e go-on ]; do sleep 0.01; done
"""


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    return tmp_path


def make(venv: Path, pip: str, *more: str, compiler: str = "sh") -> "subprocess.Popen[str]":
    """`make` of the edge's environment, whose Python is a script with this end. more: for make."""
    python = venv / "bin" / "python"
    python.write_text(PIP.replace("go-on", str(venv / "go-on")) + pip)
    python.chmod(0o755)
    own = [f"VENV={venv}", f"COMPILED={venv}/*.so"]  # that of the checkout stays: other tests run with it
    command = ["make", "--no-print-directory", *own, f"{venv}/.installed-edge", *more]
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    environment["CXX"] = compiler
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_makefile_shows_what_pip_downloads_while_it_does(venv: Path) -> None:
    with make(venv, "echo 'Installing collected packages: numpy, torch'") as running:
        assert running.stdout is not None
        assert running.stdout.readline().startswith("Installing the edge into")
        assert running.stdout.readline() == "  Downloading torch-2.13.0.whl (200.1 MB)\n"
        (venv / "go-on").touch()
        out, err = running.communicate(timeout=30)
    assert (running.returncode, out, err) == (0, "  Installing collected packages: numpy, torch\n", "")
    assert (venv / ".installed-edge").exists()


def test_makefile_names_pips_reason_and_installs_again(venv: Path) -> None:
    (venv / "go-on").touch()
    with make(venv, "echo 'ERROR: No matching distribution found for numpy' >&2; exit 1") as running:
        _, err = running.communicate(timeout=30)
    assert running.returncode == 2
    assert "error: pip cannot install the edge: No matching distribution found for numpy" in err
    assert "Collecting torch" in (venv / "pip.log").read_text()
    assert not (venv / ".installed-edge").exists()


def test_makefile_installs_again_after_a_change_of_compiled_sources(venv: Path) -> None:
    (venv / "go-on").touch()
    stale = []
    for more in ((), ("--question",), ("--question", "--what-if=edge/native/rows.cpp")):
        with make(venv, "", *more) as running:
            running.communicate(timeout=30)
        stale.append(running.returncode)
    assert stale == [0, 0, 1]


def test_makefile_without_a_compiler_installs_and_says_so(venv: Path) -> None:
    (venv / "go-on").touch()
    (venv / "old.so").touch()
    with make(venv, "", compiler="/nowhere/c++") as running:
        _, err = running.communicate(timeout=30)
    assert running.returncode == 0 and err.startswith("note: without a C++ compiler ONNX Runtime decodes alone")
    assert not (venv / "old.so").exists()
