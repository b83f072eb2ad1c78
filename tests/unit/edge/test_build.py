"""`edge.build`: one engine a key, whole or not at all, and one sentence when there is none."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge import build
from edge.backends.trt import build_process, find_tensorrt
from edge.backends.trt import engine_cache as engines
from edge.backends.trt.engine_builder import Order
from edge.backends.trt.find_tensorrt import SYSTEM_PACKAGES, why_absent
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
    made = engines.facts_of(bundle, manifest, tensorrt="10.3.0", gpu=Device())  # type: ignore[arg-type]
    return msgspec.structs.replace(made, **changes)


def test_engine_key_depends_on_every_fact(debug_bundle: Path) -> None:
    base = facts(debug_bundle)
    assert base.key == facts(debug_bundle).key
    changes: list[dict[str, Any]] = [
        {"graph_sha256": "0" * 64},
        {"kernels_sha256": "1" * 64},
        {"tensorrt": "10.16.2"},
        {"cuda": "13.2"},
        {"gpu": "Thor"},
        {"architecture": "sm_110"},
        {"processors": 4},
        {"shapes": ((1, 64),)},
        {"flags": "other"},
    ]
    assert {name for change in changes for name in change} == set(engines.Facts.__struct_fields__)
    assert len({base.key, *(facts(debug_bundle, **change).key for change in changes)}) == len(changes) + 1


def test_engine_is_stored_whole_and_replaced_whole(debug_bundle: Path, tmp_path: Path) -> None:
    mine = facts(debug_bundle)
    assert engines.find(mine, (tmp_path,)) is None
    place = engines.store(mine, engines.Built(b"first", b"cubin"), tmp_path)
    assert engines.load(place) == (b"first", b"cubin")
    assert engines.store(mine, engines.Built(b"second", b"cubin"), tmp_path) == place
    assert engines.load(engines.find(mine, (tmp_path / "absent", tmp_path)) or tmp_path) == (b"second", b"cubin")
    assert [path.name for path in tmp_path.iterdir()] == [mine.key]


def test_engine_is_readable_at_every_moment_of_its_replacement(
    debug_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = facts(debug_bundle)
    engines.store(mine, engines.Built(b"first", b"cubin"), tmp_path)
    seen: list[bytes] = []

    def watched(name: str) -> None:
        real = getattr(Path, name)

        def change(path: Path, target: Path) -> Path:
            moved: Path = real(path, target)
            seen.append(engines.load(engines.find(mine, (tmp_path,)) or tmp_path).engine)
            return moved

        monkeypatch.setattr(Path, name, change)

    watched("rename")
    watched("replace")
    engines.store(mine, engines.Built(b"second", b"cubin"), tmp_path)
    assert set(seen) <= {b"first", b"second"} and seen[-1] == b"second"


def test_engines_unused_for_longest_are_removed(debug_bundle: Path, tmp_path: Path) -> None:
    """And nothing else: the timing caches, somebody's folder, an engine under another key."""
    for name in ("timings-10.3.0-sm_87-8.cache", "mine"):
        (tmp_path / name).write_bytes(b"")
    oldest = engines.store(facts(debug_bundle), engines.Built(b"", b""), tmp_path)
    shutil.copytree(oldest, tmp_path / "renamed")
    os.utime(oldest, (0, 0))
    versions = [facts(debug_bundle, tensorrt=f"10.{n}") for n in range(engines.KEPT + 3)]
    for age, one in enumerate(versions):
        place = engines.store(one, engines.Built(b"", b""), tmp_path)
        os.utime(place, (1 + age, 1 + age))
        engines.load(tmp_path / versions[0].key)  # in use all the time
    kept = {path.name for path in tmp_path.iterdir()}
    newest = {one.key for one in versions[-engines.KEPT + 1 :]}
    assert kept == {"timings-10.3.0-sm_87-8.cache", "mine", "renamed", versions[0].key, *newest}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
def test_engine_of_another_user_is_not_loaded(debug_bundle: Path, tmp_path: Path) -> None:
    """The daemon's user owns its cache: root must not run what lies there."""
    mine = facts(debug_bundle)
    place = engines.store(mine, engines.Built(b"", b""), tmp_path)
    assert engines.find(mine, (tmp_path,)) == place and engines.any_built((tmp_path,))
    for path in (place / engines.ENGINE, place, tmp_path):
        os.chown(path, 12345, 0)
        assert engines.find(mine, (tmp_path,)) is None and not engines.any_built((tmp_path,))
        os.chown(path, 0, 0)


