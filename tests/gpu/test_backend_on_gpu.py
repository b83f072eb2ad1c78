"""The whole backend on a real GPU: torch in the engine's place where TensorRT is absent, TensorRT where it is there."""

from dataclasses import replace
from pathlib import Path

import pytest

from edge import build, doctor
from edge.backends.trt.backend import TrtBackend
from edge.backends.trt.driver import Gpu
from edge.decoding.canvas import advance, bucket
from edge.decoding.types import Row
from shared.manifest import Manifest, read_manifest
from tests.gpu.conftest import need_tensorrt, rows
from tests.gpu.measure import measure
from tests.gpu.standin import Network, SameLogits
from tests.support.networks import load_backend
from tests.unit.edge.backends.trt.test_kernels import RULES

pytestmark = pytest.mark.proof("7. kernels, captured loop and backend on a GPU")


def finish(backend: TrtBackend | SameLogits, mine: list[Row]) -> list[Row]:
    """Pass by pass, whoever is unfinished together, as the scheduler batches them."""
    while open_rows := [row for row in mine if row.left]:
        if isinstance(backend, TrtBackend):
            length = bucket(open_rows[0].active, backend.lengths)
            open_rows = [row for row in open_rows if bucket(row.active, backend.lengths) == length]
        advance(backend, "linear", open_rows)
    return mine


@pytest.mark.parametrize("captured", [True, False], ids=["graph", "plain"])
def test_backend_on_gpu_captures_every_bucket_and_writes_the_same_without_graphs(
    backend: TrtBackend, network: Network, manifest: Manifest, captured: bool
) -> None:
    """Whole texts, against numpy's loop on the same network's logits; a draw too close for FP16 may part two of them.

    Rows beside each other multiply matrices of another shape, so on a GPU the last bit of a logit may differ.
    """
    assert all(bucket.graph is not None for bucket in backend._buckets.values()), "nothing was captured"
    if not captured:
        for bucket in backend._buckets.values():
            backend._gpu.call("cuGraphExecDestroy", bucket.graph)
            bucket.graph = None
    agreed = total = 0
    for name in ("random", "confidence", "entropy", "argmax by margin", "hot nucleus"):
        sampling = replace(RULES[name], steps=6)
        found = finish(backend, rows(3, sampling))
        wanted = finish(SameLogits(network, manifest.top_k), rows(3, sampling))
        agreed += sum(bool((f.canvas == w.canvas).all()) for f, w in zip(found, wanted, strict=True))
        total += len(found)
    assert agreed >= 0.8 * total


def test_backend_on_gpu_rows_that_come_and_go_write_what_they_would_alone(backend: TrtBackend) -> None:
    sampling = replace(RULES["random"], steps=5)
    alone = [finish(backend, [row])[0] for row in rows(9, sampling)]
    together = rows(9, sampling)
    finish(backend, together[:3])
    for _ in range(2):
        backend.advance(together[3:5], backend.lengths[-1])
    finish(backend, together[3:])
    same = sum(bool((a.canvas == b.canvas).all()) for a, b in zip(alone, together, strict=True))
    assert same >= 7


def test_backend_on_gpu_measurement_runs(backend: TrtBackend) -> None:
    """`python -m tests.gpu.measure`, with few repetitions: figures for every bucket, none of them judged here."""
    found = measure(backend, repeats=1, launches=2)
    assert [(step.batch, step.length) for step in found.steps] == list(backend._buckets)
    assert all(step.graph_ms and step.plain_ms and step.draw_bytes for step in found.steps)


def test_backend_on_gpu_with_real_tensorrt(
    gpu: Gpu, debug_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Builds an engine, loads it, and holds it to the processor, as a Jetson's owner does."""
    need_tensorrt(gpu)
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    assert build.main(["--bundle", str(debug_bundle), "--cache", str(tmp_path)]) == 0
    manifest = read_manifest(debug_bundle)
    backend = load_backend("trt", debug_bundle, manifest, 0)
    assert isinstance(backend, TrtBackend)
    found = doctor.self_test(debug_bundle, manifest, {"canvas": list(backend._buckets)})
    assert [finding.fix for finding in found if finding.fix] == []
    assert all(bucket.graph is not None for bucket in backend._buckets.values()), "nothing was captured"
    print(measure(backend, engine="TensorRT"))
    backend.close()
