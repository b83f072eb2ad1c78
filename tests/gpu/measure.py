"""What a pass costs on this machine's GPU: `python -m tests.gpu.measure [BUNDLE]`, as JSON. Nothing is judged here.

With TensorRT and an engine built by `edge.build`, of the bundle itself; else with torch in the engine's place, whose
time says nothing about TensorRT's, while the kernels and what surrounds them are the real ones.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from msgspec import Struct

from edge.backends.trt import kernels
from edge.backends.trt.backend import Bucket, TrtBackend, load
from edge.backends.trt.driver import CudaMemory, Gpu
from edge.backends.trt.engine_cache import Built
from edge.config import default_bundle
from edge.decoding.types import Row, Sampling
from shared.errors import DeviceError, run_main
from shared.manifest import MAX_STEPS, read_manifest
from shared.tokens import BOS, MASK

REPEATS: Final = 50
LAUNCHES: Final = 20
"""Of one kernel between two events: a single one is shorter than the clock can tell."""


class Step(Struct):
    """One shape, all its positions masked; medians, in milliseconds. plain: enqueued without a graph, on the host's
    clock as graph. draw, commit: one launch of the kernel on the GPU's clock. draw_bytes: what it must read and write.
    """

    batch: int
    length: int
    graph_ms: float | None
    plain_ms: float
    draw_ms: float
    draw_bytes: int
    draw_gbs: float
    commit_ms: float


class Measurement(Struct):
    """On one device."""

    device: str
    architecture: str
    cuda: str
    engine: str
    vocab: int
    steps: list[Step]


def measure(
    backend: TrtBackend, repeats: int = REPEATS, launches: int = LAUNCHES, engine: str = "torch"
) -> Measurement:
    """Every bucket in turn."""
    gpu = backend._gpu
    gpu.use()
    steps = [_step(backend, bucket, repeats, launches) for bucket in backend._buckets.values()]
    vocab = backend._manifest.model.vocab_size
    return Measurement(gpu.name, gpu.architecture, gpu.cuda_version, engine, vocab, steps)


def _step(backend: TrtBackend, bucket: Bucket, repeats: int, launches: int) -> Step:
    backend._place(_rows(backend, bucket), bucket)  # a thousand steps: each commits one position, so that none runs out
    recorded, bucket.graph = bucket.graph, None

    def plain() -> None:
        backend._enqueue(bucket)
        backend._wait()

    def graph() -> None:
        backend._gpu.call("cuGraphLaunch", recorded, backend._stream)
        backend._wait()

    plain_ms = _median_ms(plain, repeats)
    graph_ms = None if recorded is None else _median_ms(graph, repeats)
    bucket.graph = recorded
    backend._current = None
    backend._place(_rows(backend, bucket), bucket)
    draw_ms = _kernel_ms(backend, lambda: backend._launch_draw(bucket), repeats, launches)
    commit_ms = _kernel_ms(backend, lambda: backend._launch_commit(bucket), repeats, launches)
    backend._current = None
    positions = bucket.batch * bucket.length
    moved = positions * (2 * backend._manifest.model.vocab_size + 4 + 1 + kernels.CANDIDATE.itemsize)
    return Step(
        bucket.batch, bucket.length, graph_ms, plain_ms, draw_ms, moved, moved / max(draw_ms, 1e-9) / 1e6, commit_ms
    )


def _rows(backend: TrtBackend, bucket: Bucket) -> list[Row]:
    canvas = np.full(backend.lengths[-1], MASK, np.int32)
    canvas[0] = BOS
    sampling = Sampling(0, MAX_STEPS, "random", 1.0, backend._manifest.top_k, 1.0)
    return [Row(canvas.copy(), canvas == MASK, replace(sampling, seed=seed)) for seed in range(bucket.batch)]


def _median_ms(work: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[1:])


def _kernel_ms(backend: TrtBackend, launch: Callable[[], None], repeats: int, launches: int) -> float:
    gpu, stream = backend._gpu, backend._stream
    first, last = (gpu.call("cuEventCreate", 0) for _ in range(2))
    times: list[float] = []
    for _ in range(repeats):
        gpu.call("cuEventRecord", first, stream)
        for _ in range(launches):
            launch()
        gpu.call("cuEventRecord", last, stream)
        gpu.call("cuEventSynchronize", last)
        times.append(gpu.call("cuEventElapsedTime", first, last) / launches)
    for event in (first, last):
        gpu.call("cuEventDestroy", event)
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    folder = Path(sys.argv[1]) if sys.argv[1:] else default_bundle()
    manifest = read_manifest(folder)
    gpu = Gpu()  # says in one sentence why there is none
    try:
        backend, engine = load(folder, manifest, ""), "TensorRT"
        gpu.close()
    except DeviceError as error:
        from host.export.random_weights import untrained
        from host.model.network import ModelConfig
        from tests.gpu.standin import Network, StandIn

        print(f"torch stands for the engine: {error}", file=sys.stderr)
        m, engine = manifest.model, "torch"
        config = ModelConfig(m.config, m.d_model, m.layers, m.heads, m.vocab_size, m.canvas_len, m.time_input)
        trt = StandIn(gpu, Network(untrained(config)[0], gpu), m.vocab_size)
        cubin = kernels.compile_kernels(gpu.architecture)
        backend = TrtBackend(trt, gpu, memory=CudaMemory(gpu), manifest=manifest, built=Built(b"", cubin))  # type: ignore[arg-type]
    print(msgspec.json.format(msgspec.json.encode(measure(backend, engine=engine))).decode())
    backend.close()


if __name__ == "__main__":
    run_main(main)
