"""`edge.doctor` and the roofline: what they say on a machine without a GPU, and figures that can be counted."""

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from msgspec.structs import replace

from edge import doctor, native
from edge.backends.trt.driver import CudaMemory, Gpu, Memory, PycudaMemory
from edge.backends.trt.find_tensorrt import is_gpu_device
from edge.measure.roofline import BOARDS, floor, matmul_flops
from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.scheduler import Scheduler
from edge.transports.unix_socket import SocketServer
from shared.errors import BundleError, ConfigError, DeviceError, DiffusionLLMError
from shared.manifest import Manifest, find_graph, read_manifest
from tests.support.altered_bundle import changed
from tests.support.board import write_sensor, write_zone
from tests.support.emulator import Emulator
from tests.support.emulator.fakes import FakeDriver, array_at


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Settings of a daemon that does not run, of which a test changes some; none of this machine's."""
    monkeypatch.setattr("edge.config.CONFIG", tmp_path / "none.toml")
    monkeypatch.setenv("EDGELM_SOCKET", str(tmp_path / "socket"))
    monkeypatch.setenv("EDGELM_STATE", str(tmp_path / "state"))

    def change(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(f"EDGELM_{name}", value)

    return change


Report = Callable[..., tuple[int, dict[str, str], str | None]]


@pytest.fixture
def report(settings: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Report:
    """Exit code, findings, the first thing to fix."""

    def examine(bundle: Path) -> tuple[int, dict[str, str], str | None]:
        code = doctor.main(["--bundle", str(bundle), "--json"])
        told: dict[str, Any] = json.loads(capsys.readouterr().out)
        return code, {line["name"]: line["value"] for line in told["findings"]}, told["fix_first"]

    return examine


@pytest.mark.skipif(is_gpu_device(), reason="this machine has a GPU")
def test_doctor_of_a_device_without_a_gpu_finds_nothing_to_fix(debug_bundle: Path, report: Report) -> None:
    code, found, fix = report(debug_bundle)
    assert (code, fix) == (0, None)
    assert (found["gpu"], found["serves from"]) == ("absent", "CPU")
    assert found["bundle"] == "debug: cpu fp32, cuda fp16"
    assert found["step on the cpu"].endswith(" ms")
    assert found["socket"].endswith("no daemon listens") and found["broker"] == "none is configured"


@pytest.mark.skipif(is_gpu_device(), reason="this machine has a GPU")
def test_doctor_runs_blocks_too_and_needs_no_canvas(blocks_bundle: Path, blocks_alone: Path, report: Report) -> None:
    for bundle, by_canvas in ((blocks_bundle, True), (blocks_alone, False)):
        code, found, fix = report(bundle)
        assert (code, fix) == (0, None)
        assert " ms a pass, by " in found["blocks on the cpu"] and ("step on the cpu" in found) == by_canvas


@pytest.mark.skipif(is_gpu_device(), reason="this machine has a GPU")
def test_doctor_tells_what_computes_blocks(
    int8_blocks_bundle: Path, blocks_bundle: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is not the compiled library there is nothing to fix: it serves as before."""
    told = []
    for bundle in (int8_blocks_bundle, blocks_bundle):
        code, found, fix = report(bundle)
        assert (code, fix) == (0, None)
        told.append(found["blocks on the cpu"].partition(" ms a pass, by ")[2])
    if (found_here := native.library()) is not None:
        assert told[0] == f"the compiled library ({found_here.instructions})"
        assert told[1] == "ONNX Runtime, as the compiled library does not know the graphs of this bundle"
    monkeypatch.setattr(native, "_load", lambda _: "was not built")
    code, found, fix = report(int8_blocks_bundle)
    assert (code, fix) == (0, None)
    assert found["blocks on the cpu"].endswith(" ms a pass, by ONNX Runtime, as the compiled library was not built")


@pytest.mark.skipif(is_gpu_device(), reason="this machine has a GPU")
def test_doctor_of_a_device_that_is_to_serve_from_a_gpu_says_what_it_lacks(
    debug_bundle: Path, report: Report, settings: Callable[..., None]
) -> None:
    settings(BACKEND="trt")
    code, found, fix = report(debug_bundle)
    assert (code, found["serves from"]) == (DeviceError.exit_code, "GPU")
    assert fix is not None and ("cuda-python is not installed" in fix or "no NVIDIA driver" in fix)


@pytest.mark.skipif(is_gpu_device(), reason="this machine has a GPU")
@pytest.mark.parametrize("backend", ["auto", "trt"])
def test_doctor_of_a_bundle_without_a_graph_for_this_device_says_so(
    debug_bundle: Path, tmp_path: Path, report: Report, settings: Callable[..., None], backend: str
) -> None:
    """As the daemon: of a device that is to serve from a GPU, that it has none. There is nothing to compare with."""

    def for_cuda(manifest: Manifest) -> Manifest:
        return replace(manifest, graphs=tuple(graph for graph in manifest.graphs if graph.target == "cuda"))

    settings(BACKEND=backend)
    bundle = changed(debug_bundle, tmp_path / "cuda", for_cuda)
    with pytest.raises(DiffusionLLMError) as refused:
        LoadedBundle.load(bundle, backend)
    code, found, fix = report(bundle)
    assert (code, fix) == (refused.value.exit_code, str(refused.value))
    assert code == (BundleError.exit_code if backend == "auto" else DeviceError.exit_code)
    assert found["self-test"].startswith("none: the bundle has no graph for the CPU")


def test_doctor_names_the_file_of_a_bundle_that_is_corrupt(debug_bundle: Path, tmp_path: Path, report: Report) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(debug_bundle, copy)
    (copy / "canvas.cuda.fp16.onnx").write_bytes(b"rubbish")  # not even a graph that this device needs
    code, _, fix = report(copy)
    assert code == BundleError.exit_code and fix is not None
    assert f"{copy / 'canvas.cuda.fp16.onnx'} does not match its manifest" in fix


def test_doctor_names_a_broker_that_does_not_answer(
    debug_bundle: Path, report: Report, settings: Callable[..., None]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        port = taken.getsockname()[1]
        settings(MQTT_HOST="127.0.0.1", MQTT_PORT=str(port))
        code, _, fix = report(debug_bundle)
    assert code == DeviceError.exit_code
    assert fix == f"the broker 127.0.0.1:{port} cannot be reached (Connection refused): start it, or mend `mqtt.host`"


def test_doctor_names_a_listener_that_is_not_the_daemon(
    debug_bundle: Path, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.client.HEALTH_S", 0.2)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(str(tmp_path / "socket"))
        stranger.listen()
        code, _, fix = report(debug_bundle)
    assert code == DeviceError.exit_code and fix is not None
    assert fix.startswith(f"what listens on {tmp_path / 'socket'}, of user {os.getuid()}, is not this daemon")


def test_doctor_says_what_the_daemon_serves(debug_bundle: Path, report: Report, tmp_path: Path) -> None:
    loaded = LoadedBundle.load(debug_bundle, "fake")
    scheduler = Scheduler(loaded, queue_size=1)
    server = SocketServer(tmp_path / "socket", scheduler)
    server.start()
    try:
        code, found, fix = report(debug_bundle)
    finally:
        server.close()
        loaded.close()
    assert (code, fix) == (0, None)
    assert found["socket"] == f"{tmp_path / 'socket'}: {loaded.model} on fake, idle, of user {os.getuid()}"


def test_doctor_names_a_disk_without_room(debug_bundle: Path, report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_DISK_MIB", 1 << 40)
    code, _, fix = report(debug_bundle)
    assert code == DeviceError.exit_code and fix is not None and fix.startswith("disk: ")


def test_doctor_of_a_broken_bundle_names_it_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--bundle", str(tmp_path)]) == BundleError.exit_code
    assert "fix first: " in (err := capsys.readouterr().err)
    assert "is not a bundle" in err


def test_doctor_tells_what_the_board_measures(tmp_path: Path) -> None:
    assert [finding.value for finding in doctor.sensors(tmp_path)] == ["no INA3221 sensor", "no thermal zone"]
    write_sensor(tmp_path, "VDD_IN", 1, millivolts=5000, milliamperes=900)
    write_zone(tmp_path, 0, "cpu-thermal", "48500\n")
    assert [finding.value for finding in doctor.sensors(tmp_path)] == ["VDD_IN 4.50 W", "cpu-thermal 48 °C"]


def test_roofline_counts_the_products_of_the_graph(debug_bundle: Path) -> None:
    manifest = read_manifest(debug_bundle)
    model = manifest.model
    graph = onnx.load(debug_bundle / find_graph(debug_bundle, manifest, "cuda").file).graph
    weights = {w.name: list(w.dims) for w in graph.initializer}
    counted = 0
    for node in graph.node:
        if node.op_type == "MatMul":
            if node.input[1] in weights:
                rows = 1 if node.input[1].startswith("time_mlp") else model.canvas_len
                counted += 2 * rows * int(np.prod(weights[node.input[1]]))
            else:  # scores, values
                counted += 2 * model.canvas_len * model.canvas_len * model.d_model
    # The time's first layer takes the d_model sinusoids, as its second takes d_model.
    assert sum(matmul_flops(model, 1)) == counted


def test_roofline_floor_is_the_slower_of_arithmetic_and_memory(debug_bundle: Path) -> None:
    model = read_manifest(debug_bundle).model
    for board, peak in BOARDS.items():
        found = floor(board, model, precision="fp16", graph_bytes=102_000_000, batch=2)
        linear, attention = matmul_flops(model, 2)
        assert found.compute_ms == pytest.approx((linear + attention) / peak.fp16_tops / 1e9)
        halved = floor(board, model, precision="int8", graph_bytes=102_000_000, batch=2)
        assert halved.compute_ms == pytest.approx((linear / peak.int8_tops + attention / peak.fp16_tops) / 1e9)
        assert found.memory_ms > 102e6 / peak.bandwidth_gbs / 1e6
        assert found.floor_ms == max(found.compute_ms, found.memory_ms)
    with pytest.raises(ConfigError, match="--roofline thor: choose one of orin-nano-15w"):
        floor("thor", model, precision="fp16", graph_bytes=1, batch=1)


def test_cuda_memory_keeps_the_protocol(emulator: Emulator) -> None:
    driver = FakeDriver(emulator)
    memory: Memory = CudaMemory(Gpu(driver))  # type: ignore[arg-type]
    assert memory.graphs and memory.device(1000) > 0
    view, address = memory.mapped(64)
    assert view.nbytes == 64
    view.view(np.int32)[:] = 7
    assert (array_at(address, np.int32, 16) == 7).all()
    memory.free()
    assert not driver.live["cuMemFree"] | driver.live["cuMemFreeHost"]


def test_pycuda_memory_names_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(DeviceError, match="pycuda is not installed"):
        PycudaMemory()
