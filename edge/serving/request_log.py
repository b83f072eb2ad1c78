"""How requests ended: counted for the metrics, and a line each in the log, without their text."""

import logging
import time
from dataclasses import dataclass, field
from typing import Any, Final

from edge.serving.counters import MINUTE_S, Counters, Served
from edge.system.locked import Locked
from shared.errors import one_line
from shared.metrics import Metrics

log = logging.getLogger(__name__)

LINES_PER_S: Final = 20
"""Lines above this rate are left out and counted, so that a flood of refusals fills no disk."""


@dataclass
class _State:
    """lines: logged in this second. left_out: lines not logged since the last one."""

    counters: Counters = field(default_factory=Counters)
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
        self._state = Locked(_State())

    def note(
        self,
        *,
        code: str,
        id: str | None,
        client: str,
        prompt_tokens: int = 0,
        ms: float = 0.0,
        served: Served | None = None,
    ) -> None:
        """A request ended. code: "ok" or an error code. ms: since it was accepted. served: its text, if it got one."""
        with self._state as state:
            state.counters.ended[code] += 1
            if served is not None:
                state.counters.add(served, time.monotonic())
            left_out = state.count_line()
        if left_out is None:
            return
        if left_out:
            log.warning("%d more requests ended than are logged one by one", left_out)
        tokens = 0 if served is None else served.tokens
        name, sender = one_line(id or "-"), one_line(client or "-")
        log.info("request %s of %s: %s, %d + %d tokens, %.0f ms", name, sender, code, prompt_tokens, tokens, ms)

    def note_lost(self, *, dropped: int = 0, undeliverable: int = 0) -> None:
        """Replies were not sent because of the limits on them, or given up because the broker refused them."""
        with self._state as state:
            state.counters.dropped += dropped
            state.counters.undeliverable += undeliverable

    def metrics(self, **now: Any) -> Metrics:
        """What was counted. now: the other fields of Metrics."""
        with self._state as state:
            c = state.counters
            return Metrics(
                answered=dict(c.ended),
                latency=c.latency.histogram(),
                first_token=c.first_token.histogram(),
                prompt_tokens=c.prompt_tokens,
                generated_tokens=c.tokens,
                tokens_per_s=round(c.recent_tokens.total(time.monotonic()) / MINUTE_S, 3),
                decoded=c.decoded(),
                drafts=c.drafts(),
                dropped=c.dropped,
                undeliverable=c.undeliverable,
                read_s=round(time.time(), 3),
                **now,
            )
