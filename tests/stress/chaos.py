"""Everything goes wrong at once: `python -m tests.stress.chaos --minutes N`.

A stream of requests with ids, while the daemon is killed or restarted, the broker is killed and comes back with or
without its memory, or refuses the daemon's answers, the daemon's wall clock jumps, clients vanish, flood it at QoS 0,
send more correlation data than it takes, or hold every place of its socket, and a second daemon takes its name. The
journal is small, so that it is full now and then. Whoever gets no answer asks again, as a client must over a broker
that forgets, and now and then somebody asks again for what was answered before. In the end every request has its
terminal answer, no request two that differ, and the journal still holds what it took in, as long as it promised to.
"""

import argparse
import random
import re
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from edge.config import default_bundle
from edge.transports.unix_socket import MAX_CONNECTIONS
from shared.errors import run_main
from tests.integration.harness import Broker, Daemon, Line, Listener
from tests.stress.chaos_report import Journal, Report, forgotten, hurried, read_journal, verdict_of
from tests.support.askers import BASE, Asker, Heard, Vanishers
from tests.support.flood import flood
from tests.support.wall_clock import COMPILER, WallClock

CANVAS: Final = 0.25
"""Share of the requests that are decoded by canvas; the others by the default decoder."""
SETTLE_S: Final = 120.0
"""How long to wait for answers in the end, from the last one that came."""


@dataclass(frozen=True)
class Bounds:
    """Of the daemon's journal: small, so that a run crosses them. keep_s: instead of a day."""

    max_bytes: int = 1 << 20
    keep_s: float = 60.0

    @property
    def repeat_s(self) -> float:
        """How long after an answer somebody may ask again: within keep_s, whatever happens in between."""
        return self.keep_s / 3


PERSISTENCE: Final = ("persistence true", "autosave_interval 1")
"""The broker saves all that it holds every second or two. At every change it would be the bottleneck: 2 MB, 40 times a
second, is all it gets done once a few thousand messages wait.
"""
OPEN: Final = "topic readwrite #\n"
DEAF: Final = f"topic read #\ntopic write {BASE}/request/#\ntopic write {BASE}/state\ntopic write {BASE}/availability\n"
"""The broker's rules while it refuses answers."""
HOUR_S: Final = 3600
JUMPS_S: Final = (-20 * 365 * 24 * HOUR_S, -72 * HOUR_S, -HOUR_S, HOUR_S, 72 * HOUR_S, 10 * 365 * 24 * HOUR_S)


