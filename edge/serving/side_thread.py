"""A thread beside those that serve, for work that must not delay them. It lives while there is some."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from edge.system.locked import Locked


@dataclass
class _Pending:
    works: deque[Callable[[], None]] = field(default_factory=deque)
    running: bool = False


class SideThread:
    """Does one piece of work after another, in their order. Their number is for the caller to bound; none may raise."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pending = Locked(_Pending())

    def put(self, work: Callable[[], None]) -> None:
        """Have it done soon."""
        with self._pending as pending:
            pending.works.append(work)
            if not pending.running:
                pending.running = True
                threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._pending as pending:
                if not pending.works:
                    pending.running = False
                    return
                work = pending.works.popleft()
            work()
