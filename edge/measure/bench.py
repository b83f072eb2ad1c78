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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar, get_args

import msgspec
from msgspec import Struct

from edge.backends.trt.profiles import BATCHES
from edge.config import default_bundle
from edge.measure.blocks import Blocks, measure_blocks, print_blocks
from edge.measure.canvas import Canvas, measure_canvas, print_canvas
from edge.measure.clients import measure, print_clients, serving
from edge.measure.conditions import KINDS, measure_condition, print_condition
from edge.measure.peers import measure_peers, packages, print_peers
from edge.measure.roofline import BOARDS, floor, pass_floors, print_passes
from edge.serving.loaded_bundle import LoadedBundle
from shared.errors import ConfigError, command_name
from shared.manifest import MAX_STEPS, Decoder, find_graph, read_manifest
from shared.messages import GenerateRequest, Response, encode

T = TypeVar("T")
STEP_COUNTS: Final = (8, 16, 32, 64, 128)
DAEMON_STEPS: Final = 16
DAEMON_TOKENS: Final = 64
SPIN_S: Final = 0.1
"""ONNX Runtime's threads spin for a while after a step, on cores that another process needs."""
REPEATS: Final = 3
MAX_CLIENTS: Final = 24
"""Below the daemon's default queue size."""
EPILOG: Final = """examples:
  python -m edge.bench --bundle bundles/mine --json
  python -m edge.bench --clients 1,2,4,8 --decode blocks
  python -m edge.bench --peers
  python -m edge.bench --condition words
  python -m edge.bench --roofline orin-nano-15w"""


class DaemonCost(Struct):
    """A daemon process. overhead_ms: its latency less the time of the bare loop, median of pairs."""

    start_s: float  # from the process's start to its first answer
    overhead_ms: float
    peak_mb: float


class Report(Struct):
    """All measurements."""

    bundle: str
    threads: int
    daemon: DaemonCost
    canvas: Canvas | None  # of the decoders that the bundle, or the device, has
    blocks: Blocks | None
    reference: dict[str, float] | None  # from `host.bench step`; None where the host is not installed


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
            steps = DAEMON_STEPS if loaded.decoders[0] == "canvas" else None
            request = GenerateRequest(prompt="Once upon a time", seed=seed, steps=steps, max_tokens=DAEMON_TOKENS)
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
    if r.reference is not None:
        print(f"{'matmul peak, float32':36} {r.reference['fp32_gflops']:8.0f} GFLOP/s")
        print(f"{'matmul peak, INT8':36} {r.reference['int8_gflops']:8.0f} GOP/s")
    print(f"{'daemon, start to first answer':36} {r.daemon.start_s:8.2f} s")
    print(f"{'daemon, peak memory':36} {r.daemon.peak_mb:8.0f} MB")
    print(f"{'daemon, overhead per request':36} {r.daemon.overhead_ms:8.2f} ms")
    if r.canvas is not None:
        print_canvas(r.canvas, r.reference)
    if r.blocks is not None:
        print_blocks(r.blocks)


def parse_clients(text: str) -> list[int]:
    """`1,2,4` as numbers. Raises ConfigError."""
    if not re.fullmatch(r"[1-9]\d?(,[1-9]\d?)*", text, re.ASCII) or any(int(n) > MAX_CLIENTS for n in text.split(",")):
        raise ConfigError(f"--clients takes numbers from 1 to {MAX_CLIENTS} with commas between, as in 1,2,4,8,16")
    return [int(n) for n in text.split(",")]


def print_roofline(bundle: Path, board: str, as_json: bool) -> None:
    """The roofline floor of a step of each CUDA graph for each batch size, and of passes by blocks."""
    manifest = read_manifest(bundle)
    graphs = [(g.precision, (bundle / g.file).stat().st_size) for g in manifest.graphs if g.target == "cuda"]
    floors = [floor(board, manifest.model, precision=p, graph_bytes=n, batch=b) for p, n in graphs for b in BATCHES]
    passes = pass_floors(board, manifest) if manifest.blocks is not None else []
    if not floors and not passes:
        find_graph(bundle, manifest, "cuda")  # raises
    if as_json:
        steps = [msgspec.structs.asdict(f) | {"floor_ms": f.floor_ms} for f in floors]
        rows = [msgspec.structs.asdict(p) | {"floor_ms": p.floor_ms} for p in passes]
        print(msgspec.json.encode({"steps": steps, "passes": rows}).decode())
        return
    print(f"{board}: an ESTIMATE from published peaks, not a measurement")
    if floors:
        print(f"a step of {manifest.model.canvas_len} positions")
        units = f"{'GFLOP':>8} {'MB':>8} {'compute, ms':>12} {'memory, ms':>11} {'floor, ms':>10}"
        print(f"{'graph':6} {'batch':>5} {units}")
    for f in floors:
        shape = f"{f.precision:6} {f.batch:5} {f.gflop:8.2f} {f.mbytes:8.1f}"
        print(f"{shape} {f.compute_ms:12.3f} {f.memory_ms:11.3f} {f.floor_ms:10.3f}")
    if passes:
        print_passes(passes)


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
    add("--decode", choices=get_args(Decoder), help="with --clients: the decoder (default: the bundle's own)")
    add("--peers", action="store_true", help="only measure blocks beside llama.cpp (needs the extra `peers`)")
    add("--condition", choices=KINDS, help="only measure the cost of words or of pictures")
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
        numbers = parse_clients(args.clients)
        crowd = measure(args.bundle, backend=args.backend, threads=args.threads, clients=numbers, decode=args.decode)
        say(crowd, args.json, print_clients)
        return
    if args.peers:
        packages()  # refuses before the bundle is loaded
    loaded = LoadedBundle.load(args.bundle, args.backend, args.threads)
    if args.peers:
        reference = host_reference(loaded, args.threads)
        beside = measure_peers(loaded, str(args.bundle), args.threads, reference)
        say(beside, args.json, print_peers)
        return
    if args.condition is not None:
        say(measure_condition(loaded, args.condition), args.json, print_condition)
        return
    report = Report(
        bundle=str(args.bundle),
        threads=args.threads,
        daemon=daemon_cost(loaded, args.bundle, args.backend, args.threads),
        canvas=measure_canvas(loaded, args.bundle, args.threads, args.steps),
        blocks=measure_blocks(loaded),
        reference=host_reference(loaded, args.threads),
    )
    say(report, args.json, print_report)
