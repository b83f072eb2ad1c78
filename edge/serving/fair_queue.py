"""Start-time fair queueing over clients, and over the requests of each: the least served goes next.

What is counted is positions computed, not passes: a pass over a long canvas costs several over a short one, and counted
alike it would let long requests starve short ones. Counted, not timed, so that equal requests finish in their order.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar


class Served(Protocol):
    """What is queued. number: its place in the order of acceptance, which breaks ties."""

    client: str
    number: int


T = TypeVar("T", bound=Served)


class FairQueue(Generic[T]):
    """Requests under way, and the positions computed for each, its virtual time. cost: positions of its next pass.

    The next is the one whose virtual time will be lowest *after* its pass. So beside n others a request waits for n
    times its own cost at most, and for the pass that it came into. Not thread-safe.
    """

    def __init__(self, cost: Callable[[T], int]) -> None:
        self._cost = cost
        self._used: dict[T, int] = {}
        self._client_used: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._used)

    def __iter__(self) -> Iterator[T]:
        return iter(self._used)

    def __contains__(self, client: str) -> bool:
        """Whether a client has a request under way."""
        return client in self._client_used

    def join(self, job: T) -> None:
        """A request comes in. New clients and requests start at the current minimum virtual time."""
        own = [used for other, used in self._used.items() if other.client == job.client]
        if not own:
            self._client_used[job.client] = min(self._client_used.values(), default=0)
        self._used[job] = min(own, default=0)

    def leave(self, job: T) -> None:
        """A request is finished."""
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
