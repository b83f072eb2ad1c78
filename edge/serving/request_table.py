"""Accepted requests behind one lock: which wait, which are in the fair queue, which are being computed."""

from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from edge.decoding.together import share_of_a_lane
from edge.serving.fair_queue import FairQueue
from edge.serving.job import Job
from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.runs import BlocksRun
from edge.system.locked import Locked
from shared.errors import RequestError

ACTIVE: Final = 16
"""Requests in the fair queue. More would all be late: the rest waits, except the first request of each client."""
FIRST_GUESS_MS: Final = 1000.0
"""A request's service time before one was measured."""


@dataclass(frozen=True)
class Work:
    """What one thread is to do next: finish some requests with an error, or run one step of a batch.

    under_way: how many requests share the backend, the batch included.
    """

    stopped: Sequence[tuple[Job, RequestError]] = ()
    batch: Sequence[Job] = ()
    under_way: int = 0


@dataclass(frozen=True)
class Counts:
    """For health and metrics. load: accepted and unanswered requests, the waiting ones among them."""

    load: int
    waiting: int
    accepted: int
    steps: int
    draining: bool


@dataclass
class _State:
    """What the threads share."""

    loaded: LoadedBundle
    waiting: deque[Job] = field(default_factory=deque)
    queue: FairQueue[Job] = field(default_factory=lambda: FairQueue(Job.positions))
    taken: set[Job] = field(default_factory=set)  # by some thread
    batches: list[Sequence[Job]] = field(default_factory=list)  # being computed
    steps: int = 0  # made so far
    load: Counter[str] = field(default_factory=Counter)  # client → accepted and unanswered
    users: Counter[LoadedBundle] = field(default_factory=Counter)  # bundle → the same
    accepted: int = 0
    mean_ms: float = FIRST_GUESS_MS
    watched: list[int] = field(default_factory=list)
    draining: bool = False
    stopping: bool = False
    failure: str | None = None

    def admit(self) -> None:
        """Move waiting jobs to the fair queue where there is room."""
        for job in list(self.waiting):
            if len(self.queue) < ACTIVE or job.client not in self.queue:
                self.waiting.remove(job)
                self.queue.join(job)

    def stopped_jobs(self) -> list[tuple[Job, RequestError]]:
        """Jobs that must not go on, and why; waiting ones, too, so that they are answered now and make room."""
        jobs = [job for job in (*self.queue, *self.waiting) if job not in self.taken]
        if self.stopping:
            reason = self.reason("the daemon shut down before this was finished")
            return [(job, RequestError("draining", reason)) for job in jobs]
        return [(job, error) for job in jobs if (error := job.obstacle()) is not None]

    def next_batch(self) -> list[Job]:
        """The next job, with as many others of its bundle and length as the backend takes in one step."""
        order = [job for job in self.queue.order() if job not in self.taken and job.run.ready(job.client)]
        computing = [batch[0] for batch in self.batches]
        if not order or any(job.alone for job in computing):
            return []
        first = order[0]
        if first.alone:
            return [] if computing else [first]
        if len(computing) >= min(job.loaded.lanes for job in (first, *computing)):
            return []
        sizes = first.loaded.batches(first.run)
        if sizes == (1,):
            return [first]
        kind = self._kind(first)
        alike_now = (job for job in order if not job.alone and self._kind(job) == kind)
        mates = [job for job in alike_now if job.loaded.batches(job.run) == sizes]
        others = (job for batch in self.batches for job in batch)
        alike = len(mates) + sum((job.loaded, type(job.run)) == kind[:2] for job in others)
        own_share = share_of_a_lane(alike, first.loaded.lanes)
        size = max(size for size in sizes if size <= min(len(mates), own_share))
        return sorted(mates[:size], key=lambda job: job.number)

    def _kind(self, job: Job) -> tuple[LoadedBundle, type, int]:
        """What jobs of one step have in common."""
        positions = 0 if isinstance(job.run, BlocksRun) else job.positions()
        return job.loaded, type(job.run), positions

    def reason(self, usual: str) -> str:
        """Why requests are not served: a failed device is named before the usual reason."""
        return usual if self.failure is None else "the device has failed, and the daemon starts again"


