"""What others may read of the daemon without asking: state, info and metrics."""

import threading
import time
from typing import Final, Protocol

from edge.serving.scheduler import Scheduler
from edge.system.heartbeat import Heartbeat
from edge.transports.mqtt.topics import info
from shared.messages import Health, encode

LOOK_S: Final = 0.5
METRICS_S: Final = 60.0


class Tell(Protocol):
    """Publishes on a topic of the device."""

    def __call__(self, kind: str, payload: bytes, qos: int = 1, retain: bool = False) -> None: ...


class Status:
    """Looks at the scheduler twice a second and tells what changed; counters once a minute, and at the end."""

    def __init__(self, scheduler: Scheduler, queue_size: int, tell: Tell) -> None:
        self._scheduler = scheduler
        self._queue_size = queue_size
        self._tell = tell
        self._told: Health | None = None
        self._all = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)
        self.heartbeat = Heartbeat(self._thread)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def tell_all(self) -> None:
        """The broker is new: it may know nothing."""
        self._all = True

    def close(self) -> None:
        """Tell the last state and counters."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        metrics_s = float("-inf")
        connected = False
        while True:
            stopping = self._stop.wait(LOOK_S)
            if self._all:
                self._all, self._told, connected, metrics_s = False, None, True, float("-inf")
            if connected:
                with self.heartbeat:
                    self._tell_changes()
                    if stopping or time.monotonic() - metrics_s >= METRICS_S:
                        metrics_s = time.monotonic()
                        self._tell("metrics", encode(self._scheduler.metrics()), qos=0)
            if stopping:
                return

    def _tell_changes(self) -> None:
        health = self._scheduler.health()
        if self._told is None or health.model != self._told.model:
            manifest = self._scheduler.engine.manifest
            content = info(health, manifest.model.canvas_len, manifest.top_k, self._queue_size)
            self._tell("info", encode(content), retain=True)
        if health != self._told:
            self._tell("state", encode(health), retain=True)
        self._told = health
