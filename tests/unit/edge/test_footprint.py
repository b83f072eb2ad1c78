"""The daemon's whole process stays small: its peak resident memory, with eight requests at once too, below 140 MB."""

import os
import re
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from edge.config import default_bundle
from shared.messages import GenerateRequest, Response, encode

LIMIT_MB = 140


def peak_mb(pid: int) -> float:
    """VmHWM of a living process; the kernel counts in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def served(bundle: Path, path: Path, requests: list[GenerateRequest]) -> tuple[list[Response], float]:
    """Start a daemon, let it answer requests at once, stop it.  → answers, its peak memory in MB"""
    command = [sys.executable, "-m", "edge", "--bundle", str(bundle), "--socket", str(path)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EDGELM_")} | {"EDGELM_THREADS": "2"}
    daemon = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert daemon.stdout is not None
    try:
        print(daemon.stdout.readline().strip())  # "ready in …"
        with ExitStack() as stack:
            connections = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in requests]
            for connection, request in zip(connections, requests, strict=True):
                connection.settimeout(60)
                connection.connect(str(path))
                connection.sendall(encode(request) + b"\n")
            lines = [stack.enter_context(connection.makefile("rb")).readline() for connection in connections]
        return [msgspec.json.decode(line, type=Response) for line in lines], peak_mb(daemon.pid)
    finally:
        daemon.terminate()
        daemon.communicate(timeout=30)


def test_footprint_of_a_debug_bundle(debug_bundle: Path, tmp_path: Path) -> None:
    answers, megabytes = served(debug_bundle, tmp_path / "s", [GenerateRequest(prompt="Once upon", seed=0, steps=32)])
    print(f"peak {megabytes:.0f} MB")
    assert [answer.status for answer in answers] == ["ok"]
    assert megabytes < LIMIT_MB


@pytest.mark.skipif(not default_bundle().is_dir(), reason="no bundle is shipped beside the packages")
def test_footprint_of_the_shipped_bundle(tmp_path: Path) -> None:
    """Eight texts at once hold eight slots."""
    requests = [GenerateRequest(prompt="Once upon a time", seed=seed) for seed in range(8)]
    answers, megabytes = served(default_bundle(), tmp_path / "s", requests)
    print(f"peak {megabytes:.0f} MB")
    assert [answer.status for answer in answers] == ["ok"] * 8
    assert megabytes < LIMIT_MB
