"""The one thread that owns the engine: continuous batching of unmasking steps.

Requests join and leave between passes. Each keeps its own schedule, seed and stop, and its text depends on nothing
beside it. A backend that scores several canvases at once gets as many of one length as it takes; with one that does
not, requests take turns, pass by pass.

Accepting is a promise: what `submit` takes in gets exactly one terminal reply, whatever happens.
"""

import logging
import mmap
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from edge.serving.fair_queue import Turns
from edge.serving.job import Job
from edge.serving.loaded_bundle import Engine, Plan
from edge.serving.request_log import RequestLog
from edge.system.installed import version
from shared.errors import RequestError
from shared.messages import GenerateRequest, Health, Metrics, Reply, Response, State, error_response

log = logging.getLogger("edgelm")

ACTIVE: Final = 16
"""Requests that take turns. More would all be late: the rest waits for a place, but for a client that has none."""
SNAPSHOT_S: Final = 1 / 30
"""From one snapshot to the next: no eye sees more, and each takes a little of a pass."""
FIRST_GUESS_MS: Final = 1000.0
"""A request's engine time before one was measured."""
STOP_GRACE_S: Final = 5.0
"""How long a pass may take to notice that the scheduler stops."""


def _never() -> bool:
    return False


def _nowhere(tags: Sequence[int]) -> None:
    pass


def _nobody() -> None:
    pass


