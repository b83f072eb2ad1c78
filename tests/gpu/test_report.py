"""`make gpu` where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: run `make gpu`")
def test_report_without_a_gpu_is_one_sentence(tmp_path: Path) -> None:
    script = Path(__file__).with_name("report.sh")
    run = subprocess.run(
        ["bash", script], cwd=tmp_path, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr == "error: torch finds no NVIDIA GPU here: run this on one, with a CUDA build of torch\n"
    assert not list(tmp_path.iterdir())
