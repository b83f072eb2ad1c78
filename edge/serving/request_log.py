"""How requests ended: counted for the metrics, and a line each in the log, without their text."""

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from edge.system.locked import Locked
from shared.errors import one_line

log = logging.getLogger(__name__)

LINES_PER_S: Final = 20
"""Lines above this rate are left out and counted, so that a flood of refusals fills no disk."""


@dataclass
class _Counts:
    """ended: by error code, or "ok". lines: logged in this second. left_out: lines not logged since the last one."""

    ended: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    second: int = 0
    lines: int = 0
    left_out: int = 0

    def count_line(self) -> int | None:
        """How many lines were left out before this one; None when this one is left out too."""
        second = int(time.monotonic())
        if second != self.second:
            self.second, self.lines = second, 0
        self.lines += 1
        if self.lines > LINES_PER_S:
            self.left_out += 1
            return None
        left_out, self.left_out = self.left_out, 0
        return left_out


class RequestLog:
    """Counts and logs the ends of requests, refusals included. Thread-safe."""

    def __init__(self) -> None:
        self._counts = Locked(_Counts())

    def note(
        self, *, code: str, id: str | None, client: str, prompt_tokens: int = 0, tokens: int = 0, ms: float = 0.0
    ) -> None:
        """A request ended. code: "ok" or an error code. tokens: generated ones. ms: since it was accepted."""
        with self._counts as counts:
            counts.ended[code] += 1
            counts.tokens += tokens
            left_out = counts.count_line()
        if left_out is None:
            return
        if left_out:
            log.warning("%d more requests ended than are logged one by one", left_out)
        name, sender = one_line(id or "-"), one_line(client or "-")
        log.info("request %s of %s: %s, %d + %d tokens, %.0f ms", name, sender, code, prompt_tokens, tokens, ms)

    def counts(self) -> tuple[dict[str, int], int]:
        """How many requests ended how, and the tokens generated for them."""
        with self._counts as counts:
            return dict(counts.ended), counts.tokens