BUILDER = """
import json, os, sys
from pathlib import Path
from edge.backends.trt import engine_cache as engines
from edge.system.privileges import become_nobody
import msgspec
order = json.loads(sys.argv[-1])
become_nobody()
facts = msgspec.json.decode(sys.argv[1], type=engines.Facts)
cache = Path(order["cache"])
timings = cache / "timings-x.cache"
place = engines.store(facts, engines.Built(timings.read_bytes() + str(os.getresuid()).encode(), b"cubin"), cache)
engines.replace_durably(timings, b"more")
if LINK:
    (place / "step.engine").unlink()
    (place / "step.engine").symlink_to("/etc/shadow")
print(json.dumps({"engine": str(place)}))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="who is not root has nothing to give up")
@pytest.mark.parametrize("link", [False, True])
def test_build_as_root_runs_as_nobody_and_adopts_plain_files_only(
    debug_bundle: Path, tmp_path: Path, link: bool
) -> None:
    mine = facts(debug_bundle)
    (tmp_path / "timings-x.cache").write_bytes(b"timings ")
    script = BUILDER.replace("LINK", str(link))
    order = Order(str(debug_bundle), str(tmp_path), 512, False)
    command = (sys.executable, "-c", script, msgspec.json.encode(mine).decode())
    if link:
        with pytest.raises(DeviceError, match="cannot be copied"):
            build_process.run_build(order, print, command)
        assert engines.find(mine, (tmp_path,)) is None
    else:
        place = build_process.run_build(order, print, command)
        assert place == tmp_path / mine.key and engines.load(place).engine == b"timings (65534, 65534, 65534)"
        assert (place / engines.ENGINE).stat().st_uid == 0
    assert (tmp_path / "timings-x.cache").read_bytes() == b"more"


def test_builder_process_help_names_the_command() -> None:
    command = [sys.executable, "-m", "edge.backends.trt.engine_builder", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 78 and done.stderr.endswith("see python -m edge.build --help\n")


def test_engine_whose_file_is_missing_is_named(debug_bundle: Path, tmp_path: Path) -> None:
    place = engines.store(facts(debug_bundle), engines.Built(b"", b""), tmp_path)
    (place / engines.KERNELS).unlink()
    with pytest.raises(DeviceError, match="cannot be read"):
        engines.load(place)


def run(script: str, cache: Path, told: list[str] | None = None) -> Path:
    order = Order(str(cache), str(cache), 512, False)
    return build_process.run_build(order, (told if told is not None else []).append, (sys.executable, "-c", script))


def test_build_shows_progress_and_tensorrts_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_process, "is_root", lambda: False)
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
        ("import os; os.kill(os.getpid(), 9)", "memory ran out.*less than --workspace-mib 512"),
        ("import os; os.kill(os.getpid(), 11)", "the builder crashed \\(SIGSEGV\\)"),
        ("raise SystemExit(3)", "ended with status 3 and no message"),
        ('print(\'{"error": "cannot read the graph"}\'); raise SystemExit(69)', "^cannot read the graph$"),
    ],
)
def test_build_failures_are_one_sentence(tmp_path: Path, script: str, sentence: str) -> None:
    with pytest.raises(DeviceError, match=sentence):
        run(script, tmp_path)


def test_build_without_a_gpu_is_one_sentence(
    debug_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DeviceError, match=r"cuda-python is not installed|no NVIDIA driver"):
        build.main(["--bundle", str(debug_bundle), "--cache", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_missing_tensorrt_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = (str(tmp_path), "python3*/dist-packages"), (str(tmp_path), "python3*/site-packages")
    monkeypatch.setattr(find_tensorrt, "SYSTEM_PACKAGES", patterns)
    monkeypatch.setattr(find_tensorrt, "TEGRA", (tmp_path / "release", tmp_path / "model"))
    assert "diffusion-llm[tensorrt]" in why_absent()
    (tmp_path / "release").touch()
    assert "sudo apt install python3-libnvinfer" in why_absent()
    for folder in ("python3.12/dist-packages/tensorrt", "python3.10/site-packages/tensorrt"):
        (tmp_path / folder).mkdir(parents=True)
        assert f"TensorRT is in {tmp_path / folder}" in why_absent() and "--system-site-packages" in why_absent()
        shutil.rmtree(tmp_path / folder)
    places = [base for base, _ in SYSTEM_PACKAGES]
    assert places == ["/usr/lib", "/usr/local/lib", "~/.local/lib"]
