"""From a bundle to a backend that serves: built, kept, found again, built once more, examined."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge import doctor
from edge.backends.trt import backend as trt
from edge.backends.trt import build_process
from edge.backends.trt import engine_builder as build_engine
from edge.backends.trt import engine_cache as engines
from edge.backends.trt.driver import Gpu
from edge.backends.trt.engine_builder import Order
from edge.backends.trt.profiles import buckets
from edge.decoding.canvas import advance
from edge.measure.self_test import open_row
from shared.errors import BundleError, DeviceError
from shared.manifest import Manifest, read_manifest
from tests.support.emulator import Emulator
from tests.support.emulator.builder import BuildingTensorRT
from tests.support.emulator.fakes import PROCESSORS, STALE, FakeDriver, Result
from tests.support.networks import load_backend

pytestmark = pytest.mark.proof("4. the TensorRT backend over a recording driver, and below NVIDIA's own bindings")


@dataclass
class Jetson:
    """A board with TensorRT, and a folder for its engines."""

    driver: FakeDriver
    tensorrt: BuildingTensorRT
    bundle: Path
    cache: Path

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.bundle)

    def gpu(self) -> Gpu:
        return Gpu(self.driver)  # type: ignore[arg-type]

    def fulfil(self, force: bool = False) -> Path:
        """What the builder's process does."""
        order = Order(str(self.bundle), str(self.cache), 256, force)
        gpu = self.gpu()
        try:
            return build_engine.fulfil(order, self.tensorrt, gpu, self.manifest)  # type: ignore[arg-type]
        finally:
            gpu.close()

    @property
    def timings(self) -> Path:
        return self.cache / "timings-10.3.0-sm_87-8.cache"


@pytest.fixture
def jetson(emulator: Emulator, debug_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jetson:
    driver = FakeDriver(emulator)
    shapes = buckets(read_manifest(debug_bundle), PROCESSORS)
    made = Jetson(driver, BuildingTensorRT(driver, shapes), debug_bundle, tmp_path / "cache")
    made.cache.mkdir()
    monkeypatch.setenv("CACHE_DIRECTORY", str(made.cache))
    monkeypatch.setattr(
        "edge.backends.trt.kernels.compile_kernels", lambda architecture: f"cubin of {architecture}".encode()
    )
    for module in (trt, doctor):
        monkeypatch.setattr(module, "Gpu", made.gpu)
        monkeypatch.setattr(module, "import_tensorrt", lambda: made.tensorrt)
    return made


def test_builder_builds_once_with_a_profile_for_each_shape(jetson: Jetson, capsys: Any) -> None:
    place = jetson.fulfil()
    graph = (jetson.bundle / "canvas.cuda.fp16.onnx").read_bytes()
    assert engines.load(place) == (graph, b"cubin of sm_87")
    assert jetson.fulfil() == place and len(jetson.tensorrt.configs) == 1, "it was there"
    (config,) = jetson.tensorrt.configs
    assert config.workspace == 256 << 20
    assert [profile.shapes["canvas"] for profile in config.profiles] == buckets(jetson.manifest, PROCESSORS)
    assert all(profile.shapes["t"] == profile.shapes["canvas"][:1] for profile in config.profiles)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"phase": "tactics", "done": 1, "of": 2} in told


def test_builder_keeps_and_reuses_the_timing_cache(jetson: Jetson) -> None:
    jetson.fulfil()
    jetson.fulfil(force=True)
    assert jetson.tensorrt.timings_before == [b"", b"timings:one more."]
    assert jetson.timings.read_bytes() == b"timings:one more.one more."
    jetson.timings.write_bytes(b"half of a pow")
    jetson.fulfil(force=True)
    assert jetson.tensorrt.timings_before[2] == b"", "a damaged one is begun anew"
    assert sorted(path.name for path in jetson.cache.iterdir())[-1] == jetson.timings.name
    assert len(list(jetson.cache.iterdir())) == 2, "nothing else is left behind"


def test_builder_without_memory_says_what_helps(jetson: Jetson) -> None:
    jetson.tensorrt.says = "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)"
    helps = r"TensorRT 10\.3\.0 ran out of memory: stop other .*less than --workspace-mib 256"
    with pytest.raises(DeviceError, match=helps):
        jetson.fulfil()
    jetson.tensorrt.says = "Error Code 10: Could not find any implementation for node"
    with pytest.raises(DeviceError, match="built no engine; its messages are above"):
        jetson.fulfil()
    assert list(jetson.cache.iterdir()) == []


def test_builder_keeps_no_engine_that_its_own_tensorrt_rejects(jetson: Jetson) -> None:
    jetson.tensorrt.refuses = {"engine"}
    with pytest.raises(DeviceError, match="rejects the engine that it has just built"):
        jetson.fulfil()
    assert list(jetson.cache.iterdir()) == []


