"""Concurrent clients: `python -m edge.bench --clients 1,2,4,8,16`. One daemon process, one connection per client.

Every number of clients shares the same requests, so that ratios compare equal work. A client sends its next request as
soon as it has an answer.
"""

import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from edge.client import ask
from shared.errors import ConfigError
from shared.manifest import Decoder, read_manifest
from shared.messages import GenerateRequest, HealthRequest, Response, encode

PROMPT: Final = "Once upon a time"
STEPS: Final = 16
REQUESTS: Final = 32
SHORT_REQUESTS: Final = 5
HEALTH_EVERY_S: Final = 0.01
SETTLE_S: Final = 0.2
"""Until all clients have requests in progress."""
ROOM: Final = 16
"""Positions of a short canvas for the prompt, BOS and EOS."""


class Load(Struct):
    """One number of clients at one canvas length. p50_ms, p99_ms: latency of a request."""

    clients: int
    length: int
    tokens_per_s: float
    p50_ms: float
    p99_ms: float


class Crowd(Struct):
    """Latencies beside `active` requests of full length. short_ms: median of a short request. fair_ms: its fair share,
    its latency alone times `active` + 1; the step that is running when it arrives may add to it.
    """

    active: int
    short_ms: float
    fair_ms: float
    health_p50_ms: float
    health_p99_ms: float


class ClientsReport(Struct):
    """All measurements. peak_mb: the daemon's peak resident memory, in 10^6 bytes."""

    bundle: str
    threads: int
    decode: Decoder
    loads: list[Load]
    crowds: list[Crowd]
    peak_mb: float


@dataclass(frozen=True)
class Served:
    """A running daemon that serves a bundle."""

    path: Path
    process: "subprocess.Popen[bytes]"

    def connect(self) -> socket.socket:
        """A connection. Raises ConfigError when the daemon ended or does not listen."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self.process.poll() is None:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self.path))
                return connection
            except OSError:
                connection.close()
                time.sleep(0.02)
        self.process.kill()
        raise ConfigError(f"the daemon did not start: {(self.process.communicate()[1] or b'').decode().strip()}")

    def peak_mb(self) -> float:
        """Its peak resident memory, in 10^6 bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


