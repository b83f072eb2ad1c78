"""Ten times what a daemon can do: `python -m tests.stress.overload --minutes N`.

Clients of the socket and of MQTT ask without waiting for answers, at QoS 1 and, much faster, at QoS 0. Each request has
to be answered, most with a refusal that says when to try again; of those at QoS 0, each that is not has to be counted.
Memory has to stay bounded; and afterwards somebody new has to be served as soon as everything accepted could be.
"""

import argparse
import json
import queue
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from paho.mqtt.client import MQTTMessage

from edge.config import Config, default_bundle
from shared.errors import run_main
from tests.integration.harness import TIMEOUT_S, Broker, Daemon, Line, Listener
from tests.stress.soak import resources
from tests.support.flood import flood

TIMES: Final = 10
SOCKETS: Final = 8
"""Connections to the socket; one more client asks over MQTT, as often as one of them."""
ACCEPTED: Final = Config().queue_size + 1
"""Requests that a daemon takes in at most."""
MOST_GROWTH_KB: Final = 16 * 1024
REQUEST: Final = {"prompt": "Once upon a time", "max_tokens": 40}
TOPIC: Final = "edgelm/dev/request/generate"
FLOOD_RATE: Final = 2000
"""Requests a second at QoS 0."""
STILL_S: Final = 300.0
"""So long without a count that rises, of those published each minute, and a daemon has come to a halt."""
QUIET_S: Final = 5.0
"""Longer than from the last text to its delivery."""


@dataclass(frozen=True)
class Report:
    """What came of it. Rates are requests a second.

    retry_after_ms: the least and the most that refusals advised. recovery_s: from the last request of the flood to the
    answer of a client that came then. drain_s: everything a daemon accepts at its capacity, and one request alone.
    """

    capacity: float
    offered: int
    offered_rate: float
    answers: dict[str, int]
    qos_0_sent: int
    qos_0_answered: int
    qos_0_dropped: int
    retry_after_ms: tuple[int, int]
    resident_before_kb: int
    resident_most_kb: int
    recovery_s: float
    drain_s: float

    @property
    def fault(self) -> str | None:
        """What was not as it should be, timing aside."""
        if set(self.answers) != {"ok", "queue_full"}:
            return f"answers other than texts and refusals: {self.answers}"
        if sum(self.answers.values()) != self.offered:
            return f"{self.offered} requests got {sum(self.answers.values())} answers"
        if self.qos_0_answered + self.qos_0_dropped != self.qos_0_sent:
            return f"{self.qos_0_sent} requests at QoS 0, of which {self.qos_0_dropped} were counted as dropped"
        if self.retry_after_ms[0] < 1:
            return "a refusal without advice"
        if self.resident_most_kb > self.resident_before_kb + MOST_GROWTH_KB:
            return f"{self.resident_most_kb} kB resident, from {self.resident_before_kb}"
        return None


class Patience:
    """Waits as long as a daemon gets on with its work, however slow the machine. Thread-safe.

    Behind a flood an answer may stay away for minutes: the broker hands on in order, and all that came at QoS 0 has to
    be read. So it goes by the daemon's counters, not by the clock.
    """

    def __init__(self, broker: Broker) -> None:
        self._metrics = Listener(broker.port, "edgelm/dev/metrics")
        self._counted, self._moved_s = -1, time.monotonic()
        self._lock = threading.Lock()

    def next(self, heard: "queue.Queue[MQTTMessage]") -> MQTTMessage:
        """The next message. Raises queue.Empty when the daemon has come to a halt."""
        asked_s = time.monotonic()
        while True:
            try:
                return heard.get(timeout=1.0)
            except queue.Empty:
                if time.monotonic() > max(asked_s, self._look()) + STILL_S:
                    raise

    def _look(self) -> float:
        """When a count has last risen."""
        with self._lock:
            while not self._metrics.heard.empty():
                metrics = json.loads(self._metrics.heard.get().payload)
                if (counted := metrics["dropped"] + sum(metrics["answered"].values())) > self._counted:
                    self._counted, self._moved_s = counted, time.monotonic()
            return self._moved_s

    def close(self) -> None:
        """Listen no more."""
        self._metrics.close()


