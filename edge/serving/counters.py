"""What is counted for the metrics: ends of requests, their times, tokens, passes and drafts. No locks here."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from shared.manifest import MAX_WINDOW, Decoder
from shared.metrics import Decoded, Drafts, Histogram

BOUNDS_S: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Of the histograms: from a short text on a fast processor to a request that waited in a full queue."""
MINUTE_S: Final = 60


@dataclass(frozen=True)
class Served:
    """A finished text. passes: evaluations of the network. Times are seconds since the request was accepted.

    tried[n], kept[n]: how many passes of blocks held n drafts, and kept n of them; empty by canvas.
    """

    decoder: Decoder
    prompt_tokens: int
    tokens: int
    passes: int
    first_token_s: float
    total_s: float
    tried: Sequence[int] = ()
    kept: Sequence[int] = ()


class Times:
    """A histogram under way."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum_s = 0.0

    def add(self, seconds: float) -> None:
        """Count a value; one that is a bound belongs below it."""
        self._counts[bisect_left(BOUNDS_S, seconds)] += 1
        self._sum_s += seconds

    def histogram(self) -> Histogram:
        """What was counted so far."""
        return Histogram(BOUNDS_S, tuple(self._counts), round(self._sum_s, 6))


class LastMinute:
    """The sum of what was counted in the last 60 whole seconds and the running one."""

    def __init__(self) -> None:
        self._sums = [0] * MINUTE_S
        self._second = 0

    def add(self, now_s: float, count: int) -> None:
        """Count at a time, which never goes back."""
        self._forget(int(now_s))
        self._sums[self._second % MINUTE_S] += count

    def total(self, now_s: float) -> int:
        """The sum up to now."""
        self._forget(int(now_s))
        return sum(self._sums)

    def _forget(self, second: int) -> None:
        for passed in range(max(self._second + 1, second - MINUTE_S + 1), second + 1):
            self._sums[passed % MINUTE_S] = 0
        self._second = max(self._second, second)


@dataclass
class Counters:
    """Everything since the start. ended: by error code, or "ok"."""

    ended: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    tokens: int = 0
    dropped: int = 0
    undeliverable: int = 0
    latency: Times = field(default_factory=Times)
    first_token: Times = field(default_factory=Times)
    recent_tokens: LastMinute = field(default_factory=LastMinute)
    tokens_of: Counter[Decoder] = field(default_factory=Counter)
    passes_of: Counter[Decoder] = field(default_factory=Counter)
    tried: list[int] = field(default_factory=lambda: [0] * (MAX_WINDOW + 1))
    kept: list[int] = field(default_factory=lambda: [0] * (MAX_WINDOW + 1))

    def add(self, served: Served, now_s: float) -> None:
        """Count a finished text."""
        self.prompt_tokens += served.prompt_tokens
        self.tokens += served.tokens
        self.recent_tokens.add(now_s, served.tokens)
        self.latency.add(served.total_s)
        self.first_token.add(served.first_token_s)
        self.tokens_of[served.decoder] += served.tokens
        self.passes_of[served.decoder] += served.passes
        for mine, theirs in ((self.tried, served.tried), (self.kept, served.kept)):
            for n, passes in enumerate(theirs):
                mine[n] += passes

    def decoded(self) -> dict[Decoder, Decoded]:
        """What each decoder wrote that was asked for."""
        tokens = self.tokens_of
        return {d: Decoded(tokens[d], n, round(tokens[d] / n, 3) if n else None) for d, n in self.passes_of.items()}

    def drafts(self) -> list[Drafts]:
        """By depth, down to the deepest that was drafted. A draft behind one that was not kept is not kept either."""
        depths = (Drafts(d, sum(self.tried[d:]), sum(self.kept[d:])) for d in range(1, MAX_WINDOW + 1))
        return [drafts for drafts in depths if drafts.drafted]
