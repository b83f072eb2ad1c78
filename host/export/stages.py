"""Progress of a long command: its stage, and the time left."""

import time
from collections.abc import Mapping


class Stages:
    """Prints one line a stage. costs: stage → its cost, in any unit; the time left follows from that of stages done."""

    def __init__(self, costs: Mapping[str, float]) -> None:
        self._costs = dict(costs)
        self._number = 0
        self._spent = 0.0
        self._current = 0.0
        self._started = time.monotonic()

    def begin(self, name: str) -> None:
        """Begin a stage; the one before is done."""
        self._number += 1
        self._spent += self._current
        self._current = self._costs[name]
        left = ""
        if self._spent:
            rest = sum(self._costs.values()) - self._spent
            left = f", about {_spoken((time.monotonic() - self._started) / self._spent * rest)} left"
        print(f"[{self._number}/{len(self._costs)}] {name}{left}", flush=True)


def _spoken(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} s"