class Answers:
    """What came back. Thread-safe."""

    def __init__(self) -> None:
        self.codes: Counter[str] = Counter()
        self.advice_ms: list[int] = []
        self._lock = threading.Lock()

    def note(self, answer: dict[str, Any]) -> None:
        """Count one."""
        with self._lock:
            self.codes[answer["error"]["code"] if answer["error"] else "ok"] += 1
            if answer["error"]:
                self.advice_ms.append(answer["error"].get("retry_after_ms", 0))


def patient_line(daemon: Daemon) -> Line:
    """A connection to the socket that waits as long."""
    line = Line(daemon.socket)
    line.sock.settimeout(STILL_S)
    return line


def paced(seconds: float, rate: float, send: Callable[[int], None]) -> int:
    """Call `send` so many times a second, and make up for what was late.  → how often"""
    began_s = time.monotonic()
    sent = 0
    while (passed_s := time.monotonic() - began_s) < seconds:
        while sent < passed_s * rate:
            send(sent)
            sent += 1
        time.sleep(0.005)
    return sent


def flood_socket(daemon: Daemon, seconds: float, rate: float, answers: Answers) -> int:
    """One connection's part, until all is answered.  → requests sent"""
    line = patient_line(daemon)

    def read() -> None:
        while (reply := line.read()) is not None:
            answers.note(reply)

    reader = threading.Thread(target=read)
    reader.start()
    sent = paced(seconds, rate, lambda number: line.send(REQUEST))
    line.sock.shutdown(socket.SHUT_WR)  # the daemon hangs up after its last answer
    reader.join()
    line.close()
    return sent


def flood_mqtt(broker: Broker, patience: Patience, *, seconds: float, rate: float, answers: Answers) -> int:
    """One client's part, until all is answered.  → requests sent"""
    listener = Listener(broker.port, "edgelm/dev/response/#")

    def send(number: int) -> None:
        listener.client.publish(TOPIC, json.dumps(REQUEST | {"id": str(number)}), qos=1)

    sent = paced(seconds, rate, send)
    with suppress(queue.Empty):  # one that stays away is missing in the report
        for _ in range(sent):
            answers.note(json.loads(patience.next(listener.heard).payload))
    listener.close()
    return sent


def flood_qos_0(broker: Broker, daemon: Daemon, patience: Patience, seconds: float) -> tuple[int, int]:
    """One client's part, at QoS 0.  → requests sent, and how many of them were answered"""
    listener = Listener(broker.port, "edgelm/dev/response/flood/#")
    sent = flood(broker.port, f"{TOPIC}/flood", json.dumps(REQUEST).encode(), FLOOD_RATE, seconds)
    answered = 0
    listener.publish(f"{TOPIC}/flood", {"id": "last", "prompt": 1})  # comes after all of them, and is refused
    while patience.next(listener.heard).topic != "edgelm/dev/response/flood/last":
        answered += 1
    line = patient_line(daemon)
    while line.ask({"type": "health"})["state"] != "idle":  # what was accepted is answered later
        time.sleep(0.1)
    line.close()
    with suppress(queue.Empty):
        while listener.heard.get(timeout=QUIET_S):
            answered += 1
    listener.close()
    return sent, answered


