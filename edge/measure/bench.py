"""How fast a bundle runs here: `python -m edge.bench`. Quote ratios from one run; absolute times vary by machine.

Where the training host is installed, its torch network and the machine's matmul peaks are measured in the same run.
"""

import argparse
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import numpy as np
from msgspec import Struct

from edge.backends.trt.profiles import BATCHES
from edge.config import default_bundle
from edge.decoding.canvas import wanted
from edge.decoding.types import AnyBackend, LoopBackend, Positions, Row, Sampling
from edge.measure.blocks import Blocks, measure_blocks, print_blocks
from edge.measure.clients import measure, print_clients, serving
from edge.measure.conditions import KINDS, measure_condition, print_condition
from edge.measure.peers import measure_peers, packages, print_peers
from edge.measure.roofline import BOARDS, floor
from edge.serving.loaded_bundle import LoadedBundle
from shared.errors import ConfigError, command_name
from shared.manifest import MAX_STEPS, find_graph, read_manifest
from shared.messages import GenerateRequest, Response, encode
from shared.tokens import BOS, FIRST_TEXT_ID, MASK

T = TypeVar("T")
STEP_COUNTS: Final = (8, 16, 32, 64, 128)
DAEMON_STEPS: Final = 16
SPIN_S: Final = 0.1
"""ONNX Runtime's threads spin for a while after a step, on cores that another process needs."""
REPEATS: Final = 3
MAX_CLIENTS: Final = 24
"""Below the daemon's default queue size."""
EPILOG: Final = """examples:
  python -m edge.bench --bundle bundles/mine --json
  python -m edge.bench --clients 1,2,4,8
  python -m edge.bench --peers
  python -m edge.bench --condition words
  python -m edge.bench --roofline orin-nano-15w"""


class Generation(Struct):
    """Whole texts at one number of steps; medians over seeds. loop_ms: a step's time outside the backend."""

    steps: int
    tokens_per_s: float
    first_token_ms: float
    last_token_ms: float
    loop_ms: float


class DaemonCost(Struct):
    """A daemon process. overhead_ms: its latency less the time of the bare loop, median of pairs."""

    start_s: float  # from the process's start to its first answer
    overhead_ms: float
    peak_mb: float


class Report(Struct):
    """All measurements. A step is of one canvas of full length with every second position masked, and scores these;
    default_step_ms: it scores only the positions that the bundle's default sampling is about to commit.
    """

    bundle: str
    threads: int
    step_ms: float
    bare_step_ms: float | None  # without the reduction to top-K; None for backends without a profile
    reduction_ms: float | None
    default_step_ms: float | None  # None for a LoopBackend, which scores everything
    default_scored: int  # positions
    generations: list[Generation]
    daemon: DaemonCost
    blocks: Blocks | None
    reference: dict[str, float] | None  # from `host.bench step`; None where the host is not installed


class Stopwatch:
    """Adds up the time spent in a backend's own method, `score` or `advance`, while it is attached."""

    def __init__(self, backend: AnyBackend) -> None:
        self._backend, self._name = backend, "advance" if isinstance(backend, LoopBackend) else "score"
        self.seconds = 0.0

    def __enter__(self) -> "Stopwatch":
        inner: Callable[..., object] = getattr(self._backend, self._name)

        def timed(*arguments: object) -> object:
            started = time.perf_counter()
            result = inner(*arguments)
            self.seconds += time.perf_counter() - started
            return result

        setattr(self._backend, self._name, timed)  # hides the class's method
        return self

    def __exit__(self, *_: object) -> None:
        delattr(self._backend, self._name)


def canvas_backend(loaded: LoadedBundle) -> AnyBackend:
    """Raises ConfigError when the bundle does not decode by canvas."""
    if loaded.backend is None:
        raise ConfigError(f"{loaded.model} does not decode by canvas, which is what edge.bench measures")
    return loaded.backend


def half_masked(loaded: LoadedBundle) -> Row:
    """A canvas with every second position masked, as after two thirds of the steps of default sampling."""
    model, defaults = loaded.manifest.model, loaded.manifest.defaults
    canvas = np.arange(model.canvas_len, dtype=np.int32) % (model.vocab_size - FIRST_TEXT_ID) + FIRST_TEXT_ID
    canvas[::2], canvas[0] = MASK, BOS
    sampling = Sampling(0, defaults.steps, defaults.selection, defaults.temperature, loaded.manifest.top_k, 1.0)
    return Row(canvas, canvas == MASK, sampling, step=defaults.steps * 2 // 3)


def median_step_ms(loaded: LoadedBundle, positions: Positions, repeats: int = 40) -> float:
    """Median time of a step of half_masked() that scores these positions."""
    row, backend, times = half_masked(loaded), canvas_backend(loaded), []
    for _ in range(repeats + 5):
        started = time.perf_counter()
        if isinstance(backend, LoopBackend):
            backend.advance([replace(row, canvas=row.canvas.copy())], row.canvas.size)
        else:
            backend.score(row.canvas, 0.5, positions)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[5:])


