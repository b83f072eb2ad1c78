"""A pool of devices that are killed at random: `python -m tests.stress.pool --requests 2000`.

Devices on one broker take the requests of a pool, all with ids, from clients that ask again when nothing comes for a
while, and now and then for what they have asked before, so that the broker hands one id to several devices. One, two or
all devices at a time are killed with -9 and come back with their journals. In the end every request has its answer,
none has two that differ, and of each id one journal alone holds an answer.
"""

import argparse
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import msgspec

from edge.config import default_bundle
from shared.errors import run_main
from shared.messages import Response
from tests.integration.harness import Broker, Daemon
from tests.stress.chaos_report import read_journal
from tests.support.askers import Asker, Heard

POOL: Final = "kitchen"
SETTLE_S: Final = 120.0
"""How long to wait for answers in the end, from the last one that came."""
AWAY_S: Final = 1.5
"""How long killed devices stay away, at most."""


@dataclass
class Report:
    """What came of it.

    sent_again, repeated: requests because nothing had come, answers that came once more, the same to the byte. killed:
    daemons. answered: by device. passes: of the network, by device, for the answers that it gave. lost: requests
    without an answer. twice: ids with two answers that differ. stored_twice: ids that two journals hold an answer to.
    """

    requests: int
    answers: dict[str, int]
    sent_again: int
    repeated: int
    killed: int
    answered: dict[str, int]
    passes: dict[str, int]
    lost: int
    twice: list[str]
    stored_twice: list[str]

    @property
    def speedup(self) -> float:
        """Passes of all devices over those of the busiest: how much faster than one device, if each has its machine."""
        return round(sum(self.passes.values()) / max(self.passes.values()), 2)

    @property
    def broken(self) -> int:
        """Promises that were not kept."""
        return self.lost + len(self.twice) + len(self.stored_twice)


class Devices:
    """Of one pool, on one broker."""

    def __init__(self, folder: Path, bundle: Path, *, backend: str, count: int, port: int, seed: int) -> None:
        self.folders = {f"dev{i}": folder / f"dev{i}" for i in range(count)}
        self.killed = 0
        self._bundle, self._flags = bundle, ("--backend", backend, "--mqtt", f"127.0.0.1:{port}")
        self._random = random.Random(seed)
        for made in self.folders.values():
            made.mkdir()
        self._running = {name: self._start(name) for name in self.folders}
        self._back_s: dict[str, float] = {}

    def strike(self) -> None:
        """Kill one, or more."""
        most = self._random.choice((1, 1, 1, 2, len(self.folders)))
        for name in self._random.sample(sorted(self._running), min(most, len(self._running))):
            daemon = self._running.pop(name)
            daemon.signal(signal.SIGKILL)
            daemon.exit_code()
            daemon.close()
            self.killed += 1
            self._back_s[name] = time.monotonic() + self._random.random() * AWAY_S

    def bring_back(self, everyone: bool = False) -> None:
        """Start those that were away long enough."""
        for name in self._random.sample(sorted(self._back_s), len(self._back_s)):
            if everyone or time.monotonic() > self._back_s[name]:
                del self._back_s[name]
                self._running[name] = self._start(name)

    def close(self) -> None:
        """Stop them all."""
        for daemon in self._running.values():
            daemon.close()

    def _start(self, name: str) -> Daemon:
        return Daemon(self.folders[name], self._bundle, *self._flags, DEVICE=name, DRAIN_S="5", MQTT_POOL=POOL)


def run(
    requests: int, bundle: Path, *, backend: str, devices: int, seed: int, strikes: int, say: Callable[[str], None]
) -> Report:
    """Ask until all is answered, and kill so many times meanwhile, each time at a random number of answers."""
    rng = random.Random(seed)
    due = sorted(rng.sample(range(requests), strikes))
    most = min(Asker.MOST, max(10, requests // 10))
    with tempfile.TemporaryDirectory(prefix="pool-") as name:
        broker = Broker(Path(name), "max_queued_messages 0").start()
        heard = Heard()
        pool = Devices(Path(name), bundle, backend=backend, count=devices, port=broker.port, seed=seed)
        asker = Asker(broker.port, heard, seed, f"edgelm/pool/{POOL}")
        try:
            progress_s, answered = time.monotonic(), 0
            while (len(asker.asked) < requests or asker.open) and time.monotonic() < progress_s + SETTLE_S:
                if len(asker.asked) < requests and len(asker.open) < most:
                    request = {"prompt": "Once upon a time " * rng.randrange(1, 4), "max_tokens": rng.randrange(1, 30)}
                    asker.ask(f"r{len(asker.asked)}", request)
                    if strikes and rng.random() < 0.1:
                        asker.repeat(60.0)
                else:
                    time.sleep(0.01)
                asker.ask_again()
                pool.bring_back(everyone=not due)
                if due and len(heard.answers) >= due[0]:
                    due.pop(0)
                    pool.strike()
                    say(f"{len(asker.asked)} asked, {len(asker.open)} open, {pool.killed} killed")
                if len(heard.answers) > answered:
                    progress_s, answered = time.monotonic(), len(heard.answers)
            time.sleep(1.0)  # for a second answer, if there should be one
        finally:
            asker.close()
            pool.close()
            broker.stop()
        return _report(asker, heard, pool)


def _report(asker: Asker, heard: Heard, pool: Devices) -> Report:
    holders: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    passes: Counter[str] = Counter()
    for device, folder in pool.folders.items():
        for kept in read_journal(folder / "journal.sqlite").kept.values():
            if kept.id is not None and kept.answer is not None:
                usage = msgspec.json.decode(kept.answer, type=Response).usage
                holders[kept.id] += 1
                answered[device] += 1
                passes[device] += 0 if usage is None else usage.steps
    return Report(
        requests=len(asker.asked),
        answers=dict(heard.codes()),
        sent_again=asker.sent_again,
        repeated=heard.repeated,
        killed=pool.killed,
        answered=dict(answered),
        passes=dict(passes),
        lost=len(asker.open),
        twice=sorted(id for id, answers in heard.answers.items() if len(answers) > 1),
        stored_twice=sorted(id for id, count in holders.items() if count > 1),
    )


def main() -> int:
    """Run and report. Returns 1 when a request was lost or answered twice."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.pool", description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--devices", type=int, default=3)
    parser.add_argument(
        "--strikes", type=int, help="how often to kill, 0 to compare passes (default: 1 in 40 requests)"
    )
    parser.add_argument("--backend", default="fake:5")
    parser.add_argument("--bundle", type=Path, default=default_bundle())
    parser.add_argument("--seed", type=int, default=0, help="of what happens when")
    args = parser.parse_args()
    report = run(
        args.requests,
        args.bundle,
        backend=args.backend,
        devices=args.devices,
        seed=args.seed,
        strikes=args.requests // 40 if args.strikes is None else args.strikes,
        say=lambda line: print(line, flush=True),
    )
    for name, value in asdict(report).items():
        print(f"{name:14} {value}")
    print(f"{'speedup':14} {report.speedup}")
    return int(report.broken > 0)


if __name__ == "__main__":
    run_main(main)