class Chaos:
    """The daemon, its broker, and what happens to them.

    journals: of the daemon, at each of its ends. doubles: of each daemon that had its name for a while. double: the one
    that has it now.
    """

    def __init__(self, folder: Path, bundle: Path, backend: str, *, seed: int, bounds: Bounds) -> None:
        self._folder, self._bundle, self._backend, self._bounds = folder, bundle, backend, bounds
        self._random = random.Random(seed)
        self._rules = folder / "rules"
        self._rules.write_text(OPEN)
        settings = [*PERSISTENCE, f"persistence_location {folder}/", f"acl_file {self._rules}", "max_queued_messages 0"]
        self._broker = Broker(folder, *settings).start()
        self._clock = None if COMPILER is None else WallClock(folder)
        self.port = self._broker.port
        self.counts: Counter[str] = Counter()
        self.rounds = 0
        self.journals: list[Journal] = []
        self.doubles: list[list[Journal]] = []
        self.memory_peak_mb = 0.0
        self.locked_out = 0
        self.pauses = 0
        self.double: Daemon | None = None
        self._until_s: dict[str, float] = {}  # when a misfortune that lasts ends
        self._deck: list[Callable[[], None]] = []
        self._daemon = self._start()

    def strike(self) -> None:
        """One misfortune: of each kind one, in random order, and then again."""
        if not self._deck:
            self.rounds += 1
            once = [self._kill_daemon, self._restart_daemon, self._kill_broker, self._jump, self._vanish]
            once += [self._kill_daemon, self._flood, self._correlate, self._crowd, self._refuse, self._double]
            self._deck = self._random.sample(once, len(once))
        misfortune = self._deck.pop()
        self.counts[misfortune.__name__.strip("_").replace("_", " ")] += 1
        misfortune()

    def pass_on(self) -> None:
        """End what lasted long enough."""
        self._measure()
        now = time.monotonic()
        if now > self._until_s.get("refuse", now):
            self._allow()
        if now > self._until_s.get("double", now):
            self._part()
        if self.journals and now > self.journals[-1].read_s + self._bounds.keep_s / 2:
            self._restart_daemon()  # what it holds is read while it still holds it

    def calm(self) -> None:
        """No more misfortune."""
        self._allow()
        self._part()
        self._restart_daemon()

    def close(self) -> None:
        """Stop both, and read the journal a last time."""
        self._part()
        self._stop()
        self.pauses = (self._folder / "log").read_text().count("another client also logs in")
        self._broker.stop()
        if self._clock is not None:
            self._clock.close()

    def _start(self) -> Daemon:
        environment = {} if self._clock is None else self._clock.environment
        program = ("-m", "tests.support.small_journal", str(self._bounds.max_bytes), str(self._bounds.keep_s))
        flags = ("--backend", self._backend, "--mqtt", f"127.0.0.1:{self.port}")
        settings = {"DEVICE": "dev", "DRAIN_S": "5"}
        return Daemon(self._folder, self._bundle, *flags, program=program, environment=environment, **settings)

    def _stop(self) -> None:
        self._measure()
        self._daemon.close()
        self.journals.append(read_journal(self._folder / "journal.sqlite"))

    def _measure(self) -> None:
        status = Path(f"/proc/{self._daemon.process.pid}/status")
        peak = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text() if status.exists() else "", re.MULTILINE)
        if peak is not None:  # else it is dead
            self.memory_peak_mb = max(self.memory_peak_mb, round(int(peak[1]) * 1024 / 1e6, 1))

    def _kill_daemon(self) -> None:
        self._daemon.signal(signal.SIGKILL)
        self._daemon.exit_code()
        self._stop()
        self._daemon = self._start()

    def _restart_daemon(self) -> None:
        self._stop()
        self._daemon = self._start()

    def _kill_broker(self) -> None:
        self._broker.stop()
        if self._random.random() < 0.5:  # it comes back without its memory
            self.counts["broker amnesia"] += 1
            (self._folder / "mosquitto.db").unlink(missing_ok=True)
        time.sleep(self._random.random())
        self._broker.start()

    def _jump(self) -> None:
        if self._clock is not None:
            self._clock.set(self._random.choice(JUMPS_S))

    def _vanish(self) -> None:
        line = Line(self._daemon.socket)
        line.send({"prompt": "Once", "stream": True}, b'{"prompt": "half a li')
        line.close()

    def _flood(self) -> None:
        kinds = [("request/generate", b'{"prompt": ' + b"x" * 909), ("request/health", b""), ("request/cancel", b"{")]
        kinds.append(("request/generate/flood", b'{"prompt": "Once", "max_tokens": 1}'))
        topic, payload = self._random.choice(kinds)
        threading.Thread(target=self._send_flood, args=(f"{BASE}/{topic}", payload), daemon=True).start()

    def _send_flood(self, topic: str, payload: bytes) -> None:
        with suppress(OSError):  # the broker is killed meanwhile
            flood(self.port, topic, payload, 2000, 3.0)

    def _correlate(self) -> None:
        sender = Listener(self.port, "nothing")
        for _ in range(20):
            sender.publish(f"{BASE}/request/generate", {"prompt": "x"}, CorrelationData=b"x" * 60_000)
        sender.close()

    def _crowd(self) -> None:
        crowd = [Line(self._daemon.socket) for _ in range(MAX_CONNECTIONS + 8)]
        newcomer = self._daemon.line()
        reply = newcomer.ask({"type": "health"})
        self.locked_out += reply["type"] != "health"
        for line in crowd:
            line.close()

    def _refuse(self) -> None:
        self._rules.write_text(DEAF)
        self._broker.reload()
        self._until_s["refuse"] = time.monotonic() + 4

    def _allow(self) -> None:
        if self._until_s.pop("refuse", None) is not None:
            self._rules.write_text(OPEN)
            self._broker.reload()

    def _double(self) -> None:
        self._part()
        folder = self._folder / f"double{self.counts['double']}"
        folder.mkdir()
        flags = ("--backend", self._backend, "--mqtt", f"127.0.0.1:{self.port}")
        self.double = Daemon(folder, self._bundle, *flags, DEVICE="dev", DRAIN_S="5")
        self._until_s["double"] = time.monotonic() + 3

    def _part(self) -> None:
        self._until_s.pop("double", None)
        if self.double is not None:
            self.double.close()
            self.doubles.append([read_journal(self.double.socket.parent / "journal.sqlite")])
            self.double = None


