"""The devices of the broker for occasional readers: listens while somebody asks, and a few seconds longer."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import msgspec

from edge.config import MqttConfig
from edge.transports.mqtt.fleet_watch import RETRY_S, FleetWatch
from shared.errors import DiffusionLLMError, RequestError

log = logging.getLogger(__name__)

LOOK_S: Final = 10.0
"""How long the broker is listened to after somebody asked."""
FRESH_S: Final = 1.0
"""Within this time readers get the same answer."""
CLOSE_S: Final = 2.0

Reader = Callable[[bytes | RequestError], None]
"""Takes a `FleetView` as JSON, or why there is none, in a thread of ours."""


class FleetOnDemand:
    """Answers readers. Its thread starts with the first of them; it connects only while there are some."""

    def __init__(self, config: MqttConfig) -> None:
        self._config = config
        self._readers: queue.SimpleQueue[Reader | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def ask(self, reader: Reader) -> None:
        """Call `reader` once the broker has sent what it keeps. For one thread alone. Raises RequestError."""
        if self._closed:
            raise RequestError("draining", "the daemon is stopping")
        self._readers.put(reader)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Refuse the readers that wait, and disconnect; bounded in time."""
        self._closed = True
        self._readers.put(None)
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        while not self._readers.empty():
            if (reader := self._readers.get()) is not None:
                reader(RequestError("draining", "the daemon is stopping"))

    def _run(self) -> None:
        while (reader := self._next()) is not None:
            try:
                self._listen(reader)
                continue
            except DiffusionLLMError as error:
                refusal = RequestError("broker_lost", str(error), RETRY_S * 1000)
            except Exception:  # the readers must hear of it
                log.exception("the devices of the broker cannot be listed")
                refusal = RequestError("internal", "the devices cannot be listed; the daemon's log has the details")
            again_s = time.monotonic() + RETRY_S
            while reader is not None:
                reader(refusal)
                reader = self._next(max(0.0, again_s - time.monotonic()))

    def _listen(self, reader: Reader | None) -> None:
        """Answer this reader and the next ones, until LOOK_S without any. Raises ConfigError, DeviceError."""
        answer, made_s = b"", float("-inf")
        with FleetWatch(self._config) as watch:
            watch.settle()
            while reader is not None:
                if time.monotonic() - made_s >= FRESH_S:
                    answer, made_s = msgspec.json.encode(watch.view()), time.monotonic()
                reader(answer)
                reader = self._next(LOOK_S)

    def _next(self, wait_s: float | None = None) -> Reader | None:
        """The next reader; None after the timeout, or at the end."""
        with suppress(queue.Empty):
            return None if self._closed else self._readers.get(timeout=wait_s)
        return None