def reduction_share(bundle: Path, threads: int) -> float | None:
    """Share of a step's time in the reduction to top-K, from ONNX Runtime's profile."""
    from edge.backends.ort import OrtBackend

    with tempfile.TemporaryDirectory() as folder:
        loaded = LoadedBundle.load(bundle, "ort", threads)
        assert isinstance(loaded.backend, OrtBackend)
        loaded.backend = OrtBackend(bundle, loaded.manifest, threads=threads, profile=Path(folder) / "step")
        median_step_ms(loaded, np.flatnonzero(half_masked(loaded).fill), repeats=10)
        events = msgspec.json.decode(loaded.backend.end_profile().read_bytes())
    spent = {True: 0.0, False: 0.0}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent["reduce." in event["name"]] += event["dur"]
    return spent[True] / (spent[True] + spent[False])


def generation(loaded: LoadedBundle, steps: int) -> Generation:
    """Three whole texts from a short prompt, at full length."""
    rows = []
    for seed in range(REPEATS):
        plan = loaded.prepare(GenerateRequest(prompt="Once upon a time", seed=seed, steps=steps))
        first_s = 0.0
        started = time.perf_counter()

        def on_step(snapshot: object, started: float = started) -> None:
            nonlocal first_s
            first_s = first_s or time.perf_counter() - started

        with Stopwatch(canvas_backend(loaded)) as inside:
            completion = loaded.run(plan, on_step)
        total_s = time.perf_counter() - started
        loop_ms = (total_s - inside.seconds) / completion.steps * 1e3
        rows.append((completion.generated_tokens / total_s, first_s * 1e3, total_s * 1e3, loop_ms))
    return Generation(steps, *(statistics.median(column) for column in zip(*rows, strict=True)))


def daemon_cost(loaded: LoadedBundle, bundle: Path, backend: str, threads: int) -> DaemonCost:
    """Start a daemon process and time its requests, alternating with the bare loop in this process."""
    started = time.perf_counter()
    with (
        serving(bundle, backend, threads) as daemon,
        daemon.connect() as connection,
        connection.makefile("rb") as answers,
    ):
        connection.sendall(b'{"type": "health"}\n')
        answers.readline()
        start_s = time.perf_counter() - started
        overheads = []
        for seed in range(9):
            request = GenerateRequest(prompt="Once upon a time", seed=seed, steps=DAEMON_STEPS)
            plan = loaded.prepare(request)
            time.sleep(SPIN_S)
            started = time.perf_counter()
            loaded.run(plan)
            alone = time.perf_counter() - started
            time.sleep(SPIN_S)
            started = time.perf_counter()
            connection.sendall(encode(request) + b"\n")
            answer = msgspec.json.decode(answers.readline(), type=Response)
            overheads.append(time.perf_counter() - started - alone)
            assert answer.status == "ok", answer
        return DaemonCost(start_s, statistics.median(overheads[1:]) * 1e3, daemon.peak_mb())


