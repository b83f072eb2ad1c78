"""Everything goes wrong at once: `python -m tests.stress.chaos --minutes N`.

A stream of requests with ids, while the daemon is killed or restarted, the broker is killed and comes back with or
without its memory, the daemon's wall clock jumps, and clients vanish. Whoever gets no answer asks again, as a client
must over a broker that forgets, and now and then somebody asks again for what was answered long ago. In the end every
request has its terminal answer, no request two that differ, and the journal holds every request that it ever took in.
"""

import argparse
import random
import shutil
import signal
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from edge.config import default_bundle
from shared.errors import run_main
from tests.integration.harness import Broker, Daemon, Line
from tests.support.askers import Asker, Heard, Vanishers
from tests.support.wall_clock import COMPILER, WallClock

SETTLE_S: Final = 90.0
PERSISTENCE: Final = ("persistence true", "autosave_interval 1", "autosave_on_changes true")
HOUR_S: Final = 3600
JUMPS_S: Final = (-20 * 365 * 24 * HOUR_S, -72 * HOUR_S, -HOUR_S, HOUR_S, 72 * HOUR_S, 10 * 365 * 24 * HOUR_S)


@dataclass
class Report:
    """What was done to it, and what came of it.

    clock_jumps: None without a C compiler. repeated: answers that came again, the same to the byte. lost: requests
    without an answer. forgotten: requests that were in the journal at some kill and are no longer, or never got an
    answer there. duplicated: requests with answers that differ, whether a client heard them or the journal kept them.
    """

    requests: int
    answers: dict[str, int]
    sent_again: int
    daemon_kills: int
    daemon_restarts: int
    broker_kills: int
    broker_amnesias: int
    clock_jumps: int | None
    clock_span_days: float
    vanished_socket_clients: int
    vanished_mqtt_clients: int
    accepted: int
    repeated: int
    lost: int
    forgotten: int
    duplicated: int

    @property
    def broken(self) -> int:
        """Promises that were not kept."""
        return self.lost + self.forgotten + self.duplicated


@dataclass(frozen=True)
class Kept:
    """A request in the journal. accepted_s: what the daemon's clock showed."""

    id: str
    accepted_s: float
    answer: bytes | None


def read_journal(path: Path) -> dict[int, Kept]:
    """What a journal holds whose daemon is dead, by number. From a copy: opening it would change it."""
    with tempfile.TemporaryDirectory(prefix="journal-") as folder:
        for file in path.parent.glob(f"{path.name}*"):
            shutil.copy(file, folder)
        db = sqlite3.connect(Path(folder) / path.name)
        try:
            rows = db.execute("SELECT seq, id, accepted_s, answer FROM request").fetchall()
        finally:
            db.close()
    return {seq: Kept(*row) for seq, *row in rows}


class Chaos:
    """The daemon, its broker, and what happens to them."""

    def __init__(self, folder: Path, bundle: Path, backend: str, seed: int) -> None:
        self._folder, self._bundle, self._backend = folder, bundle, backend
        self._random = random.Random(seed)
        self._remembers = [*PERSISTENCE, f"persistence_location {folder}/"]
        self._broker = Broker(folder, *self._remembers).start()
        self._clock = None if COMPILER is None else WallClock(folder)
        self.port = self._broker.port
        self.counts: Counter[str] = Counter()
        self.rounds = 0
        self.kept: list[dict[int, Kept]] = []
        self._deck: list[Callable[[], None]] = []
        self._daemon = self._start()

    def strike(self) -> None:
        """One misfortune: of each kind one, in random order, and then again."""
        if not self._deck:
            self.rounds += 1
            once = (self._kill_daemon, self._restart_daemon, self._kill_broker, self._jump, self._vanish)
            self._deck = self._random.sample([*once, self._kill_daemon], len(once) + 1)
        self._deck.pop()()

    def close(self) -> None:
        """Stop both, and read the journal a last time."""
        self._daemon.close()
        self._read()
        self._broker.stop()
        if self._clock is not None:
            self._clock.close()

    def _start(self) -> Daemon:
        environment = {} if self._clock is None else self._clock.environment
        flags = ("--backend", self._backend, "--mqtt", f"127.0.0.1:{self.port}")
        return Daemon(self._folder, self._bundle, *flags, environment=environment, DEVICE="dev")

    def _read(self) -> None:
        self.kept.append(read_journal(self._folder / "journal.sqlite"))

    def _kill_daemon(self) -> None:
        self.counts["daemon kills"] += 1
        self._daemon.signal(signal.SIGKILL)
        self._daemon.exit_code()
        self._daemon.close()
        self._read()
        self._daemon = self._start()

    def _restart_daemon(self) -> None:
        self.counts["daemon restarts"] += 1
        self._daemon.close()
        self._daemon = self._start()

    def _kill_broker(self) -> None:
        self.counts["broker kills"] += 1
        self._broker.stop()
        if self._random.random() < 0.5:  # it comes back without its memory
            self.counts["broker amnesias"] += 1
            (self._folder / "mosquitto.db").unlink(missing_ok=True)
        time.sleep(self._random.random())
        self._broker.start()

    def _jump(self) -> None:
        if self._clock is not None:
            self.counts["clock jumps"] += 1
            self._clock.set(self._random.choice(JUMPS_S))

    def _vanish(self) -> None:
        self.counts["vanished"] += 1
        line = Line(self._daemon.socket)
        line.send({"prompt": "Once", "stream": True}, b'{"prompt": "half a li')
        line.close()


