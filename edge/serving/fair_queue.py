"""Whose turn it is: the client that had least of the engine goes next, and of its requests the least served.

What is counted is positions scored, not passes: a pass over a long canvas costs several over a short one, and counted
alike it would let long requests starve short ones. Counted, not timed, so that equal requests finish in their order.
"""

from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar


class Served(Protocol):
    """What takes turns. number: its place in the order of acceptance, which breaks ties."""

    client: str
    number: int


T = TypeVar("T", bound=Served)


class Turns(Generic[T]):
    """Requests under way, and how many positions were scored for each. cost: positions that its next pass scores.

    The next is whose count will be lowest *after* its pass. So beside n others a request has to wait for n times its
    own cost at most, and for the pass that it came into.
    """

    def __init__(self, cost: Callable[[T], int]) -> None:
        self._cost = cost
        self._used: dict[T, int] = {}
        self._client_used: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._used)

    def __contains__(self, client: str) -> bool:
        """Whether a client has a request under way."""
        return client in self._client_used

    def join(self, job: T) -> None:
        """It begins level with the least served: owes nothing, and is owed nothing of the past."""
        own = [used for other, used in self._used.items() if other.client == job.client]
        if not own:
            self._client_used[job.client] = min(self._client_used.values(), default=0)
        self._used[job] = min(own, default=0)

    def leave(self, job: T) -> None:
        """It is finished."""
        del self._used[job]
        if all(other.client != job.client for other in self._used):
            del self._client_used[job.client]

    def order(self) -> list[T]:
        """Everything under way, the next first."""
        jobs = sorted(self._used, key=lambda job: (self._used[job] + self._cost(job), job.number))
        after: dict[str, int] = {}  # what a client will have used after the next pass of its first request
        for job in jobs:
            after.setdefault(job.client, self._client_used[job.client] + self._cost(job))
        return sorted(jobs, key=lambda job: after[job.client])

    def charge(self, jobs: Iterable[T]) -> None:
        """Account for a pass that is about to serve these."""
        for job in jobs:
            cost = self._cost(job)
            self._used[job] += cost
            self._client_used[job.client] += cost
