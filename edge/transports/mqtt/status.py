"""Publishes what clients may read without a request: state, info and metrics."""

import threading
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import msgspec

from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.scheduler import Scheduler
from edge.system.heartbeat import Heartbeat
from shared.messages import CancelRequest, GenerateRequest, Health, Info, encode

LOOK_S: Final = 0.5
METRICS_S: Final = 60.0


class Publish(Protocol):
    """Publishes on a topic of the device."""

    def __call__(self, kind: str, payload: bytes, qos: int = 1, retain: bool = False) -> None: ...


class Status:
    """Checks the scheduler twice a second and publishes changes; counters once a minute, and at the end.

    announce: called before everything is published.
    """

    def __init__(
        self, scheduler: Scheduler, queue_size: int, *, publish: Publish, announce: Callable[[], None]
    ) -> None:
        self._announce = announce
        self._scheduler = scheduler
        self._queue_size = queue_size
        self._publish = publish
        self._published: Health | None = None
        self._all = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)
        self.heartbeat = Heartbeat(self._thread)

    def start(self) -> None:
        """Begin to publish."""
        self._thread.start()

    def publish_all(self) -> None:
        """Publish everything again, for a broker that may have lost it."""
        self._all = True

    def close(self) -> None:
        """Publish the last state and counters."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        metrics_s = float("-inf")
        connected = False
        while True:
            stopping = self._stop.wait(LOOK_S)
            if self._all:
                self._all, self._published, connected, metrics_s = False, None, True, float("-inf")
                with self.heartbeat:
                    self._announce()
            if connected:
                with self.heartbeat:
                    self._publish_changes()
                    if stopping or time.monotonic() - metrics_s >= METRICS_S:
                        metrics_s = time.monotonic()
                        self._publish("metrics", encode(self._scheduler.metrics()), qos=0, retain=True)
            if stopping:
                return

    def _publish_changes(self) -> None:
        health = self._scheduler.health()
        known = self._published
        if known is None or (health.model, health.backend) != (known.model, known.backend):
            content = info(health, self._scheduler.loaded, self._queue_size)
            self._publish("info", encode(content), retain=True)
        if health != self._published:
            self._publish("state", encode(health), retain=True)
        self._published = health


def info(health: Health, loaded: LoadedBundle, queue_size: int) -> Info:
    """What a client may want to know before its first request, with the JSON schemas of requests."""
    schemas = {"generate": GenerateRequest, "cancel": CancelRequest}
    return Info(
        version=health.version,
        model=health.model,
        backend=health.backend,
        deterministic=loaded.deterministic,
        decoders=list(loaded.decoders),
        limits=loaded.limits(queue_size),
        schemas={name: _schema(kind) for name, kind in schemas.items()},
    )


def _schema(kind: Any) -> dict[str, Any]:
    text = msgspec.json.encode(msgspec.json.schema(kind))
    schema: dict[str, Any] = msgspec.json.decode(
        text.replace(rb"\\Z", b"$")
    )  # Python's end of text, in the schema's dialect
    return schema
