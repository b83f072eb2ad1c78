"""Much work and nonsense for one daemon: `python -m tests.soak` and `python -m tests.soak --fuzz 1000000`."""

import argparse
import json
import random
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edge.config import default_bundle
from shared.errors import RequestError, run_main
from shared.messages import CancelRequest, decode_line
from tests.integration.harness import Daemon, Line
from tests.spoilt import spoilt

VALID: Final[tuple[dict[str, Any], ...]] = (
    {"prompt": "Once", "max_tokens": 1},
    {"id": "a", "prompt": "Once upon a time", "steps": 1, "seed": 7, "stream": True, "top_p": 0.9},
    {"id": "b", "segments": ["Tom had a ", {"gap": 4}, "."], "steps": 1, "temperature": 0.5, "selection": "margin"},
    {"prompt": "x", "max_tokens": 2, "threshold": 0.5, "deadline_ms": 60000},
    {"type": "health"},
    {"type": "cancel", "id": "a"},
)
WINDOW: Final = 20
"""Lines sent before their replies are read."""


@dataclass(frozen=True)
class Resources:
    """What a process holds."""

    resident_kb: int
    descriptors: int


def resources(daemon: Daemon) -> Resources:
    """What the daemon holds now."""
    process = Path(f"/proc/{daemon.process.pid}")
    resident = re.search(r"^VmRSS:\s+(\d+) kB$", (process / "status").read_text(), re.MULTILINE)
    assert resident is not None
    return Resources(int(resident[1]), len(list((process / "fd").iterdir())))


def soak(daemon: Daemon, settle: int, requests: int) -> tuple[Resources, Resources]:
    """Resources after `settle` requests and after `requests`, every tenth on a connection of its own."""
    for asked in range(requests):
        if asked % 10 == 0:
            line = Line(daemon.socket)
        request = {"prompt": "Once upon a time " * (asked % 7), "steps": 1 + asked % 3, "seed": asked, "max_tokens": 20}
        assert line.ask(request)["status"] == "ok"
        if asked % 10 == 9:
            line.close()
        if asked == settle - 1:
            before = resources(daemon)
    return before, resources(daemon)


def replies_to(line: bytes) -> int:
    """How many replies a line gets, snapshots aside: one, but for blank lines and cancels."""
    try:
        return int(not isinstance(decode_line(line), CancelRequest))
    except RequestError:
        return int(bool(line.strip()))


def fuzz(daemon: Daemon, inputs: int, seed: int) -> Counter[str]:
    """Send spoilt lines, and read a reply of a known kind to every one that gets one.  → how many of which"""
    luck = random.Random(seed)
    counts: Counter[str] = Counter()
    line = Line(daemon.socket)
    for _ in range(0, inputs, WINDOW):
        sent = [spoilt(json.dumps(luck.choice(VALID)).encode(), luck) for _ in range(WINDOW)]
        line.send(*sent)
        missing = sum(map(replies_to, sent))
        while missing:
            reply = line.read()
            assert reply is not None, f"hung up on one of {sent}"
            if reply["type"] == "response":
                counts[reply["error"]["code"] if reply["error"] else "ok"] += 1
            else:
                counts[reply["type"]] += 1
            missing -= reply["type"] != "partial"
    line.close()
    return counts


def main() -> int:
    """Run and report. Returns 1 when the daemon grew by 2 %."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--fuzz", type=int, metavar="N", help="send N spoilt lines instead")
    parser.add_argument("--backend", default="fake")
    parser.add_argument("--bundle", type=Path, default=default_bundle())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        daemon = Daemon(Path(folder), args.bundle, "--backend", args.backend)
        try:
            if args.fuzz is not None:
                print(fuzz(daemon, args.fuzz, args.seed))
                return int(daemon.process.poll() is not None or "Traceback" in daemon.log.read_text())
            before, after = soak(daemon, 100, args.requests)
        finally:
            daemon.close()
    growth = after.resident_kb / before.resident_kb - 1
    print(f"after 100 requests {before}, after {args.requests} {after}: {growth:+.2%}")
    return int(growth >= 0.02 or after.descriptors > before.descriptors)


if __name__ == "__main__":
    run_main(main)
