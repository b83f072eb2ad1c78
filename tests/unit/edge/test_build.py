"""`edge.build`: one engine a key, whole or not at all, and one sentence when there is none."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge import build
from edge.backends.trt import engine_cache as engines
from edge.backends.trt.engine_builder import Order
from edge.backends.trt.find_tensorrt import why_absent
from shared.errors import DeviceError
from shared.manifest import read_manifest


@dataclass
class Device:
    name: str = "Orin"
    architecture: str = "sm_87"
    cuda_version: str = "12.6"
    processors: int = 8


def facts(bundle: Path, **changes: Any) -> engines.Facts:
    manifest = read_manifest(bundle)
    made = engines.facts_of(bundle, manifest, "10.3.0", Device(), [(1, 64), (2, 64)])  # type: ignore[arg-type]
    return msgspec.structs.replace(made, **changes)


def test_anything_an_engine_depends_on_changes_its_key(debug_bundle: Path) -> None:
    base = facts(debug_bundle)
    assert base.key == facts(debug_bundle).key
    changes: list[dict[str, Any]] = [
        {"graph_sha256": "0" * 64}, {"kernels_sha256": "1" * 64}, {"tensorrt": "10.16.2"}, {"cuda": "13.2"},
        {"gpu": "Thor"}, {"architecture": "sm_110"}, {"processors": 4}, {"shapes": ((1, 64),)}, {"flags": "other"},
    ]  # fmt: skip
    assert {name for change in changes for name in change} == set(engines.Facts.__struct_fields__)
    assert len({base.key, *(facts(debug_bundle, **change).key for change in changes)}) == len(changes) + 1


def test_an_engine_is_stored_whole_and_replaced_whole(debug_bundle: Path, tmp_path: Path) -> None:
    mine = facts(debug_bundle)
    assert engines.find(mine, (tmp_path,)) is None
    place = engines.store(mine, engines.Built(b"first", b"cubin"), tmp_path)
    assert engines.load(place) == (b"first", b"cubin")
    assert engines.store(mine, engines.Built(b"second", b"cubin"), tmp_path) == place
    assert engines.load(engines.find(mine, (tmp_path / "absent", tmp_path)) or tmp_path) == (b"second", b"cubin")
    assert [path.name for path in tmp_path.iterdir()] == [mine.key]
    (place / engines.KERNELS).unlink()
    with pytest.raises(DeviceError, match="cannot be read"):
        engines.load(place)


def run(script: str, tmp_path: Path, told: list[str] | None = None) -> Path:
    order = Order(str(tmp_path), str(tmp_path), 512, False)
    return build.run_build(order, (told if told is not None else []).append, (sys.executable, "-c", script))


def test_progress_and_tensorrts_words_reach_the_screen(tmp_path: Path) -> None:
    lines = [
        {"phase": "kernels", "done": 0, "of": 1},
        {"severity": "WARNING", "message": "slow"},
        {"engine": "/cache/key"},
    ]
    script = "".join(f"print({json.dumps(line)!r})\n" for line in lines[:2]) + "print('from a library')\n"
    told: list[str] = []
    assert run(script + f"print({json.dumps(lines[2])!r})", tmp_path, told) == Path("/cache/key")
    assert told[0].endswith("s  kernels 0/1")
    assert told[1:] == ["TensorRT: warning: slow", "from a library"]


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("import os; os.kill(os.getpid(), 9)", "want of memory.*less than --workspace-mib 512"),
        ("import os; os.kill(os.getpid(), 11)", "the builder crashed \\(SIGSEGV\\)"),
        ("raise SystemExit(3)", "ended with status 3 and no word"),
        ('print(\'{"error": "cannot read the graph"}\'); raise SystemExit(69)', "^cannot read the graph$"),
    ],
)
def test_every_way_to_fail_has_one_sentence(tmp_path: Path, script: str, sentence: str) -> None:
    with pytest.raises(DeviceError, match=sentence):
        run(script, tmp_path)


def test_without_a_gpu_the_real_command_says_so(
    debug_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DeviceError, match=r"cuda-python is not installed|no NVIDIA driver"):
        build.main(["--bundle", str(debug_bundle), "--cache", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_an_absent_tensorrt_comes_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge.backends.trt import find_tensorrt as tensorrt_lookup

    monkeypatch.setattr(tensorrt_lookup, "SYSTEM_PACKAGES", (tmp_path,))
    monkeypatch.setattr(tensorrt_lookup, "TEGRA", (tmp_path / "release", tmp_path / "model"))
    assert "diffusion-llm[tensorrt]" in why_absent()
    (tmp_path / "release").touch()
    assert "sudo apt install python3-libnvinfer" in why_absent()
    (tmp_path / "tensorrt").mkdir()
    assert "--system-site-packages" in why_absent()
