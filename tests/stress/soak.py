"""Much work for one daemon, and what it holds on to: `python -m tests.stress.soak`."""

import argparse
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge.config import default_bundle
from shared.errors import run_main
from tests.integration.harness import Broker, Daemon, Line, Listener

SETTLE: Final = 300
"""Requests after which most is there that will be: SQLite's page cache and the heap fill over the first few hundred, by
0.2 MB between the 100th and the 300th, then by 0.4 MB up to the 1,000th, less and less.
"""
LIMIT: Final = 0.02
"""By how much memory may have grown since."""


@dataclass(frozen=True)
class Resources:
    """What a process holds."""

    resident_kb: int
    descriptors: int


def resources(pid: int) -> Resources:
    """What a process holds now."""
    process = Path(f"/proc/{pid}")
    resident = re.search(r"^VmRSS:\s+(\d+) kB$", (process / "status").read_text(), re.MULTILINE)
    assert resident is not None
    return Resources(int(resident[1]), len(list((process / "fd").iterdir())))


def soak(daemon: Daemon, listener: Listener, requests: int, say: Callable[[str], None]) -> tuple[Resources, Resources]:
    """Resources after SETTLE requests and after `requests`. Every fifth comes over MQTT, where it is kept in the
    journal; on the socket, ten or so share a connection.
    """
    line = Line(daemon.socket)
    for asked in range(requests):
        request: dict[str, object] = {"prompt": "Once upon a time " * (asked % 7), "max_tokens": 20}
        request |= {"stream": asked % 3 == 0} | ({"steps": 1 + asked % 3} if asked % 4 == 3 else {})  # then by canvas
        if asked % 5 == 4:
            listener.publish("edgelm/dev/request/generate", request | {"id": str(asked)})
            answer = json.loads(listener.next(f"edgelm/dev/response/{asked}").payload)
        else:
            if asked % 10 == 0:
                line.close()
                line = Line(daemon.socket)
            answer = line.ask(request)
            while answer["type"] == "partial":
                answer = line.read() or {}
        assert answer["status"] == "ok"
        if asked == SETTLE - 1:
            before = resources(daemon.process.pid)
        if asked % 1000 == 999:
            say(f"{asked + 1:6} requests: {resources(daemon.process.pid)}")
    line.close()
    return before, resources(daemon.process.pid)


def run(requests: int, backend: str, bundle: Path, say: Callable[[str], None]) -> tuple[Resources, Resources]:
    """Soak a daemon of its own, beside a broker of its own."""
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        broker = Broker(Path(name), "persistence false").start()
        flags = ("--backend", backend, "--mqtt", broker.address)
        daemon = Daemon(Path(name), bundle, *flags, DEVICE="dev")
        listener = Listener(broker.port, "edgelm/dev/response/#")
        try:
            broker.tool("mosquitto_sub", "-t", "edgelm/dev/availability", "-C", "1", "-W", "20")
            return soak(daemon, listener, requests, say)
        finally:
            listener.close()
            daemon.close()
            broker.stop()


def grown(before: Resources, after: Resources) -> str | None:
    """What grew too much, in words; None when nothing did. The last connection but one may be about to be closed."""
    if after.descriptors > before.descriptors + 1:
        return f"{after.descriptors} file descriptors after {before.descriptors}"
    if after.resident_kb >= before.resident_kb * (1 + LIMIT):
        return f"{after.resident_kb} kB after {before.resident_kb}"
    return None


def main() -> int:
    """Run and report. Returns 1 when the daemon grew."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--backend", default="fake")
    parser.add_argument("--bundle", type=Path, default=default_bundle())
    args = parser.parse_args()
    before, after = run(args.requests, args.backend, args.bundle, lambda line: print(line, flush=True))
    growth = after.resident_kb / before.resident_kb - 1
    print(f"after {SETTLE} requests {before}, after {args.requests} {after}: {growth:+.2%}")
    return int(grown(before, after) is not None)


if __name__ == "__main__":
    run_main(main)