def run(seconds: float, backend: str, bundle: Path, seed: int, say: Callable[[str], None]) -> Report:
    """Ask and strike for a while, until every kind of misfortune was there, then let it settle."""
    luck = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        chaos, heard = Chaos(Path(name), bundle, backend, seed), Heard()
        asker, vanishers = Asker(chaos.port, heard), Vanishers(chaos.port, heard, seed)
        try:
            end_s = time.monotonic() + seconds
            next_strike_s = time.monotonic() + 1
            while time.monotonic() < end_s or chaos.rounds < 2:
                request = {"prompt": "Once upon a time " * luck.randrange(1, 4), "steps": luck.randrange(1, 30)}
                asker.ask(f"r{len(asker.asked)}", request)
                if luck.random() < 0.2:
                    asker.repeat(luck)
                if luck.random() < 0.1 and vanishers.open < Vanishers.MOST:
                    vanishers.send(f"v{len(vanishers.names)}", request)
                time.sleep(luck.random() * 0.3)
                asker.ask_again()
                if time.monotonic() > next_strike_s:
                    chaos.strike()
                    say(f"{len(asker.asked)} asked, {asker.open} open, struck {dict(chaos.counts)}")
                    next_strike_s = time.monotonic() + luck.random() * 4
            settle_s = time.monotonic() + SETTLE_S
            while (asker.open or vanishers.open) and time.monotonic() < settle_s:
                asker.ask_again()
                time.sleep(0.1)
        finally:
            vanishers.close()
            asker.close()
            chaos.close()
    return _report(chaos, heard, asker, vanishers)


def _report(chaos: Chaos, heard: Heard, asker: Asker, vanishers: Vanishers) -> Report:
    final = chaos.kept[-1]
    answers = {id: set(payloads) for id, payloads in heard.answers.items()}
    for kept in chaos.kept:
        for entry in kept.values():
            if entry.answer is not None:
                answers.setdefault(entry.id, set()).add(entry.answer)
    forgotten = {seq for kept in chaos.kept for seq in kept if seq not in final or final[seq].answer is None}
    times_s = [entry.accepted_s for entry in final.values()]
    counts = chaos.counts
    return Report(
        requests=len(asker.asked) + len(vanishers.names),
        answers=dict(heard.codes()),
        sent_again=asker.sent_again,
        daemon_kills=counts["daemon kills"],
        daemon_restarts=counts["daemon restarts"],
        broker_kills=counts["broker kills"],
        broker_amnesias=counts["broker amnesias"],
        clock_jumps=None if COMPILER is None else counts["clock jumps"],
        clock_span_days=round((max(times_s) - min(times_s)) / 24 / HOUR_S, 2),
        vanished_socket_clients=counts["vanished"],
        vanished_mqtt_clients=vanishers.killed,
        accepted=len(final),
        repeated=heard.repeated,
        lost=asker.open + vanishers.open,
        forgotten=len(forgotten),
        duplicated=sum(len(payloads) > 1 for payloads in answers.values()),
    )


def main() -> int:
    """Run and report. Returns 1 when a request was lost, forgotten or answered twice."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--backend", default="fake:10")
    parser.add_argument("--bundle", type=Path, default=default_bundle())
    parser.add_argument("--seed", type=int, default=0, help="of what happens when")
    args = parser.parse_args()
    report = run(args.minutes * 60, args.backend, args.bundle, args.seed, lambda line: print(line, flush=True))
    for name, value in asdict(report).items():
        print(f"{name:24} {value}")
    return int(report.broken > 0)


if __name__ == "__main__":
    run_main(main)
