"""The edge installs on a Jetson without a compiler: each dependency has a wheel for its processor and its Python."""

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tomli

from tests.support.packages import PIP

pytestmark = [
    pytest.mark.slow,
    pytest.mark.proof("6. the edge's dependencies have wheels on aarch64"),
    pytest.mark.timeout(120),
]

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@pytest.mark.slow
@pytest.mark.parametrize(("python", "extra", "glibc"), [("3.10", "cuda12", 35), ("3.12", "cuda13", 39)])
def test_aarch64_dependencies_resolve_to_wheels(python: str, extra: str, glibc: int) -> None:
    """JetPack 6 is Ubuntu 22.04 with glibc 2.35, JetPack 7 is 24.04 with 2.39."""
    project: dict[str, Any] = tomli.loads(PROJECT.read_text("utf-8"))["project"]
    requirements = [r for r in project["dependencies"] if "python_version<'3.11'" not in r or python == "3.10"]
    requirements = [r.partition(";")[0] for r in requirements]
    requirements += project["optional-dependencies"][extra]
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(17, glibc + 1)]
    with tempfile.TemporaryDirectory() as target:
        command = [
            *PIP,
            "install",
            "--dry-run",
            "--only-binary=:all:",
            f"--python-version={python}",
            "--target",
            target,
        ]
        try:
            done = subprocess.run(
                [*command, f"--python-version={python}", *platforms, "--platform=manylinux2014_aarch64", *requirements],
                capture_output=True,
                text=True,
                timeout=100,
            )
        except subprocess.TimeoutExpired:
            pytest.skip("the package index took longer than 100 s")
    if "Retrying" in done.stderr or "Temporary failure" in done.stderr:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
