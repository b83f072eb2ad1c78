"""How requests ended: counted for the metrics, and a line each in the log, without their text."""

import logging
import threading
import time
from collections import Counter
from typing import Final

from shared.errors import one_line

log = logging.getLogger(__name__)

LINES_PER_S: Final = 20
"""Lines above this rate are left out and counted, so that a flood of refusals fills no disk."""


class RequestLog:
    """Counts and logs the ends of requests, refusals included. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards everything below
        self._ended: Counter[str] = Counter()
        self._tokens = 0
        self._second = 0
        self._lines = 0
        self._left_out = 0

    def note(
        self, *, code: str, id: str | None, client: str, prompt_tokens: int = 0, tokens: int = 0, ms: float = 0.0
    ) -> None:
        """A request ended. code: "ok" or an error code. tokens: generated ones. ms: since it was accepted."""
        with self._lock:
            self._ended[code] += 1
            self._tokens += tokens
            left_out = self._count_line()
        if left_out is None:
            return
        if left_out:
            log.warning("%d more requests ended than are logged one by one", left_out)
        name, sender = one_line(id or "-"), one_line(client or "-")
        log.info("request %s of %s: %s, %d + %d tokens, %.0f ms", name, sender, code, prompt_tokens, tokens, ms)

    def counts(self) -> tuple[dict[str, int], int]:
        """How many requests ended how, and the tokens generated for them."""
        with self._lock:
            return dict(self._ended), self._tokens

    def _count_line(self) -> int | None:
        """How many lines were left out before this one; None when this one is left out too."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._lines = second, 0
        self._lines += 1
        if self._lines > LINES_PER_S:
            self._left_out += 1
            return None
        left_out, self._left_out = self._left_out, 0
        return left_out