def run(
    seconds: float, backend: str, bundle: Path, *, seed: int, say: Callable[[str], None], bounds: Bounds = Bounds()
) -> Report:
    """Ask and strike for a while, until every kind of misfortune was there, then let it settle."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        heard, chaos = Heard(), Chaos(Path(name), bundle, backend, seed=seed, bounds=bounds)
        asker, vanishers = Asker(chaos.port, heard, seed), Vanishers(chaos.port, heard, seed)
        try:
            end_s = time.monotonic() + seconds
            next_strike_s = time.monotonic() + 1
            while time.monotonic() < end_s or chaos.rounds < 2:
                request: dict[str, object] = {"prompt": "Once upon a time " * rng.randrange(1, 4)}
                request |= (
                    {"steps": rng.randrange(1, 30)} if rng.random() < CANVAS else {"max_tokens": rng.randrange(1, 90)}
                )
                if len(asker.open) < Asker.MOST:
                    asker.ask(f"r{len(asker.asked)}", request)
                if rng.random() < 0.2:
                    asker.repeat(bounds.repeat_s)
                if rng.random() < 0.1 and len(vanishers.open) < Vanishers.MOST:
                    vanishers.send(f"v{len(vanishers.names)}", request)
                time.sleep(rng.random() * 0.3)
                asker.ask_again()
                chaos.pass_on()
                if time.monotonic() > next_strike_s:
                    chaos.strike()
                    say(f"{len(asker.asked)} asked, {len(asker.open)} open, struck {dict(chaos.counts)}")
                    next_strike_s = time.monotonic() + rng.random() * 4
            chaos.calm()
            progress_s, answered = time.monotonic(), 0
            while (asker.open or vanishers.open) and time.monotonic() < progress_s + SETTLE_S:
                asker.ask_again()
                time.sleep(0.1)
                if len(heard.answers) > answered:
                    progress_s, answered = time.monotonic(), len(heard.answers)
        finally:
            vanishers.close()
            asker.close()
            chaos.close()
    return _report(chaos, heard, asker, vanishers, keep_s=bounds.keep_s)


def _report(chaos: Chaos, heard: Heard, asker: Asker, vanishers: Vanishers, *, keep_s: float) -> Report:
    verdict = verdict_of(heard.answers, [chaos.journals, *chaos.doubles], keep_s)
    times_s = [kept.accepted_s for journal in chaos.journals for kept in journal.kept.values()]
    return Report(
        requests=len(asker.asked) + len(vanishers.names),
        answers=dict(heard.codes()),
        sent_again=asker.sent_again,
        misfortunes=dict(chaos.counts),
        memory_peak_mb=chaos.memory_peak_mb,
        clock_span_days=round((max(times_s) - min(times_s)) / 24 / HOUR_S, 2),
        vanished_mqtt_clients=vanishers.killed,
        accepted=len({seq for journal in chaos.journals for seq in journal.kept}),
        refused_full=heard.refused_full,
        pauses=chaos.pauses,
        repeated=heard.repeated,
        doubled=len(verdict.doubled),
        renewed=len(verdict.renewed),
        locked_out=chaos.locked_out,
        lost=len(asker.open) + len(vanishers.open),
        forgotten=forgotten(chaos.journals, keep_s),
        twice=sorted(verdict.twice),
        unstored=sorted(verdict.unstored),
        hurried=hurried(chaos.journals),
    )


def main() -> int:
    """Run and report. Returns 1 when a request was lost, forgotten or answered twice, or a client locked out."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--backend", default="fake:10")
    parser.add_argument("--bundle", type=Path, default=default_bundle())
    parser.add_argument("--seed", type=int, default=0, help="of what happens when")
    args = parser.parse_args()
    report = run(args.minutes * 60, args.backend, args.bundle, seed=args.seed, say=lambda line: print(line, flush=True))
    for name, value in asdict(report).items():
        print(f"{name:24} {value}")
    return int(report.broken > 0)


if __name__ == "__main__":
    run_main(main)
