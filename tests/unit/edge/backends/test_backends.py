"""The table of backends: what they promise, and what loading them costs."""

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from msgspec.structs import replace

import edge.backends
from edge.backends import choose_backend
from edge.backends.ort import OrtBackend, pool_size
from edge.backends.trt import engine_cache as engines
from edge.decoding.types import Backend, LoopBackend
from edge.serving.loaded_bundle import LoadedBundle
from shared.errors import BundleError, ConfigError, DeviceError
from shared.manifest import read_manifest
from shared.messages import GenerateRequest
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, MASK, PAD
from tests.conftest import Exported
from tests.support.networks import load_backend


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Puts some engine into the only cache folder."""
    monkeypatch.setattr(engines, "cache_folders", lambda: (tmp_path / "none", tmp_path / "cache"))

    def build() -> None:
        place = tmp_path / "cache" / "key"
        place.mkdir(parents=True)
        (place / engines.ENGINE).write_bytes(b"")

    return build


def loaded(bundle: Path, name: str) -> Backend:
    backend = load_backend(name, bundle, read_manifest(bundle), threads=1)
    assert not isinstance(backend, LoopBackend)
    return backend


def test_auto_without_an_engine_is_the_cpu_and_all_is_well(debug_bundle: Path, built: Callable[[], None]) -> None:
    backend, name, degraded, _ = choose_backend("auto", debug_bundle, read_manifest(debug_bundle), threads=1)
    assert isinstance(backend, OrtBackend)
    assert (name, degraded) == ("ort", None)
    backend.close()


@pytest.mark.parametrize("ours", [True, False])
def test_auto_on_a_gpu_device_that_falls_back_is_degraded(
    debug_bundle: Path,
    built: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ours: bool,
) -> None:
    """Whatever was raised: TensorRT's bindings and pybind11 raise what they like."""
    built()

    def broken(*_: object) -> NoReturn:
        raise DeviceError("no engine for this bundle") if ours else RuntimeError("Myelin:\nsegment")

    monkeypatch.setitem(edge.backends._LOADERS, "trt", broken)
    monkeypatch.setattr(edge.backends, "_load_trt", broken)
    backend, name, degraded, _ = choose_backend("auto", debug_bundle, read_manifest(debug_bundle), threads=1)
    assert (name, degraded) == ("ort", "no engine for this bundle" if ours else "RuntimeError: Myelin:\\nsegment")
    assert "the GPU cannot be used, the CPU serves instead: " in caplog.text
    assert backend is not None
    backend.close()


@pytest.mark.parametrize("name", ["ort", "fake"])
@pytest.mark.parametrize("length", [2, 16, 64])
def test_scores_are_of_the_best_candidates_best_first(debug_bundle: Path, name: str, length: int) -> None:
    backend, manifest = loaded(debug_bundle, name), read_manifest(debug_bundle)
    canvas = np.full(length, MASK, np.int32)
    canvas[0] = BOS
    ids, logp, entropy = backend.score(canvas, 1.0, np.arange(1, length))
    assert ids.dtype == np.int32
    assert logp.dtype == entropy.dtype == np.float32
    assert ids.shape == logp.shape == (length - 1, manifest.top_k)
    assert entropy.shape == (length - 1,)
    assert (np.diff(logp) <= 0).all()
    assert (np.exp(logp).sum(1) <= 1 + 1e-5).all()
    assert (entropy >= 0).all()
    assert (entropy <= np.log(manifest.model.vocab_size)).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    backend.close()


@pytest.mark.parametrize("threads", [2, 3, 6])
def test_scores_side_by_side_are_those_alone_to_the_bit(exported_int8: Exported, threads: int) -> None:
    """However many threads a canvas gets, and whatever is computed beside it, of any length."""
    manifest = read_manifest(exported_int8.folder)
    backend = OrtBackend(exported_int8.folder, manifest, threads=threads)
    assert backend.lanes == threads
    rng = np.random.default_rng(0)
    canvases, positions = [], []
    for lane in range(threads):
        canvas = rng.integers(FIRST_TEXT_ID, manifest.model.vocab_size, 30 + 30 * lane).astype(np.int32)
        masked = rng.random(canvas.size) < 0.1 + 0.8 * lane / threads
        canvas[masked], canvas[0], masked[0] = MASK, BOS, False
        canvases.append(canvas)
        positions.append(np.flatnonzero(masked))
    alone = [backend.score(canvas, 0.5, at) for canvas, at in zip(canvases, positions, strict=True)]
    with ThreadPoolExecutor(threads) as pool:
        for rows in range(2, threads + 1):
            together = pool.map(lambda i, n=rows: backend.score(canvases[i], 0.5, positions[i], n), range(rows))
            for one, beside in zip(alone, together, strict=False):
                for expected, found in zip(one, beside, strict=True):
                    np.testing.assert_array_equal(found, expected)
    backend.close()


@pytest.mark.parametrize(
    ("threads", "sizes"), [(1, [1, 1, 1]), (2, [2, 1, 1]), (4, [4, 3, 1, 1, 1]), (6, [6, 5, 4, 1, 1, 1, 1])]
)
def test_pool_size_makes_callers_and_helpers_as_many_as_threads(threads: int, sizes: list[int]) -> None:
    assert [pool_size(threads, rows) for rows in range(1, len(sizes) + 1)] == sizes


