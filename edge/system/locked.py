"""State that several threads share."""

import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class Locked(Generic[T]):
    """A value and its lock: `with locked as value` is the only way to reach it, so no access can forget the lock."""

    def __init__(self, value: T) -> None:
        self._value = value
        self.changed = threading.Condition()
        """On the same lock: whoever holds the value may wait until another thread has changed it."""

    def __enter__(self) -> T:
        self.changed.acquire()
        return self._value

    def __exit__(self, *error: object) -> None:
        self.changed.release()
