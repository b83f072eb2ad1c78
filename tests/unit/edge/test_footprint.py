"""The daemon's whole process stays small: its highest resident memory, after a request, below 150 MB."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edge.config import default_bundle
from shared.messages import GenerateRequest, Response, encode

LIMIT_MB = 150


def peak_mb(pid: int) -> float:
    """VmHWM of a living process; the kernel counts in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def served(bundle: Path, path: Path) -> tuple[Response, float]:
    """Start a daemon, let it write one text, stop it.  → its answer and its peak memory in MB"""
    command = [sys.executable, "-m", "edge", "--bundle", str(bundle), "--socket", str(path)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EDGELM_")} | {"EDGELM_THREADS": "2"}
    daemon = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert daemon.stdout is not None
    try:
        print(daemon.stdout.readline().strip())  # "ready in …"
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(str(path))
            connection.sendall(encode(GenerateRequest(prompt="Once upon a time", seed=0, steps=32)) + b"\n")
            with connection.makefile("rb") as answers:
                answer = msgspec.json.decode(answers.readline(), type=Response)
        return answer, peak_mb(daemon.pid)
    finally:
        daemon.terminate()
        daemon.communicate(timeout=30)


def test_footprint_of_a_debug_bundle(debug_bundle: Path, tmp_path: Path) -> None:
    answer, megabytes = served(debug_bundle, tmp_path / "s")
    print(f"peak {megabytes:.0f} MB")
    assert answer.status == "ok"
    assert megabytes < LIMIT_MB


@pytest.mark.skipif(not default_bundle().is_dir(), reason="no bundle is shipped beside the packages")
def test_footprint_of_the_shipped_bundle(tmp_path: Path) -> None:
    answer, megabytes = served(default_bundle(), tmp_path / "s")
    print(f"peak {megabytes:.0f} MB")
    assert answer.status == "ok"
    assert megabytes < LIMIT_MB
