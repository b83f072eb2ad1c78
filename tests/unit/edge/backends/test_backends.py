"""The table of backends: what they promise, and what loading them costs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec
import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from onnx import helper, numpy_helper

import edge.backends
from edge.backends import Backend, LoopBackend, choose_backend, load_backend
from edge.backends.ort import OrtBackend
from edge.backends.trt import engine_cache as engines
from edge.serving.loaded_bundle import Engine
from shared.errors import ConfigError, DeviceError
from shared.manifest import MANIFEST, read_manifest, sha256_of
from shared.messages import GenerateRequest
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, MASK, PAD
from tests.conftest import Exported


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
    backend, name, degraded = choose_backend("auto", debug_bundle, read_manifest(debug_bundle), threads=1)
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
    backend, name, degraded = choose_backend("auto", debug_bundle, read_manifest(debug_bundle), threads=1)
    assert (name, degraded) == ("ort", "no engine for this bundle" if ours else "RuntimeError: Myelin:\\nsegment")
    assert "the GPU cannot be used, and the CPU serves: " in caplog.text
    backend.close()


@pytest.mark.parametrize("name", ["ort", "fake"])
def test_a_step_gives_the_best_candidates_first(debug_bundle: Path, name: str) -> None:
    backend, manifest = loaded(debug_bundle, name), read_manifest(debug_bundle)
    assert backend.lengths[-1] == manifest.model.canvas_len
    assert list(backend.lengths) == sorted(backend.lengths)
    for length in (n for n in backend.lengths if n % 64 == 0):
        canvas = np.full((1, length), MASK, np.int32)
        canvas[0, 0] = BOS
        ids, logp, entropy = backend.step(canvas, np.ones(1, np.float32), canvas == MASK)
        assert ids.dtype == np.int32
        assert logp.dtype == entropy.dtype == np.float32
        assert ids.shape == logp.shape == (1, length, manifest.top_k)
        assert entropy.shape == (1, length)
        ids, logp, entropy = ids[:, 1:], logp[:, 1:], entropy[:, 1:]  # the masked positions
        assert (np.diff(logp) <= 0).all()
        assert (np.exp(logp).sum(2) <= 1 + 1e-5).all()
        assert (entropy >= 0).all()
        assert (entropy <= np.log(manifest.model.vocab_size)).all()
        assert all(len(set(row)) == len(row) for row in ids[0].tolist())
    backend.close()


@pytest.mark.parametrize("threads", [2, 3])
def test_canvases_side_by_side_score_as_each_does_alone_to_the_bit(exported_int8: Exported, threads: int) -> None:
    manifest = read_manifest(exported_int8.folder)
    backend = load_backend("ort", exported_int8.folder, manifest, threads)
    assert not isinstance(backend, LoopBackend) and backend.batches == (1, threads)
    rng = np.random.default_rng(0)
    for length in backend.lengths:
        canvas = rng.integers(FIRST_TEXT_ID, manifest.model.vocab_size, (threads, length)).astype(np.int32)
        masked = rng.random(canvas.shape) < np.linspace(0.1, 0.9, threads)[:, None]
        canvas[masked], canvas[:, 0], masked[:, 0] = MASK, BOS, False
        t = np.linspace(0.3, 0.9, threads, dtype=np.float32)
        together = backend.step(canvas, t, masked)
        for row in range(threads):
            alone = backend.step(canvas[row : row + 1], t[row : row + 1], masked[row : row + 1])
            for one, all_of_them in zip(alone, together, strict=True):
                np.testing.assert_array_equal(one[0][masked[row]], all_of_them[row][masked[row]])
    backend.close()


def test_the_real_graph_forbids_what_cannot_stand(debug_bundle: Path) -> None:
    """MASK and BOS anywhere; EOS and PAD left of visible text."""
    backend = loaded(debug_bundle, "ort")
    canvas = np.full((1, 64), MASK, np.int32)
    canvas[0, 0], canvas[0, 30] = BOS, FIRST_TEXT_ID
    ids, logp, _ = backend.step(canvas, np.full(1, 0.9, np.float32), canvas == MASK)
    possible = logp[0] > -1e3
    assert not np.isin(ids[0][possible], [MASK, BOS]).any()
    assert not np.isin(ids[0, 1:30][possible[1:30]], [EOS, PAD]).any()
    backend.close()


def test_only_wanted_positions_are_scored(debug_bundle: Path) -> None:
    """And as if all had been."""
    backend = loaded(debug_bundle, "ort")
    canvas = np.full((1, 64), MASK, np.int32)
    canvas[0, 0], canvas[0, 30] = BOS, FIRST_TEXT_ID
    some = np.zeros_like(canvas, np.bool_)
    some[0, [1, 29, 31, 63]] = True
    t = np.full(1, 0.9, np.float32)
    everything, few = backend.step(canvas, t, canvas == MASK), backend.step(canvas, t, some)
    np.testing.assert_allclose(few.logp[some], everything.logp[some], atol=1e-5)
    np.testing.assert_allclose(few.entropy[some], everything.entropy[some], atol=1e-5)
    assert not few.logp[~some].any()
    backend.close()


def test_a_graph_of_before_still_runs(exported: Exported, tmp_path: Path) -> None:
    """It finds the masked positions itself: bundles on devices, and those kept for a rollback, have such a graph."""
    old = tmp_path / exported.folder.name
    shutil.copytree(exported.folder, old)
    manifest = read_manifest(old)
    file = manifest.graphs[0].file
    graph = onnx.load(old / file)
    graph.graph.initializer.append(numpy_helper.from_array(np.array(MASK, np.int32), "mask_id"))
    for node in reversed(
        (
            helper.make_node("Equal", ["canvas", "mask_id"], ["is_masked"]),
            helper.make_node("NonZero", ["is_masked"], ["where"]),
            helper.make_node("Split", ["where"], ["row", "where.column"], axis=0, num_outputs=2),
            helper.make_node("Squeeze", ["where.column", "axis_0"], ["column"]),
            helper.make_node("Cast", ["column"], ["wanted"], to=onnx.TensorProto.INT32),
        )
    ):
        graph.graph.node.insert(0, node)
    del graph.graph.input[-1]
    onnx.save(graph, old / file)
    listed = replace(manifest.graphs[0], sha256=sha256_of(old / file))
    (old / MANIFEST).write_bytes(msgspec.json.encode(replace(manifest, graphs=(listed, *manifest.graphs[1:]))))

    requests = [
        GenerateRequest(prompt="a", seed=1, steps=5, selection="random"),
        GenerateRequest(prompt="a", seed=2, steps=5, selection="margin"),
    ]
    texts = []
    for folder in (exported.folder, old):
        engine = Engine.load(folder, "ort", 1)
        texts.append([engine.run(engine.prepare(request)).canvas.tolist() for request in requests])
    assert texts[0] == texts[1]


def test_an_unknown_backend_is_named_with_those_there_are(debug_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="unknown backend 'tpu': choose one of auto, ort, trt, fake"):
        loaded(debug_bundle, "tpu")


@pytest.mark.parametrize("name", ["fake:soon", "fake:-5", "fake:nan", "fake:.", "ort:3"])
def test_an_argument_that_means_nothing_is_named(debug_bundle: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"found '{name.partition(':')[2]}'"):
        loaded(debug_bundle, name)


@pytest.mark.parametrize("name", ["fake", "fake:", "fake:1", "fake:0.5"])
def test_the_fake_needs_no_graph(debug_bundle: Path, tmp_path: Path, name: str) -> None:
    backend = load_backend(name, tmp_path, read_manifest(debug_bundle), threads=1)
    assert not isinstance(backend, LoopBackend)
    length = backend.lengths[-1]
    everywhere = np.ones((1, length), np.bool_)
    first = backend.step(np.zeros((1, length), np.int32), np.ones(1, np.float32), everywhere)
    again = backend.step(np.full((1, length), MASK, np.int32), np.zeros(1, np.float32), everywhere)
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
from edge.serving.loaded_bundle import Engine
before = "onnxruntime" in sys.modules
fake = Engine.load(Path(sys.argv[1]), "fake", 1)
lazy = "onnxruntime" not in sys.modules
Engine.load(Path(sys.argv[1]), "ort", 1)
loaded = [m for m in ("torch", "onnx", "host") if m in sys.modules]
print(json.dumps({"before": before, "lazy": lazy, "first": seen[0], "heavy": loaded}))
"""


def test_telemetry_is_off_before_the_runtime_is_imported(debug_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the runtime is imported by the backend that needs it alone; torch and onnx never."""
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    done = subprocess.run([sys.executable, "-c", PROBE, str(debug_bundle)], capture_output=True, check=True)
    assert json.loads(done.stdout) == {"before": False, "lazy": True, "first": "1", "heavy": []}
