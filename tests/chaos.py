"""Everything goes wrong at once: `python -m tests.chaos --minutes N`.

A stream of requests with ids, while the daemon is killed, the broker is killed and comes back with or without its
memory, and clients vanish. Whoever gets no answer asks again, as a client must over a broker that forgets. In the end
every request has its terminal answer, and no request two that differ.
"""

import argparse
import json
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edge.config import default_bundle
from shared.errors import run_main
from tests.integration.harness import Broker, Daemon, Line

BASE: Final = "edgelm/dev"
ASK_AGAIN_S: Final = 5.0
SETTLE_S: Final = 90.0
NOT_TERMINAL: Final = {"queue_full", "draining", "storage_full"}
"""Refusals: nothing was accepted, so the client may ask again."""
PERSISTENCE: Final = ("persistence true", "autosave_interval 1", "autosave_on_changes true")


@dataclass
class Report:
    """What was done to it, and what came of it. repeated: answers that came again, the same to the byte."""

    requests: int
    answers: dict[str, int]
    sent_again: int
    daemon_kills: int
    broker_kills: int
    vanished_clients: int
    repeated: int
    lost: int
    duplicated: int


class Asker:
    """An MQTT client that asks until it is answered."""

    def __init__(self, port: int) -> None:
        self.asked: dict[str, tuple[bytes, float]] = {}  # id → payload, when it was sent last
        self.answers: dict[str, set[bytes]] = {}
        self.repeated = self.sent_again = 0
        self._lock = threading.Lock()
        self.client = Client(CallbackAPIVersion.VERSION2, "asker", protocol=MQTTProtocolVersion.MQTTv5)
        self.client.on_connect = lambda client, *_: client.subscribe(f"{BASE}/response/#", qos=1)
        self.client.on_message = self._on_message
        self.client.reconnect_delay_set(1, 1)
        self.client.connect_async("127.0.0.1", port, clean_start=False)
        self.client.loop_start()

    def ask(self, id: str, request: dict[str, Any]) -> None:
        payload = json.dumps(request | {"id": id}).encode()
        with self._lock:
            self.asked[id] = (payload, time.monotonic())
        self.client.publish(f"{BASE}/request/generate", payload, qos=1)

    def ask_again(self) -> None:
        """Whatever was not answered for a while."""
        now = time.monotonic()
        with self._lock:
            late = [
                id for id, (_, sent_s) in self.asked.items() if id not in self.answers and now - sent_s > ASK_AGAIN_S
            ]
            for id in late:
                self.asked[id] = (self.asked[id][0], now)
        for id in late:
            self.sent_again += 1
            self.client.publish(f"{BASE}/request/generate", self.asked[id][0], qos=1)

    @property
    def open(self) -> int:
        """Requests without an answer."""
        with self._lock:
            return len(self.asked.keys() - self.answers.keys())

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        answer = json.loads(message.payload)
        if answer["status"] == "error" and answer["error"]["code"] in NOT_TERMINAL:
            return
        with self._lock:
            known = self.answers.setdefault(answer["id"], set())
            self.repeated += bool(known)
            known.add(bytes(message.payload))


class Chaos:
    """The daemon, its broker, and what happens to them."""

    def __init__(self, folder: Path, bundle: Path, backend: str, seed: int) -> None:
        self._folder, self._bundle, self._backend = folder, bundle, backend
        self._random = random.Random(seed)
        self._remembers = [*PERSISTENCE, f"persistence_location {folder}/"]
        self._broker = Broker(folder, *self._remembers).start()
        self.port = self._broker.port
        self._daemon = self._start()
        self.counts: Counter[str] = Counter()

    def strike(self) -> None:
        """One misfortune."""
        self._random.choice([self._kill_daemon, self._kill_daemon, self._kill_broker, self._vanish])()

    def close(self) -> None:
        self._daemon.close()
        self._broker.stop()

    def _start(self) -> Daemon:
        broker = f"127.0.0.1:{self.port}"
        return Daemon(self._folder, self._bundle, "--backend", self._backend, "--mqtt", broker, DEVICE="dev")

    def _kill_daemon(self) -> None:
        self.counts["daemon"] += 1
        self._daemon.signal(signal.SIGKILL)
        self._daemon.exit_code()
        self._daemon.close()
        self._daemon = self._start()

    def _kill_broker(self) -> None:
        self.counts["broker"] += 1
        self._broker.stop()
        if self._random.random() < 0.5:  # it comes back without its memory
            (self._folder / "mosquitto.db").unlink(missing_ok=True)
        time.sleep(self._random.random())
        self._broker.start()

    def _vanish(self) -> None:
        self.counts["vanished"] += 1
        line = Line(self._daemon.socket)
        line.send({"prompt": "Once", "stream": True}, b'{"prompt": "half a li')
        line.close()


def run(seconds: float, backend: str, bundle: Path, seed: int, say: Callable[[str], None]) -> Report:
    """Ask and strike for a while, then let it settle."""
    luck = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        chaos = Chaos(Path(name), bundle, backend, seed)
        asker = Asker(chaos.port)
        try:
            end_s = time.monotonic() + seconds
            next_strike_s = time.monotonic() + 1
            while time.monotonic() < end_s:
                prompt = "Once upon a time " * luck.randrange(1, 4)
                asker.ask(f"r{len(asker.asked)}", {"prompt": prompt, "steps": luck.randrange(1, 30)})
                time.sleep(luck.random() * 0.3)
                asker.ask_again()
                if time.monotonic() > next_strike_s:
                    chaos.strike()
                    say(f"{len(asker.asked)} asked, {asker.open} open, struck {dict(chaos.counts)}")
                    next_strike_s = time.monotonic() + luck.random() * 4
            settle_s = time.monotonic() + SETTLE_S
            while asker.open and time.monotonic() < settle_s:
                asker.ask_again()
                time.sleep(0.1)
        finally:
            asker.close()
            chaos.close()
    finals = [json.loads(next(iter(payloads))) for payloads in asker.answers.values()]
    return Report(
        requests=len(asker.asked),
        answers=dict(Counter(a["error"]["code"] if a.get("error") else a["status"] for a in finals)),
        sent_again=asker.sent_again,
        daemon_kills=chaos.counts["daemon"],
        broker_kills=chaos.counts["broker"],
        vanished_clients=chaos.counts["vanished"],
        repeated=asker.repeated,
        lost=asker.open,
        duplicated=sum(len(payloads) > 1 for payloads in asker.answers.values()),
    )


def main() -> int:
    """Run and report. Returns 1 when a request was lost or answered twice."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--backend", default="fake:10")
    parser.add_argument("--bundle", type=Path, default=default_bundle())
    parser.add_argument("--seed", type=int, default=0, help="of what happens when")
    args = parser.parse_args()
    report = run(args.minutes * 60, args.backend, args.bundle, args.seed, lambda line: print(line, flush=True))
    for name, value in asdict(report).items():
        print(f"{name:18} {value}")
    return int(bool(report.lost or report.duplicated))


if __name__ == "__main__":
    run_main(main)