def test_builder_process_tells_a_bundle_fault_from_a_device_fault(tmp_path: Path) -> None:
    """66 and 69, as the command's help says."""
    script = """import sys; print('{"error": "it does not fit"}'); sys.exit(66)"""
    order = Order(str(tmp_path), str(tmp_path), 512, False)
    with pytest.raises(BundleError, match="it does not fit"):
        build_process.run_build(order, print, (sys.executable, "-c", script))


@pytest.fixture
def rebuilds(jetson: Jetson, monkeypatch: pytest.MonkeyPatch) -> list[Order]:
    """Builds in this process instead of another, which would have no such GPU."""
    orders: list[Order] = []

    def run_build(order: Order, tell: Callable[[str], None]) -> Path:
        orders.append(order)
        return jetson.fulfil(order.force)

    monkeypatch.setattr(build_process, "run_build", run_build)
    return orders


def stale(jetson: Jetson) -> Path:
    """An engine that stands under the right key and that TensorRT does not take."""
    place = jetson.fulfil()
    (place / engines.ENGINE).write_bytes(STALE)
    return place


def test_load_builds_a_rejected_engine_once_more(
    jetson: Jetson, rebuilds: list[Order], caplog: pytest.LogCaptureFixture
) -> None:
    place = stale(jetson)
    backend = load_backend("trt", jetson.bundle, jetson.manifest, 0)
    assert [(order.cache, order.force) for order in rebuilds] == [(str(jetson.cache), True)]
    assert "rejects the cached engine: building it again" in caplog.text
    assert engines.load(place).engine != STALE
    row = open_row(jetson.manifest, jetson.manifest.model.canvas_len, seed=1)
    advance(backend, jetson.manifest.schedule, [row])
    assert row.step == 1
    backend.close()
    assert not any(jetson.driver.live.values())


def test_load_does_not_build_a_rejected_engine_twice(
    jetson: Jetson, rebuilds: list[Order], monkeypatch: pytest.MonkeyPatch
) -> None:
    stale(jetson)
    monkeypatch.setattr(build_process, "run_build", lambda order, tell: rebuilds.append(order))
    with pytest.raises(DeviceError, match="rejects the cached engine"):
        load_backend("trt", jetson.bundle, jetson.manifest, 0)
    assert len(rebuilds) == 1
    assert not any(jetson.driver.live.values())


def test_load_leaves_the_device_when_the_engine_that_was_built_anew_is_gone(
    jetson: Jetson, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = stale(jetson)
    monkeypatch.setattr(build_process, "run_build", lambda order, tell: (place / engines.ENGINE).unlink())
    with pytest.raises(DeviceError, match="cannot be read"):
        load_backend("trt", jetson.bundle, jetson.manifest, 0)
    assert not any(jetson.driver.live.values())


def test_load_without_an_engine_names_the_command_that_builds_it(jetson: Jetson) -> None:
    with pytest.raises(DeviceError, match=f"run python -m edge.build --bundle {jetson.bundle}"):
        load_backend("trt", jetson.bundle, jetson.manifest, 0)
    assert not any(jetson.driver.live.values())


def test_driver_that_does_not_start_is_told_from_an_absent_one(jetson: Jetson) -> None:
    """On a Jetson whose user is not in `render`, cuInit gives 801."""
    jetson.driver.fails = {"cuInit": Result.CUDA_ERROR_NOT_SUPPORTED}
    with pytest.raises(
        DeviceError, match=r"does not start \(cuInit failed: CUDA_ERROR_NOT_SUPPORTED\).*video and render"
    ):
        jetson.gpu()


# --- edge.doctor on a board -------------------------------------------------------------------------------------------


def report(jetson: Jetson, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str], str | None]:
    """Exit code, findings, the first thing to fix."""
    code = doctor.main(["--bundle", str(jetson.bundle), "--json"])
    told = json.loads(capsys.readouterr().out)
    return code, {line["name"]: line["value"] for line in told["findings"]}, told["fix_first"]


def agreement(found: dict[str, str], batch: int, length: int) -> int:
    """Percent of a profile's tokens."""
    value = found[f"{batch} × {length} on the gpu"]
    assert value.endswith("% of the tokens are the CPU's")
    return int(value.partition(" ms, ")[2].partition("%")[0])


@pytest.mark.slow
def test_doctor_of_a_healthy_board_reports_nothing_to_fix(jetson: Jetson, capsys: pytest.CaptureFixture[str]) -> None:
    place = jetson.fulfil()
    capsys.readouterr()
    code, found, fix = report(jetson, capsys)
    assert (code, fix) == (0, None)
    assert found["gpu"] == "Orin, sm_87, CUDA 12.6"
    assert found["gpu memory"] == "1024 of 8192 MiB free"
    assert (found["tensorrt"], found["engine"]) == ("10.3.0", str(place))
    assert found["step on the cpu"].endswith(" ms")
    for batch, length in buckets(jetson.manifest, PROCESSORS):  # every profile, nine on an Orin Nano
        assert agreement(found, batch, length) >= 95
    assert not any(jetson.driver.live.values())


