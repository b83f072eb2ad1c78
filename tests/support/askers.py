"""Clients over MQTT that ask until they are answered: one that stays, and many that are killed and come back."""

import json
import random
import subprocess
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from paho.mqtt.client import Client, MQTTMessage, MQTTMessageInfo
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

BASE: Final = "edgelm/dev"
ASK_AGAIN_S: Final = 5.0
NOT_TERMINAL: Final = {"queue_full", "draining", "storage_full"}
"""Refusals: nothing was accepted, so the client may ask again."""


class Heard:
    """What clients were told: id → the answers to it that differ in a byte → when each came first. Thread-safe.

    refused_full: refusals for want of room in the journal.
    """

    def __init__(self) -> None:
        self.answers: dict[str, dict[bytes, float]] = {}
        self.repeated = 0
        self.refused_full = 0
        self._lock = threading.Lock()

    def note(self, payload: bytes) -> bool:
        """Keep an answer, unless it is a refusal.  → whether it is one to keep"""
        answer = json.loads(payload)
        if answer["type"] != "response" or answer["id"] is None:
            return False  # to a flood: an exception here would end the listening thread
        if answer["status"] == "error" and answer["error"]["code"] in NOT_TERMINAL:
            self.refused_full += answer["error"]["code"] == "storage_full"
            return False
        with self._lock:
            known = self.answers.setdefault(answer["id"], {})
            self.repeated += payload in known
            known.setdefault(payload, time.monotonic())
        return True

    def first_s(self, id: str) -> float | None:
        """When that id was answered first."""
        with self._lock:
            return min(self.answers.get(id, {}).values(), default=None)

    def codes(self) -> Counter[str]:
        """How many requests ended how."""
        with self._lock:
            finals = [json.loads(next(iter(payloads))) for payloads in self.answers.values()]
        return Counter(answer["error"]["code"] if answer["error"] else answer["status"] for answer in finals)


class Asker:
    """Clients of one connection, which stays, and which now and then ask for what they know already. base: of topics.

    They ask for nothing new while MOST are without an answer, and for nothing again before the broker has acknowledged
    that they asked: clients that do not wait for a busy broker end its service without any misfortune.
    """

    MOST: Final = 100
    CLIENTS: Final = ("", "/anna", "/ben", "/cleo")
    """Topics that a request is sent below: the plain one, and three clients' own."""
    MAX_CORRELATION_BYTES: Final = 1024

    def __init__(self, port: int, heard: Heard, seed: int, base: str = BASE) -> None:
        self.asked: dict[str, bytes] = {}  # id → payload
        self.sent_again = 0
        self._sent: dict[str, tuple[float, MQTTMessageInfo]] = {}  # id → when last, and whether that is acknowledged
        self._heard = heard
        self._base = base
        self._random = random.Random(seed)
        self._client = Client(CallbackAPIVersion.VERSION2, "asker", protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_connect = lambda client, *_: client.subscribe(f"{base}/response/#", qos=1)
        self._client.on_message = self._on_message
        self._client.reconnect_delay_set(1, 1)
        self._client.connect_async("127.0.0.1", port, clean_start=False)
        self._client.loop_start()

    def ask(self, id: str, request: dict[str, Any]) -> None:
        """Ask for the first time."""
        self._send(id, json.dumps(request | {"id": id}).encode())

    def ask_again(self) -> None:
        """Whatever was not answered for a while."""
        now = time.monotonic()
        for id in self.open:
            sent_s, info = self._sent[id]
            refused = info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS  # there was no connection: it goes out with the next
            if now - sent_s > ASK_AGAIN_S and (refused or info.is_published()):
                self.sent_again += 1
                self._send(id, self.asked[id])

    def repeat(self, within_s: float) -> None:
        """Something that is open, or was answered no longer ago."""
        since_s = time.monotonic() - within_s
        young = [id for id in self.asked if (self._heard.first_s(id) or since_s) >= since_s]
        if young:
            id = self._random.choice(young)
            self._send(id, self.asked[id])

    @property
    def open(self) -> set[str]:
        """Requests without an answer."""
        return self.asked.keys() - self._heard.answers.keys()

    def close(self) -> None:
        """Part from the broker."""
        self._client.disconnect()
        self._client.loop_stop()

    def _send(self, id: str, payload: bytes) -> None:
        self.asked[id] = payload
        carried = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        if self._random.random() < 0.3:
            carried.CorrelationData = self._random.randbytes(self._random.randrange(self.MAX_CORRELATION_BYTES))
        client = self.CLIENTS[zlib.crc32(id.encode()) % len(self.CLIENTS)]
        info = self._client.publish(f"{self._base}/request/generate{client}", payload, qos=1, properties=carried)
        self._sent[id] = (time.monotonic(), info)

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        self._heard.note(bytes(message.payload))


class Vanishers:
    """Clients, each a mosquitto_rr, that are killed while they wait, and come back under their names until answered.

    Half of them have a session that their broker keeps. Once answered, each asks a last time for the same.
    """

    MOST: Final = 4

    def __init__(self, port: int, heard: Heard, seed: int) -> None:
        self.names: set[str] = set()
        self.killed = 0
        self._port = port
        self._heard = heard
        self._luck = random.Random(seed)
        self._ended = threading.Event()
        self._pool = ThreadPoolExecutor(self.MOST)

    def send(self, name: str, request: dict[str, Any]) -> None:
        """One more, soon."""
        self.names.add(name)
        keeps = ["-c", "-x", "3600"] if self._luck.random() < 0.5 else []
        self._pool.submit(self._live, name, json.dumps(request | {"id": name}), keeps, self._luck.random())

    @property
    def open(self) -> set[str]:
        """Requests without an answer."""
        return self.names - self._heard.answers.keys()

    def close(self) -> None:
        """No longer ask."""
        self._ended.set()
        self._pool.shutdown(cancel_futures=True)

    def _live(self, name: str, payload: str, keeps: list[str], leaves_after_s: float) -> None:
        with self._ask(name, payload, keeps) as process:
            self._ended.wait(leaves_after_s)
            process.kill()  # without a DISCONNECT
            self._note(process)
        self.killed += 1
        answered = 0
        while answered < 2 and not self._ended.is_set():
            with self._ask(name, payload, keeps) as process:
                answered += self._note(process)
            self._ended.wait(0.1)

    def _ask(self, name: str, payload: str, keeps: list[str]) -> "subprocess.Popen[bytes]":
        topics = ["-t", f"{BASE}/request/generate", "-e", f"edgelm/reply/{name}"]
        command = ["mosquitto_rr", "-V", "5", "-h", "127.0.0.1", "-p", str(self._port), "-i", name, *keeps, *topics]
        return subprocess.Popen(
            [*command, "-q", "1", "-W", str(round(ASK_AGAIN_S)), "-m", payload],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def _note(self, process: "subprocess.Popen[bytes]") -> bool:
        """Whether the answer came; it prints it before it ends, or nothing."""
        said = process.communicate()[0].strip()
        return said.endswith(b"}") and self._heard.note(said)