def capacity(daemon: Daemon, requests: int) -> float:
    """Requests a second with always enough to do, but never too much."""

    def client(_: int) -> None:
        line = patient_line(daemon)
        for _ in range(requests // SOCKETS // 3):
            line.send(*[REQUEST] * 3)
            assert all((line.read() or {})["status"] == "ok" for _ in range(3))
        line.close()

    began_s = time.monotonic()
    with ThreadPoolExecutor(SOCKETS) as pool:
        list(pool.map(client, range(SOCKETS)))
    return requests // SOCKETS // 3 * 3 * SOCKETS / (time.monotonic() - began_s)


def newcomer(daemon: Daemon) -> float:
    """Seconds until a client that comes now has its answer, trying again when it is told to."""
    began_s = time.monotonic()
    line = patient_line(daemon)
    while (answer := line.ask(REQUEST))["status"] != "ok":
        time.sleep(answer["error"]["retry_after_ms"] / 1e3)
    line.close()
    return time.monotonic() - began_s


def last_metrics(broker: Broker, daemon: Daemon) -> dict[str, Any]:
    """The counters that a daemon publishes as it ends."""
    listener = Listener(broker.port, "edgelm/dev/#")
    daemon.close()
    metrics: dict[str, Any] = {}
    while (message := listener.heard.get(timeout=TIMEOUT_S)).payload != b"offline":
        if message.topic.endswith("/metrics"):
            metrics = json.loads(message.payload)
    listener.close()
    return metrics


def run(seconds: float, backend: str, bundle: Path) -> Report:
    """Find out what it can do, and ask for ten times as much."""
    answers = Answers()
    with tempfile.TemporaryDirectory(prefix="overload-") as name:
        broker = Broker(Path(name), "persistence false", "max_queued_messages 0").start()
        daemon = Daemon(Path(name), bundle, "--backend", backend, "--mqtt", broker.address, DEVICE="dev")
        try:
            broker.tool("mosquitto_sub", "-t", "edgelm/dev/availability", "-C", "1", "-W", "20")
            most = capacity(daemon, requests=240)
            alone_s = newcomer(daemon)
            before = resources(daemon.process.pid).resident_kb
            rate = TIMES * most / (SOCKETS + 1)
            resident: list[int] = []
            patience = Patience(broker)
            with ThreadPoolExecutor(SOCKETS + 2) as pool:
                unreliable = pool.submit(flood_qos_0, broker, daemon, patience, seconds)
                floods = [pool.submit(flood_socket, daemon, seconds, rate, answers) for _ in range(SOCKETS)]
                floods.append(pool.submit(flood_mqtt, broker, patience, seconds=seconds, rate=rate, answers=answers))
                end_s = time.monotonic() + seconds
                while time.monotonic() < end_s:
                    resident.append(resources(daemon.process.pid).resident_kb)
                    time.sleep(0.1)
                recovery_s = newcomer(daemon)
                offered = sum(flood.result() for flood in floods)
                qos_0_sent, qos_0_answered = unreliable.result()
            patience.close()
            resident.append(resources(daemon.process.pid).resident_kb)
            dropped = last_metrics(broker, daemon)["dropped"]
        finally:
            daemon.close()
            broker.stop()
    return Report(
        capacity=round(most, 1),
        offered=offered,
        offered_rate=round(offered / seconds, 1),
        answers=dict(answers.codes),
        qos_0_sent=qos_0_sent,
        qos_0_answered=qos_0_answered,
        qos_0_dropped=dropped,
        retry_after_ms=(min(answers.advice_ms, default=0), max(answers.advice_ms, default=0)),
        resident_before_kb=before,
        resident_most_kb=max(resident),
        recovery_s=round(recovery_s, 2),
        drain_s=round(ACCEPTED / most + alone_s, 2),
    )


def main() -> int:
    """Run and report. Returns 1 when something was not as it should be, or recovery took too long."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.overload", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--backend", default="fake:20")
    parser.add_argument("--bundle", type=Path, default=default_bundle())
    args = parser.parse_args()
    report = run(args.minutes * 60, args.backend, args.bundle)
    for name, value in asdict(report).items():
        print(f"{name:20} {value}")
    fault = report.fault or ("it recovered too slowly" if report.recovery_s > report.drain_s else None)
    print(fault or "as it should be")
    return int(fault is not None)


if __name__ == "__main__":
    run_main(main)