class RequestTable:
    """Thread-safe. size: how many requests may be accepted and unanswered.

    watch: called with the tags of the requests being computed whenever they change. It and every job's `gone` are
    called with the lock held: they must return at once and not call back.
    """

    def __init__(self, loaded: LoadedBundle, size: int) -> None:
        self.watch: Callable[[Sequence[int]], None] = lambda tags: None
        self._size = size
        self._state = Locked(_State(loaded))

    @property
    def loaded(self) -> LoadedBundle:
        """The bundle that new requests are accepted for."""
        with self._state as state:
            return state.loaded

    @property
    def failure(self) -> str | None:
        """Why the device is out of service."""
        with self._state as state:
            return state.failure

    def counts(self) -> Counts:
        """How many requests there are."""
        with self._state as state:
            return Counts(state.load.total(), len(state.waiting), state.accepted, state.steps, state.draining)

    # --- in and out ---------------------------------------------------------------------------------------------------

    def reserve(self, client: str, resumed: bool) -> tuple[LoadedBundle, int]:
        """A place, and the bundle to fill it for.  → bundle, number in the order of acceptance

        resumed: accepted before, so there is room for it. Raises RequestError (`queue_full`, `draining`).
        """
        with self._state as state:
            if state.draining:
                raise RequestError("draining", state.reason("the daemon is shutting down"))
            load, retry_after_ms = state.load.total(), max(1, round(state.mean_ms))
            if load >= self._size and not resumed:
                raise RequestError("queue_full", f"{load} requests are accepted already", retry_after_ms)
            if load >= self._size - self._size // 4 and state.load[client] and not resumed:
                theirs = f"{load} requests are accepted already: the last places are for clients that have none"
                raise RequestError("queue_full", theirs, retry_after_ms)
            state.load[client] += 1
            state.users[state.loaded] += 1
            state.accepted += 1
            return state.loaded, state.accepted

    def release(self, client: str, loaded: LoadedBundle) -> None:
        """Give a reserved place back; the last request of a replaced bundle closes it."""
        with self._state as state:
            state.load[client] -= 1
            state.users[loaded] -= 1
            state.load, state.users = +state.load, +state.users  # drops zero counts
            if state.draining:
                self._state.changed.notify_all()
            unused = loaded is not state.loaded and not state.users[loaded]
        if unused:
            loaded.close()

    def add(self, job: Job) -> None:
        """Queue the job of a reserved place."""
        with self._state as state:
            state.waiting.append(job)
            self._state.changed.notify()

    def remove(self, job: Job, service_ms: float | None = None) -> None:
        """Remove a finished job. service_ms: the time its steps took, for a complete text."""
        with self._state as state:
            state.taken.discard(job)
            if job in state.waiting:
                state.waiting.remove(job)
            else:
                state.queue.leave(job)
            if service_ms is not None:
                state.mean_ms += 0.2 * (service_ms - state.mean_ms)
        job.run.close()
        self.release(job.client, job.loaded)

    # --- work ---------------------------------------------------------------------------------------------------------

    def take(self) -> Work | None:
        """Wait for work; None once everything is drained."""
        with self._state as state:
            while True:
                state.admit()
                if stopped := state.stopped_jobs():
                    state.taken.update(job for job, _ in stopped)
                    return Work(stopped=stopped)
                if batch := state.next_batch():
                    return self._begin(state, batch)
                if not state.taken:
                    self._report(state, [])
                    if state.draining and not state.load.total():
                        return None
                self._state.changed.wait()

    def end_step(self, batch: Sequence[Job], finished: Collection[Job]) -> None:
        """The step of a batch is over: `finished` are to be removed, the others may be taken again."""
        with self._state as state:
            state.batches.remove(batch)
            state.steps += 1
            state.taken.difference_update(job for job in batch if job not in finished)

    def _begin(self, state: _State, batch: list[Job]) -> Work:
        state.taken.update(batch)
        state.batches.append(batch)
        state.queue.charge(batch)
        self._report(state, [job.tag for computed in state.batches for job in computed])
        if len(state.queue) > len(state.taken):
            self._state.changed.notify()  # another thread may find a batch
        return Work(batch=batch, under_way=1 if batch[0].alone else len(state.queue))

    def _report(self, state: _State, tags: list[int]) -> None:
        if tags != state.watched and state.failure is None:  # what was on the device as it failed stays recorded
            state.watched = tags
            self.watch(tags)

    # --- the end ------------------------------------------------------------------------------------------------------

    def replace_bundle(self, loaded: LoadedBundle) -> None:
        """Accept for another bundle from now on. The old one is closed once its last request is answered."""
        with self._state as state:
            retired, state.loaded = state.loaded, loaded
            unused = not state.users[retired]
        if unused:
            retired.close()

    def drain(self, stop: bool = False, failure: str | None = None) -> None:
        """Refuse new requests. stop: end accepted ones at their next step. failure: of the device."""
        with self._state as state:
            state.draining, state.stopping, state.failure = True, state.stopping or stop, state.failure or failure
            self._state.changed.notify_all()
