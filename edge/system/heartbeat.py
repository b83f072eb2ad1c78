"""Progress of the daemon's threads, for the watchdog."""

import threading
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")
Sign = Callable[[], tuple[int, bool]]
"""A count that grows with progress, and whether there is work. With work and no growth, a thread is stuck."""


class Heartbeat:
    """The sign of one thread, which enters it for each piece of work and leaves it before it waits for the next.

    thread: once it has ended, the sign is that of a stuck thread.
    """

    def __init__(self, thread: threading.Thread | None = None) -> None:
        self._thread = thread
        self._beats = 0
        self._working = False

    def __enter__(self) -> None:
        self._beats += 1
        self._working = True

    def __exit__(self, *error: object) -> None:
        self._working = False

    def around(self, work: Callable[P, None]) -> Callable[P, None]:
        """`work`, run inside this heartbeat."""

        def beat(*args: P.args, **kwargs: P.kwargs) -> None:
            with self:
                work(*args, **kwargs)

        return beat

    def __call__(self) -> tuple[int, bool]:
        dead = self._thread is not None and not self._thread.is_alive()
        return self._beats, self._working or dead