class Scheduler:
    """Serves requests on an engine. queue_size: how many may wait while one is computed.

    `reply` callbacks come from the scheduler's thread, or from the submitting one when the request is refused; they
    must return at once. watch: told the tags of the requests on the engine whenever they change. on_failure: called
    when the device has failed for good: `failure` says why, what is accepted gets an error, and nothing more is taken.
    """

    def __init__(self, engine: Engine, queue_size: int) -> None:
        self.watch: Callable[[Sequence[int]], None] = _nowhere
        self.on_failure: Callable[[], None] = _nobody
        self.failure: str | None = None
        self.steps_done = 0
        """Passes made so far: a watchdog sees by it that a busy scheduler moves."""
        self.requests = RequestLog()
        self._limit = queue_size + 1
        self._started_s = time.monotonic()
        self._version = version()
        self._changed = threading.Condition()  # guards all down to the blank line
        self._engine = engine
        self._waiting: deque[Job] = deque()
        self._load: Counter[str] = Counter()  # client → accepted and unanswered
        self._users: Counter[Engine] = Counter()  # engine → the same
        self._accepted = 0
        self._draining = False
        self._stopping = False

        self._turns = Turns(Job.positions)  # these three are the thread's alone
        self._watched: list[int] = []
        self._mean_ms = FIRST_GUESS_MS
        self._thread = threading.Thread(target=self.run, name="scheduler", daemon=True)

    def start(self) -> None:
        """Begin to serve, in a thread."""
        self._thread.start()

    def run(self) -> None:
        """Serve in this thread until told to drain and done with it."""
        while self._admit():
            for job, error in self._stopped():
                self._finish(job, error_response(error, job.request.id))
            if batch := self._next_batch():
                self._pass(batch)
        self._tell([])

    @property
    def engine(self) -> Engine:
        """What new requests are accepted for."""
        return self._engine

    @property
    def model(self) -> str:
        """NAME@DIGEST of the bundle that new requests are accepted for."""
        return self._engine.model

    @property
    def busy(self) -> bool:
        """Whether an accepted request is still without its answer."""
        with self._changed:
            return self._load.total() > 0

    def sign(self) -> tuple[int, bool]:
        """For the watchdog: passes made so far, and whether there is anything to make them for."""
        return self.steps_done, self.busy

    def health(self) -> Health:
        """How the daemon is."""
        with self._changed:
            engine = self._engine
            return Health(
                state=self._state(engine.degraded),
                queued=len(self._waiting),
                model=engine.model,
                backend=engine.backend_name,
                version=self._version,
                failure=self.failure or engine.degraded,
            )

    def metrics(self) -> Metrics:
        """What was done so far."""
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        answered, tokens = self.requests.counts()
        with self._changed:
            return Metrics(
                uptime_s=round(time.monotonic() - self._started_s, 3),
                accepted=self._accepted,
                answered=answered,
                generated_tokens=tokens,
                steps=self.steps_done,
                active=self._load.total() - len(self._waiting),
                queued=len(self._waiting),
                resident_mb=round(resident_pages * mmap.PAGESIZE / 1e6, 1),
                backend=self._engine.backend_name,
                failure=self.failure or self._engine.degraded,
            )

    def submit(
        self,
        request: GenerateRequest,
        reply: Callable[[Reply], None],
        gone: Callable[[], bool] = _never,
        client: str = "",
        commit: Callable[[Plan], int] | None = None,
        within_s: float | None = None,
        resumed: bool = False,
        alone: bool = False,
        partial_every_s: float = SNAPSHOT_S,
    ) -> None:
        """Accept a request, or refuse it with an error reply (`queue_full`, `draining`, or what is wrong with it).

        gone: tells that nobody waits for the answer any more; asked at every pass. client: whom to be fair to.
        commit: makes the acceptance last, and returns the tag to `watch` for; a RequestError from it refuses.
        within_s: seconds that are left, instead of the request's own deadline. resumed: accepted before, so there is
        room for it. alone: shares no pass with others. partial_every_s: the least time between two snapshots.
        """
        now = time.monotonic()
        if within_s is None:
            within_s = float("inf") if request.deadline_ms is None else request.deadline_ms / 1e3
        engine = None
        try:
            engine, number = self._reserve(client, resumed)
            plan = engine.prepare(request)
            tag = 0 if commit is None else commit(plan)
        except Exception as error:
            if not isinstance(error, RequestError):
                log.exception("a request could not be prepared")
                error = _internal()
            self.requests.note(code=error.code, id=request.id, client=client)
            if engine is not None:
                self._release(client, engine)
            _deliver(reply, error_response(error, request.id))
            return
        run, deadline_s = engine.begin(plan), now + within_s
        job = Job(request, reply, gone, client, number, tag, engine, run, now, deadline_s, partial_every_s, alone=alone)
        with self._changed:
            self._waiting.append(job)
            self._changed.notify_all()

    def replace_engine(self, engine: Engine) -> None:
        """Accept for another engine from now on. The old one is closed once its last request is answered."""
        with self._changed:
            retired, self._engine = self._engine, engine
            unused = not self._users[retired]
        if unused:
            retired.close()

    def refuse_new(self) -> None:
        """Begin to drain: what is accepted is finished, what comes now is refused as `draining`."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def stop(self) -> None:
        """End the thread; what is still unanswered is stopped at its next pass and answered as `draining`."""
        self.refuse_new()
        self._stopping = True
        self._thread.join(STOP_GRACE_S)

    def _state(self, degraded: str | None) -> State:
        if self.failure is not None:
            return "error"
        if self._draining:
            return "draining"
        if degraded is not None:
            return "degraded"
        return "busy" if self._load.total() else "idle"

    def _reserve(self, client: str, resumed: bool) -> tuple[Engine, int]:
        """A place, and the engine to fill it for.  → engine, number in the order of acceptance"""
        with self._changed:
            if self._draining:
                raise RequestError("draining", self._farewell("the daemon is shutting down"))
            load, retry_after_ms = self._load.total(), max(1, round(self._mean_ms))
            if load >= self._limit and not resumed:
                raise RequestError("queue_full", f"{load} requests are accepted already", retry_after_ms)
            if load >= self._limit - self._limit // 4 and self._load[client] and not resumed:
                theirs = f"{load} requests are accepted already: the last places are for clients that have none"
                raise RequestError("queue_full", theirs, retry_after_ms)
            self._load[client] += 1
            self._users[self._engine] += 1
            self._accepted += 1
            return self._engine, self._accepted

    def _release(self, client: str, engine: Engine) -> None:
        with self._changed:
            self._load[client] -= 1
            self._users[engine] -= 1
            self._load, self._users = +self._load, +self._users  # forget those who have nothing here any more
            self._changed.notify_all()
            unused = engine is not self._engine and not self._users[engine]
        if unused:
            engine.close()

    def _admit(self) -> bool:
        """Give places to those who wait, once there is one; False when nobody is left and nobody will come."""
        with self._changed:
            while not self._waiting and not self._turns:
                self._tell([])
                if self._draining and not self._load.total():
                    return False
                self._changed.wait()
            for job in list(self._waiting):
                if len(self._turns) < ACTIVE or job.client not in self._turns:
                    self._waiting.remove(job)
                    self._turns.join(job)
            return True

    def _stopped(self) -> list[tuple[Job, RequestError]]:
        """Who is not to go on, and why: asked of those who wait, too, so that they learn it now and make room."""
        with self._changed:
            jobs = [*self._turns.order(), *self._waiting]
        if self._stopping:
            told = self._farewell("the daemon shut down before this was finished")
            return [(job, RequestError("draining", told)) for job in jobs]
        return [(job, error) for job in jobs if (error := job.obstacle()) is not None]

    def _next_batch(self) -> list[Job]:
        """The next in turn, with as many others of its engine and length as the backend takes."""
        order = self._turns.order()
        if not order:
            return []
        first = order[0]
        if first.alone:
            return [first]
        kind = (first.engine, first.positions())
        mates = [job for job in order if not job.alone and (job.engine, job.positions()) == kind]
        size = max(size for size in first.engine.backend.batches if size <= len(mates))
        return sorted(mates[:size], key=lambda job: job.number)

    def _pass(self, batch: list[Job]) -> None:
        started_s = time.monotonic()
        for job in batch:
            job.started_s = job.started_s or started_s
        self._tell([job.tag for job in batch])
        self._turns.charge(batch)
        try:
            batch[0].engine.step([job.run for job in batch])
        except Exception:  # a backend may raise anything; it costs the requests that it meets alone, none beside them
            log.exception("a pass over %d requests failed", len(batch))
            if batch[0].engine.failure is not None:
                self._give_up(batch[0].engine.failure)
                return
            for job in batch:
                job.alone = True
            if len(batch) == 1:
                self._finish(batch[0], error_response(_internal(), batch[0].request.id))
            return
        self.steps_done += 1
        now = time.monotonic()
        for job in batch:
            job.engine_s += (now - started_s) / len(batch)
            job.first_token_s = job.first_token_s or now
            if job.run.done:
                answer = job.answer()
                self._mean_ms += 0.2 * (job.engine_s * 1e3 - self._mean_ms)
                self._finish(job, answer)
            elif (partial := job.partial()) is not None:
                _deliver(job.reply, partial)

    def _finish(self, job: Job, response: Response) -> None:
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            else:
                self._turns.leave(job)
        self.requests.note(
            code="ok" if response.error is None else response.error.code,
            id=job.request.id,
            client=job.client,
            prompt_tokens=job.run.plan.prompt_tokens,
            tokens=0 if response.usage is None else response.usage.generated_tokens,
            ms=(time.monotonic() - job.accepted_s) * 1e3,
        )
        self._release(job.client, job.engine)
        _deliver(job.reply, response)

    def _give_up(self, failure: str) -> None:
        """Only a new process can use the device again: what is accepted is answered as `draining` before that."""
        with self._changed:
            self.failure, self._draining, self._stopping = failure, True, True
        self.on_failure()

    def _farewell(self, usual: str) -> str:
        return usual if self.failure is None else "the device has failed, and the daemon starts anew"

    def _tell(self, tags: list[int]) -> None:
        if tags != self._watched and self.failure is None:  # what was on the device as it failed stays noted
            self._watched = tags
            self.watch(tags)


def _deliver(reply: Callable[[Reply], None], message: Reply) -> None:
    try:
        reply(message)
    except Exception:  # a transport's fault must not end the scheduler
        log.exception("a reply could not be handed to its transport")


def _internal() -> RequestError:
    return RequestError("internal", "the daemon failed on this request; its log has the details")