def test_doctor_leaves_a_device_that_does_not_tell_its_memory(jetson: Jetson) -> None:
    jetson.driver.fails = {"cuMemGetInfo": Result.CUDA_ERROR_LAUNCH_FAILED}
    found, _ = doctor.gpu_and_engine(jetson.bundle, jetson.manifest)
    assert [(one.name, one.fix) for one in found] == [("gpu", "cuMemGetInfo failed: CUDA_ERROR_LAUNCH_FAILED")]
    assert not any(jetson.driver.live.values())


def test_doctor_names_a_missing_engine(jetson: Jetson, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, fix = report(jetson, capsys)
    assert (code, found["engine"]) == (DeviceError.exit_code, "not built yet")
    assert fix == f"python -m edge.build --bundle {jetson.bundle}"


@pytest.mark.slow
def test_doctor_names_an_engine_that_disagrees_with_the_cpu(
    jetson: Jetson, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jetson.fulfil()
    capsys.readouterr()
    alike = trt.TrtBackend._launch_draw

    broken = buckets(jetson.manifest, PROCESSORS)[4]  # one profile of all, in the middle

    def another_seed(backend: trt.TrtBackend, bucket: trt.Bucket) -> None:
        backend._rows["seed"] += (bucket.batch, bucket.length) == broken
        alike(backend, bucket)

    monkeypatch.setattr(trt.TrtBackend, "_launch_draw", another_seed)
    monkeypatch.setattr("edge.backends.trt.driver.CudaMemory.graphs", False)
    code, found, fix = report(jetson, capsys)
    name = "{} × {} on the gpu".format(*broken)
    assert code == DeviceError.exit_code and fix == f"{name} disagrees with the CPU: python -m edge.build --force"
    for profile in buckets(jetson.manifest, PROCESSORS):
        assert (agreement(found, *profile) < 80) == (profile == broken)


def test_doctor_names_a_gpu_that_fails_in_the_self_test(jetson: Jetson, capsys: pytest.CaptureFixture[str]) -> None:
    jetson.fulfil()
    capsys.readouterr()
    jetson.driver.fails = {"cuEventSynchronize": Result.CUDA_ERROR_LAUNCH_FAILED}
    code, found, fix = report(jetson, capsys)
    assert (code, found["self-test"]) == (DeviceError.exit_code, "failed")
    assert fix == "cuEventSynchronize failed: CUDA_ERROR_LAUNCH_FAILED"
    assert not any(jetson.driver.live.values())


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64", "6 (Jetson Linux 36.4.3)"),
        ("# R39 (release), REVISION: 2.0, GCID: 1, BOARD: generic, EABI: aarch64", "7 (Jetson Linux 39.2.0)"),
    ],
)
def test_doctor_reads_jetpack_from_the_release_file(tmp_path: Path, line: str, value: str) -> None:
    (tmp_path / "release").write_text(f"{line}\nmore\n")
    assert doctor.jetpack(tmp_path / "release") == doctor.Finding("jetpack", value)


def test_doctor_names_a_missing_or_older_jetpack(tmp_path: Path) -> None:
    assert doctor.jetpack(tmp_path / "none") == doctor.Finding("jetpack", "no Jetson Linux")
    (tmp_path / "old").write_text("# R35 (release), REVISION: 4.1")
    assert "JetPack 6 (R36) is the oldest" in str(doctor.jetpack(tmp_path / "old").fix)


def test_doctor_reports_the_power_mode_of_nvpmodel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvpmodel"
    tool.write_text("#!/bin/sh\necho NV Power Mode: 25W\necho 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = {finding.name: finding.value for finding in doctor.system()}
    assert found["power mode"] == "NV Power Mode: 25W 1"


def test_doctor_names_the_group_of_a_closed_device_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [tmp_path / "nvmap", tmp_path / "renderD128", tmp_path / "absent"]
    assert doctor.device_nodes(nodes) == [doctor.Finding("device nodes", "none")]
    for node in nodes[:2]:
        node.touch()
    assert doctor.device_nodes(nodes)[0].fix is None
    monkeypatch.setattr(os, "access", lambda path, mode: path != nodes[1])  # root may open everything
    (found,) = doctor.device_nodes(nodes)
    assert found.value == "1 of 2 are closed"
    assert found.fix is not None and f"sudo usermod -aG {nodes[1].group()} $USER" in found.fix
