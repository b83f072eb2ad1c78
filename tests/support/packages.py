"""Packages that some proofs need beside the suite's own, each in a folder of its own, fetched once and kept."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--retries", "1", "--timeout", "20")
FETCH_LIMIT_S = 90


def cache_folder() -> Path:
    """Outside of the checkout, so that a fresh clone finds it; removing it costs another download."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-llm-tests"


def installed(requirement: str, *flags: str) -> Path:
    """The folder that pip installed a requirement ("tensorrt-rtx==1.7.1.116") into; without it, skips and says why."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    folder = cache_folder() / f"{requirement.replace('==', '-')}-{python}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        fresh = Path(temporary) / "fresh"
        command = [*PIP, "install", "--target", str(fresh), *flags, requirement]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_LIMIT_S)
        except subprocess.TimeoutExpired:
            pytest.skip(f"{requirement} could not be fetched within {FETCH_LIMIT_S} s")
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            pytest.skip(f"{requirement} cannot be fetched here: {(errors or ['pip gives no reason'])[-1]}")
        try:
            fresh.rename(folder)
        except OSError:  # another process was quicker
            assert folder.is_dir()
    return folder
