"""Ten times what a daemon can do, over HTTP: `python -m tests.stress.overload_http --seconds N`.

Clients from several addresses send completions at ten times the measured capacity, without waiting for one another.
Each gets a text or a refusal with a code and advice; memory stays bounded; afterwards somebody new is served.
"""

import argparse
import http.client
import json
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Final

from edge.config import default_bundle
from shared.errors import run_main
from tests.integration.harness import Daemon
from tests.integration.http_client import address_of, complete
from tests.stress.soak import resources

TIMES: Final = 10
ADDRESSES: Final = 24
PER_ADDRESS: Final = 10
"""Clients of one address, each with one request at a time: a thread each, and a place for each connection."""
MOST_GROWTH_KB: Final = 32 * 1024
BODY: Final = json.dumps({"prompt": "Once upon a time", "decode": "canvas", "steps": 8}).encode()
HEADERS: Final = {"Content-Type": "application/json"}


class Counts:
    """What came back. Thread-safe."""

    def __init__(self) -> None:
        self.codes: Counter[str] = Counter()
        self.advice_ms: list[int] = []
        self._lock = threading.Lock()

    def note(self, status: int, body: bytes, advice: str | None) -> None:
        """Count one answer."""
        code = "ok" if status == 200 else str(json.loads(body)["error"]["code"])
        with self._lock:
            self.codes[code] += 1
            if advice is not None:
                self.advice_ms.append(int(advice))


def client(address: tuple[str, int], source: str, end_s: float, counts: Counts, every_s: float) -> None:
    """Ask so often until then, or as soon as the answer before it has come."""
    due_s = time.monotonic()
    connection = http.client.HTTPConnection(*address, timeout=120, source_address=(source, 0))
    while time.monotonic() < end_s:
        try:
            connection.request("POST", "/v1/completions", BODY, HEADERS)
            answer = connection.getresponse()
            counts.note(answer.status, answer.read(), answer.headers["retry-after-ms"])
        except (ConnectionError, http.client.HTTPException) as error:
            counts.note(0, json.dumps({"error": {"code": type(error).__name__}}).encode(), None)
            connection.close()
        due_s = max(due_s + every_s, time.monotonic() - every_s)
        time.sleep(max(0.0, due_s - time.monotonic()))
    connection.close()


def capacity(daemon: Daemon, seconds: float) -> float:
    """Texts a second with eight clients that wait for each other's turn."""
    counts = Counts()
    flood(address_of(daemon), seconds, counts, per_address=1, every_s=0.0)
    assert set(counts.codes) == {"ok"}, counts.codes
    return counts.codes["ok"] / seconds


def flood(
    address: tuple[str, int], seconds: float, counts: Counts, *, per_address: int, every_s: float
) -> list[threading.Thread]:
    """Clients of all addresses, through to their end."""
    end_s = time.monotonic() + seconds
    threads = [
        threading.Thread(target=client, args=(address, f"127.0.0.{2 + n % ADDRESSES}", end_s, counts, every_s))
        for n in range(ADDRESSES * per_address)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return threads


def main() -> int:
    """Run and report. Returns 1 when something was not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.overload_http", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--backend", default="fake:100")
    parser.add_argument("--bundle", type=Path, default=default_bundle())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="overload-") as name:
        daemon = Daemon(Path(name), args.bundle, "--backend", args.backend, "--http", "127.0.0.1:0")
        try:
            most = capacity(daemon, 10.0)
            before_kb = resources(daemon.process.pid).resident_kb
            counts = Counts()
            every_s = ADDRESSES * PER_ADDRESS / (TIMES * most)
            address = address_of(daemon)
            flooding = threading.Thread(
                target=lambda: flood(address, args.seconds, counts, per_address=PER_ADDRESS, every_s=every_s)
            )
            flooding.start()
            resident_kb = before_kb
            while flooding.is_alive():
                resident_kb = max(resident_kb, resources(daemon.process.pid).resident_kb)
                time.sleep(0.1)
            served = complete(daemon, prompt="a", decode="canvas", steps=2).status
            log = daemon.log.read_text()
        finally:
            daemon.close()
    offered = counts.codes.total() / args.seconds
    print(f"capacity {most:.1f} texts a second, offered {offered:.1f} requests a second: {offered / most:.1f} times")
    advice_ms = min(counts.advice_ms, default=0), max(counts.advice_ms, default=0)
    print(f"answers {dict(counts.codes)}; come again in {advice_ms[0]} to {advice_ms[1]} ms")
    print(f"resident {before_kb} kB before, {resident_kb} kB at most; afterwards {served}")
    faults = [
        (set(counts.codes) - {"ok", "queue_full"}, "answers other than texts and refusals"),
        (advice_ms[0] < 1, "a refusal without advice"),
        (resident_kb > before_kb + MOST_GROWTH_KB, "memory has grown"),
        (served != 200, "a newcomer is not served"),
        ("Traceback" in log or "ERROR" in log, "errors in the log"),
    ]
    said = [what for wrong, what in faults if wrong]
    print("; ".join(said) or "as it should be")
    return int(bool(said))


if __name__ == "__main__":
    run_main(main)
