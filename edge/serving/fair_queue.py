"""Start-time fair queueing over clients, and over the requests of each: the least served goes next.

Service is counted in positions, not steps: a step of a long canvas costs several of a short one, and counted alike,
long requests would starve short ones. Positions rather than time, so that equal requests finish in their order.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar


class Served(Protocol):
    """What is queued. number: its place in the order of acceptance, which breaks ties."""

    client: str
    number: int


T = TypeVar("T", bound=Served)


class FairQueue(Generic[T]):
    """Requests in progress, and the positions computed for each: its virtual time. cost: positions of its next step.

    The next is the one whose virtual time will be lowest *after* its step. So beside n others a request waits for at
    most n times its own cost, and for the step that is running as it comes. Not thread-safe.
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
        """Whether a client has a request in progress."""
        return client in self._client_used

    def join(self, job: T) -> None:
        """Add a request. New clients and requests start at the current minimum virtual time."""
        own = [used for other, used in self._used.items() if other.client == job.client]
        if not own:
            self._client_used[job.client] = min(self._client_used.values(), default=0)
        self._used[job] = min(own, default=0)

    def leave(self, job: T) -> None:
        """Remove a finished request."""
        del self._used[job]
        if all(other.client != job.client for other in self._used):
            del self._client_used[job.client]

    def order(self) -> list[T]:
        """All requests, the next first."""
        costs = {job: self._cost(job) for job in self._used}
        jobs = sorted(costs, key=lambda job: (self._used[job] + costs[job], job.number))
        after: dict[str, int] = {}  # what a client will have used after the next step of its first request
        for job in jobs:
            after.setdefault(job.client, self._client_used[job.client] + costs[job])
        return sorted(jobs, key=lambda job: after[job.client])

    def charge(self, jobs: Iterable[T]) -> None:
        """Account for the next step of these requests."""
        for job in jobs:
            cost = self._cost(job)
            self._used[job] += cost
            self._client_used[job.client] += cost