@contextmanager
def serving(bundle: Path, backend: str, threads: int) -> Iterator[Served]:
    """A daemon process on a socket of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.sock"
        flags = ["--bundle", str(bundle), "--backend", backend, "--socket", str(path)]
        process = subprocess.Popen(
            [sys.executable, "-m", "edge", *flags],
            env=os.environ | {"EDGELM_THREADS": str(threads), "EDGELM_MQTT_HOST": ""},
            stdout=subprocess.DEVNULL,  # its "ready" line is not part of our JSON
            stderr=subprocess.PIPE,
        )
        try:
            yield Served(path, process)
        finally:
            process.terminate()
            process.communicate()


def measure(
    bundle: Path, *, backend: str, threads: int, clients: Sequence[int], decode: Decoder | None = None
) -> ClientsReport:
    """Measure every number of clients at a quarter of the canvas and at its full length.

    decode: None is the bundle's default. Raises ConfigError for one that the bundle has not.
    """
    manifest = read_manifest(bundle)
    decode = decode or manifest.decoders[0]
    if decode not in manifest.decoders:
        raise ConfigError(f"--decode {decode}: {bundle} decodes by {' and '.join(manifest.decoders)} alone")
    longest = manifest.model.canvas_len
    long = GenerateRequest(prompt=PROMPT, decode=decode, steps=STEPS if decode == "canvas" else None)
    short = replace(long, max_tokens=longest // 4 - ROOM)
    with serving(bundle, backend, threads) as daemon:
        load(daemon, 1, longest, long)  # warm-up
        loads = [
            load(daemon, n, length, request)
            for length, request in ((longest // 4, short), (longest, long))
            for n in clients
        ]
        lone_ms = crowd(daemon, 0, short=short, long=long, lone_ms=0.0).short_ms
        crowds = [crowd(daemon, n, short=short, long=long, lone_ms=lone_ms) for n in clients]
        return ClientsReport(str(bundle), threads, decode, loads, crowds, daemon.peak_mb())


def load(daemon: Served, clients: int, length: int, request: GenerateRequest) -> Load:
    """Latency and throughput of the requests, shared among that many clients."""
    seeds = itertools.count()
    latencies_ms: list[float] = []
    tokens: list[int] = []

    def client() -> None:
        with daemon.connect() as connection:
            while (seed := next(seeds)) < REQUESTS:
                milliseconds, generated = timed(connection, replace(request, seed=seed))
                latencies_ms.append(milliseconds)
                tokens.append(generated)

    started = time.perf_counter()
    with threads_of([client] * clients):
        pass
    seconds = time.perf_counter() - started
    if len(tokens) < REQUESTS:
        raise ConfigError(f"only {len(tokens)} of {REQUESTS} requests were answered")
    p50_ms, p99_ms = percentiles(latencies_ms)
    return Load(clients, length, sum(tokens) / seconds, p50_ms, p99_ms)


def crowd(daemon: Served, active: int, *, short: GenerateRequest, long: GenerateRequest, lone_ms: float) -> Crowd:
    """Short requests, one after another, and health requests, beside `active` clients with long ones."""
    over = threading.Event()
    health_ms: list[float] = []

    def busy() -> None:
        with daemon.connect() as connection:
            while not over.is_set():
                timed(connection, long)

    def watch_health() -> None:
        with daemon.connect() as connection, connection.makefile("rb") as answers:
            while not over.wait(HEALTH_EVERY_S):
                started = time.perf_counter()
                connection.sendall(encode(HealthRequest()) + b"\n")
                answers.readline()
                health_ms.append((time.perf_counter() - started) * 1e3)

    with threads_of([watch_health, *[busy] * active]), daemon.connect() as connection:
        try:
            time.sleep(SETTLE_S)
            times = [timed(connection, replace(short, seed=seed))[0] for seed in range(SHORT_REQUESTS)]
        finally:
            over.set()
    return Crowd(active, statistics.median(times), (active + 1) * lone_ms, *percentiles(health_ms))


def timed(connection: socket.socket, request: GenerateRequest) -> tuple[float, int]:
    """Send one request.  → milliseconds, generated tokens"""
    started = time.perf_counter()
    (response,) = ask(connection, request)
    milliseconds = (time.perf_counter() - started) * 1e3
    assert isinstance(response, Response) and response.usage is not None, response
    return milliseconds, response.usage.generated_tokens


@contextmanager
def threads_of(targets: Sequence[Callable[[], None]]) -> Iterator[None]:
    """Run threads beside the block, and join them at its end."""
    threads = [threading.Thread(target=target) for target in targets]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """p50, p99"""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]


def print_clients(report: ClientsReport) -> None:
    """The table. of first: throughput relative to the first row of the same length."""
    how = f"{STEPS} steps" if report.decode == "canvas" else "blocks"
    print(f"{report.bundle}, {report.threads} threads, {how}, {REQUESTS} requests a row")
    print(f"{'length':>6} {'clients':>8} {'tokens/s':>9} {'of first':>9} {'p50, ms':>9} {'p99, ms':>9}")
    first: dict[int, float] = {}
    for row in report.loads:
        share = row.tokens_per_s / first.setdefault(row.length, row.tokens_per_s)
        print(
            f"{row.length:6} {row.clients:8} {row.tokens_per_s:9.0f} {share:9.2f} {row.p50_ms:9.1f} {row.p99_ms:9.1f}"
        )
    print(f"{'active':>6} {'short, ms':>14} {'fair, ms':>9} {'health p50, ms':>15} {'p99, ms':>9}")
    for c in report.crowds:
        print(f"{c.active:6} {c.short_ms:14.1f} {c.fair_ms:9.1f} {c.health_p50_ms:15.2f} {c.health_p99_ms:9.2f}")
    print(f"daemon, peak memory: {report.peak_mb:.0f} MB")