def host_reference(loaded: LoadedBundle, threads: int) -> dict[str, float] | None:
    """`host.bench step` in a process of its own: the edge imports no torch."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("host") is None:
        return None
    model = loaded.manifest.model
    shape = [model.d_model, model.layers, model.heads, model.vocab_size, model.canvas_len]
    command = [sys.executable, "-m", "host.bench", "step", *map(str, shape), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"`host.bench step` failed: {done.stderr.decode().strip().splitlines()[-1]}")
    return msgspec.json.decode(done.stdout, type=dict[str, float])


def print_report(r: Report) -> None:
    """The table."""
    print(f"{r.bundle}, {r.threads} threads")
    print(f"{'step, all that is masked scored':36} {r.step_ms:8.2f} ms")
    if r.bare_step_ms is not None:
        print(f"{'  the network':36} {r.bare_step_ms:8.2f} ms\n{'  reduction to top-K':36} {r.reduction_ms:8.2f} ms")
    if r.default_step_ms is not None:
        print(f"{f'step, the {r.default_scored} to commit scored':36} {r.default_step_ms:8.2f} ms")
    if r.reference is not None:
        ref = r.reference
        print(f"{'torch float32, eager, same step':36} {ref['torch_ms']:8.2f} ms")
        print(f"{'  times our step':36} {ref['torch_ms'] / r.step_ms:8.2f}")
        if r.bare_step_ms is not None:
            reached = ref["gflop"] / r.bare_step_ms
            print(f"{'  times our network':36} {ref['torch_ms'] / r.bare_step_ms:8.2f}")
            print(f"{'matmul peak, float32':36} {ref['fp32_gflops']:8.0f} GFLOP/s")
            print(f"{'matmul peak, INT8':36} {ref['int8_gflops']:8.0f} GOP/s; the network reaches {reached * 1e3:.0f}")
    print(f"{'daemon, start to first answer':36} {r.daemon.start_s:8.2f} s")
    print(f"{'daemon, peak memory':36} {r.daemon.peak_mb:8.0f} MB")
    print(f"{'daemon, overhead per request':36} {r.daemon.overhead_ms:8.2f} ms")
    print(f"\n{'steps':>6} {'tokens/s':>9} {'first token, ms':>16} {'last token, ms':>15} {'loop, ms a step':>16}")
    for g in r.generations:
        print(f"{g.steps:6} {g.tokens_per_s:9.0f} {g.first_token_ms:16.1f} {g.last_token_ms:15.1f} {g.loop_ms:16.2f}")
    if r.blocks is not None:
        print_blocks(r.blocks)


def parse_clients(text: str) -> list[int]:
    """`1,2,4` as numbers. Raises ConfigError."""
    if not re.fullmatch(r"[1-9]\d?(,[1-9]\d?)*", text, re.ASCII) or any(int(n) > MAX_CLIENTS for n in text.split(",")):
        raise ConfigError(f"--clients takes numbers from 1 to {MAX_CLIENTS} with commas between, as in 1,2,4,8,16")
    return [int(n) for n in text.split(",")]


def print_roofline(bundle: Path, board: str, as_json: bool) -> None:
    """The roofline floor of a step of each CUDA graph, for each batch size."""
    manifest = read_manifest(bundle)
    find_graph(bundle, manifest, "cuda")  # raises when there is none
    graphs = [(g.precision, (bundle / g.file).stat().st_size) for g in manifest.graphs if g.target == "cuda"]
    floors = [floor(board, manifest.model, precision=p, graph_bytes=n, batch=b) for p, n in graphs for b in BATCHES]
    if as_json:
        print(msgspec.json.encode([msgspec.structs.asdict(f) | {"floor_ms": f.floor_ms} for f in floors]).decode())
        return
    print(f"{board}, {manifest.model.canvas_len} positions: an ESTIMATE from published peaks, not a measurement")
    print(f"{'graph':6} {'batch':>5} {'GFLOP':>8} {'MB':>8} {'compute, ms':>12} {'memory, ms':>11} {'floor, ms':>10}")
    for f in floors:
        shape = f"{f.precision:6} {f.batch:5} {f.gflop:8.2f} {f.mbytes:8.1f}"
        print(f"{shape} {f.compute_ms:12.3f} {f.memory_ms:11.3f} {f.floor_ms:10.3f}")


def say(measured: T, as_json: bool, show: Callable[[T], None]) -> None:
    """Print what was measured, as JSON or as a table."""
    if as_json:
        print(msgspec.json.encode(measured).decode())
    else:
        show(measured)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog=command_name("edge.bench"),
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, cores = parser.add_argument, len(os.sched_getaffinity(0))
    add("--bundle", type=Path, default=default_bundle(), help="folder (default: the shipped one)")
    add("--backend", default="ort", metavar="NAME", help="what runs it: ort, trt, fake (default: %(default)s)")
    add("--threads", type=int, default=cores, metavar="N", help="of the CPU runtime (default: all, %(default)s here)")
    add("--steps", type=int, nargs="+", default=STEP_COUNTS, metavar="N", help="steps per text (default: 8 to 128)")
    add("--clients", metavar="N,N", help="only measure these numbers of concurrent clients")
    add("--peers", action="store_true", help="only measure blocks beside llama.cpp (needs the extra `peers`)")
    add("--condition", choices=KINDS, help="only measure what words or pictures cost beside the same without")
    add("--json", action="store_true", help="print JSON instead of the table")
    add("--roofline", metavar="BOARD", help=f"only estimate the roofline floor on {', '.join(BOARDS)}")
    args = parser.parse_args()
    if args.roofline is not None:
        print_roofline(args.bundle, args.roofline, args.json)
        return
    if args.threads < 1:
        raise ConfigError("--threads must be at least 1")
    if not all(1 <= steps <= MAX_STEPS for steps in args.steps):
        raise ConfigError(f"--steps takes numbers from 1 to {MAX_STEPS}")
    if args.clients is not None:
        say(measure(args.bundle, args.backend, args.threads, parse_clients(args.clients)), args.json, print_clients)
        return
    if args.peers:
        packages()  # refuses before the bundle is loaded
    loaded = LoadedBundle.load(args.bundle, args.backend, args.threads)
    if args.peers:
        beside = measure_peers(loaded, str(args.bundle), args.threads)
        say(beside, args.json, print_peers)
        return
    if args.condition is not None:
        say(measure_condition(loaded, args.condition), args.json, print_condition)
        return
    row = half_masked(loaded)
    step_ms = median_step_ms(loaded, np.flatnonzero(row.fill))
    share = reduction_share(args.bundle, args.threads) if args.backend == "ort" else None
    report = Report(
        bundle=str(args.bundle),
        threads=args.threads,
        step_ms=step_ms,
        bare_step_ms=None if share is None else step_ms * (1 - share),
        reduction_ms=None if share is None else step_ms * share,
        default_step_ms=None if isinstance(loaded.backend, LoopBackend) else median_step_ms(loaded, wanted(row)),
        default_scored=wanted(row).size,
        generations=[generation(loaded, steps) for steps in args.steps],
        daemon=daemon_cost(loaded, args.bundle, args.backend, args.threads),
        blocks=measure_blocks(loaded),
        reference=host_reference(loaded, args.threads),
    )
    say(report, args.json, print_report)