def test_canvas_that_is_not_the_default_opens_with_its_first_request(blocks_bundle: Path) -> None:
    bundle = LoadedBundle.load(blocks_bundle, "ort", threads=1)
    assert isinstance(bundle.backend, OrtBackend)
    request = GenerateRequest(prompt="abc", seed=1, max_tokens=4)
    for decoder, sessions in (("blocks", 0), ("canvas", 1)):
        assert bundle.run(bundle.prepare(replace(request, decode=decoder))).text
        with bundle.backend._sessions as found:
            assert len(found) == sessions


def test_canvas_whose_file_is_another_is_refused_at_load(blocks_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(blocks_bundle, tmp_path / "b")
    file = tmp_path / "b" / "canvas.cpu.fp32.onnx"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(BundleError, match="does not match its manifest"):
        LoadedBundle.load(tmp_path / "b", "ort", threads=1)


def test_threads_of_a_pass_that_has_ended_leave_the_cores_alone(debug_bundle: Path) -> None:
    """By default ONNX Runtime's threads spin for 20 ms after a pass, beside whatever comes next."""
    backend = OrtBackend(debug_bundle, read_manifest(debug_bundle), threads=2)
    canvas = np.full(256, MASK, np.int32)
    canvas[0] = BOS
    spun_s = []
    for _ in range(8):
        backend.score(canvas, 1.0, np.arange(1, 256))
        started_s = time.process_time()
        time.sleep(0.04)
        spun_s.append(time.process_time() - started_s)
    assert statistics.median(spun_s) < 0.005
    backend.close()


def test_scores_of_the_real_graph_exclude_pad_bos_and_mask(debug_bundle: Path) -> None:
    """MASK and BOS anywhere; EOS and PAD left of visible text."""
    backend = loaded(debug_bundle, "ort")
    canvas = np.full(64, MASK, np.int32)
    canvas[0], canvas[30] = BOS, FIRST_TEXT_ID
    positions = np.flatnonzero(canvas == MASK)
    ids, logp, _ = backend.score(canvas, 0.9, positions)
    possible = logp > -1e3
    assert not np.isin(ids[possible], [MASK, BOS]).any()
    left = positions < 30
    assert not np.isin(ids[left][possible[left]], [EOS, PAD]).any()
    backend.close()


def test_scores_of_some_positions_are_those_of_scoring_all(debug_bundle: Path) -> None:
    backend = loaded(debug_bundle, "ort")
    canvas = np.full(64, MASK, np.int32)
    canvas[0], canvas[30] = BOS, FIRST_TEXT_ID
    every, some = np.flatnonzero(canvas == MASK), np.array([1, 29, 31, 63])
    everything, few = backend.score(canvas, 0.9, every), backend.score(canvas, 0.9, some)
    at = np.isin(every, some)
    assert few.logp.shape[0] == 4
    np.testing.assert_allclose(few.logp, everything.logp[at], atol=1e-5)
    np.testing.assert_allclose(few.entropy, everything.entropy[at], atol=1e-5)
    backend.close()


def test_choose_backend_unknown_name_is_refused_with_the_known_ones(debug_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="unknown backend 'tpu': choose one of auto, ort, trt, fake"):
        loaded(debug_bundle, "tpu")


@pytest.mark.parametrize("name", ["fake:soon", "fake:-5", "fake:nan", "fake:.", "ort:3"])
def test_choose_backend_meaningless_argument_is_named(debug_bundle: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"found '{name.partition(':')[2]}'"):
        loaded(debug_bundle, name)


@pytest.mark.parametrize("name", ["fake", "fake:", "fake:1", "fake:0.5"])
def test_fake_backend_needs_no_graph(debug_bundle: Path, tmp_path: Path, name: str) -> None:
    backend = load_backend(name, tmp_path, read_manifest(debug_bundle), threads=1)
    assert not isinstance(backend, LoopBackend)
    first = backend.score(np.zeros(64, np.int32), 1.0, np.arange(64))
    again = backend.score(np.full(64, MASK, np.int32), 0.0, np.arange(64))
    np.testing.assert_array_equal(first.ids, again.ids)


PROBE = """
import builtins, json, os, sys
from pathlib import Path
real, seen = builtins.__import__, []
def watch(name, *rest):
    if name.split(".")[0] == "onnxruntime":
        seen.append(os.environ.get("ORT_DISABLE_TELEMETRY"))
    return real(name, *rest)
builtins.__import__ = watch
from edge.serving.loaded_bundle import LoadedBundle
before = "onnxruntime" in sys.modules
fake = LoadedBundle.load(Path(sys.argv[1]), "fake", 1)
lazy = "onnxruntime" not in sys.modules
LoadedBundle.load(Path(sys.argv[1]), "ort", 1)
loaded = [m for m in ("torch", "onnx", "host") if m in sys.modules]
print(json.dumps({"before": before, "lazy": lazy, "first": seen[0], "heavy": loaded}))
"""


def test_telemetry_is_off_before_the_runtime_is_imported(debug_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the runtime is imported by the backend that needs it alone; torch and onnx never."""
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    done = subprocess.run([sys.executable, "-c", PROBE, str(debug_bundle)], capture_output=True, check=True)
    assert json.loads(done.stdout) == {"before": False, "lazy": True, "first": "1", "heavy": []}
