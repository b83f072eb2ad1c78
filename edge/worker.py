"""The one thread that owns the engine, and the bounded queue before it.

Accepting is a promise: what `submit` takes in gets exactly one terminal reply, whatever happens.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from edge.engine import Completion, Engine, Plan, Snapshot
from shared.errors import RequestError
from shared.messages import GenerateRequest, Health, Partial, Reply, Response, Timing, Usage, error_response

log = logging.getLogger("edgelm")

PARTIAL_INTERVAL_S: Final = 0.2
FIRST_GUESS_MS: Final = 1000.0
"""A request's service time before one was measured."""
STOP_GRACE_S: Final = 5.0
"""How long a step may take to notice that the worker stops."""


def _never() -> bool:
    return False


@dataclass(eq=False)
class _Job:
    """An accepted request. Times are seconds of the monotonic clock."""

    request: GenerateRequest
    engine: Engine  # which checked the request, and so has to run it
    plan: Plan
    reply: Callable[[Reply], None]
    gone: Callable[[], bool]
    accepted_s: float
    deadline_s: float
    started_s: float = 0.0
    first_token_s: float | None = None
    partials: int = 0
    last_partial_s: float = field(default=float("-inf"))

    def obstacle(self) -> RequestError | None:
        """Why there is no point in going on, if so."""
        if self.gone():
            return RequestError("cancelled", "the client hung up")
        if time.monotonic() >= self.deadline_s:
            return RequestError("timeout", f"not finished within `deadline_ms` {self.request.deadline_ms}")
        return None


class Worker:
    """Runs requests one after another, in the order of their acceptance.

    `reply` callbacks come from the worker's thread, or from the submitting one when the request is refused; they must
    return at once.
    """

    def __init__(self, engine: Engine, queue_size: int) -> None:
        self.steps_done = 0  # passes of the network since the start: it grows while the worker is alive and busy
        self._engine = engine
        self._retired: list[Engine] = []  # replaced, with requests still to run
        self._queue_size = queue_size
        self._queue: deque[_Job] = deque()
        self._changed = threading.Condition()  # guards the queue and the three fields below
        self._running: _Job | None = None
        self._draining = False
        self._stopping = False
        self._mean_ms = FIRST_GUESS_MS
        self._thread = threading.Thread(target=self.run, name="worker", daemon=True)

    def start(self) -> None:
        """Begin to serve, in a thread."""
        self._thread.start()

    def run(self) -> None:
        """Serve in this thread until told to drain and done with it."""
        while (job := self._next()) is not None:
            response = self._serve(job)
            with self._changed:
                self._running = None
            _deliver(job.reply, response)
            self._close_retired()

    @property
    def engine(self) -> Engine:
        """What requests accepted now are run by."""
        return self._engine

    @property
    def model(self) -> str:
        """Name and digest of the bundle that requests accepted now are answered from."""
        return self._engine.model

    def replace_engine(self, engine: Engine) -> None:
        """Requests from now on are for this engine; the one before finishes what it accepted, and is closed then."""
        with self._changed:
            self._retired.append(self._engine)
            self._engine = engine
            idle = self._running is None and not self._queue
        if idle:
            self._close_retired()

    @property
    def busy(self) -> bool:
        """Whether an accepted request is still without its answer."""
        with self._changed:
            return self._running is not None or bool(self._queue)

    def health(self) -> Health:
        """How the worker is. version: of the installed distribution."""
        with self._changed:
            idle = self._running is None and not self._queue
            return Health(
                state="draining" if self._draining else "idle" if idle else "busy",
                queued=len(self._queue),
                model=self.model,
                version=_version(),
            )

    def submit(
        self, request: GenerateRequest, reply: Callable[[Reply], None], gone: Callable[[], bool] = _never
    ) -> None:
        """Accept a request, or refuse it with an error reply (`queue_full`, `draining`, or what is wrong with it).

        gone: tells that nobody waits for the answer any more; asked at every step.
        """
        now = time.monotonic()
        try:
            deadline_s = float("inf") if request.deadline_ms is None else now + request.deadline_ms / 1e3
            accepted = False
            while not accepted:  # once more when the engine is replaced meanwhile
                engine = self._engine
                plan = engine.prepare(request)
                accepted = self._accept(_Job(request, engine, plan, reply, gone, now, deadline_s))
        except RequestError as error:
            _deliver(reply, error_response(error, request.id))
        except Exception:
            log.exception("a request could not be prepared")
            _deliver(reply, error_response(_internal(), request.id))

    def refuse_new(self) -> None:
        """Begin to drain: what is accepted is finished, what comes now is refused as `draining`."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def stop(self) -> None:
        """End the thread; what is still unanswered is stopped at its next step and answered as `draining`."""
        self.refuse_new()
        self._stopping = True
        self._thread.join(STOP_GRACE_S)

    def _accept(self, job: _Job) -> bool:
        """Take a job into the queue; False when its engine was replaced. Raises RequestError to refuse it."""
        with self._changed:
            if job.engine is not self._engine:
                return False
            if self._draining:
                raise RequestError("draining", "the daemon is shutting down")
            if len(self._queue) >= self._queue_size:
                waiting = f"{self._queue_size} requests are waiting already"
                raise RequestError("queue_full", waiting, retry_after_ms=max(1, round(self._mean_ms)))
            self._queue.append(job)
            self._changed.notify_all()
            return True

    def _next(self) -> _Job | None:
        """The next job; None when the queue is empty and stays so."""
        with self._changed:
            while not self._queue and not self._draining:
                self._changed.wait()
            self._running = self._queue.popleft() if self._queue else None
            return self._running

    def _serve(self, job: _Job) -> Response:
        job.started_s = time.monotonic()
        try:
            self._check(job)
            completion = job.engine.run(job.plan, lambda snapshot: self._on_step(job, snapshot))
        except RequestError as error:
            return error_response(error, job.request.id)
        except Exception:
            log.exception("a request failed unexpectedly")
            return error_response(_internal(), job.request.id)
        return self._answer(job, completion)

    def _answer(self, job: _Job, completion: Completion) -> Response:
        done = time.monotonic()
        self._mean_ms += 0.2 * ((done - job.started_s) * 1e3 - self._mean_ms)
        first = done if job.first_token_s is None else job.first_token_s
        timing = Timing(*(round((t - job.accepted_s) * 1e3, 3) for t in (job.started_s, first, done)))
        return Response(
            id=job.request.id,
            status="ok",
            text=completion.text,
            seed=job.plan.seed,
            usage=Usage(job.plan.prompt_tokens, completion.generated_tokens, completion.steps),
            timing=timing,
            model=job.engine.model,
        )

    def _close_retired(self) -> None:
        with self._changed:
            running = [] if self._running is None else [self._running]
            in_use = [job.engine for job in (*running, *self._queue)]
            unused = [engine for engine in self._retired if engine not in in_use]
            self._retired = [engine for engine in self._retired if engine in in_use]
        for engine in unused:
            engine.close()

    def _on_step(self, job: _Job, snapshot: Snapshot) -> None:
        now = time.monotonic()
        self.steps_done += 1
        if job.first_token_s is None:
            job.first_token_s = now
        self._check(job)
        self._sweep()
        if job.request.stream and now - job.last_partial_s >= PARTIAL_INTERVAL_S:
            job.last_partial_s = now
            job.partials += 1
            partial = Partial(
                id=job.request.id,
                seq=job.partials,
                step=snapshot.step,
                steps=snapshot.steps,
                text=snapshot.text(),
                masked=snapshot.masked,
            )
            _deliver(job.reply, partial)

    def _check(self, job: _Job) -> None:
        if self._stopping:
            raise RequestError("draining", "the daemon shut down before this request was finished")
        if (obstacle := job.obstacle()) is not None:
            raise obstacle

    def _sweep(self) -> None:
        """Answer those in the queue whose time is up or whose client left, so that they learn it now and make room."""
        with self._changed:
            dropped = [(job, error) for job in self._queue if (error := job.obstacle()) is not None]
            for job, _ in dropped:
                self._queue.remove(job)
        for job, error in dropped:
            _deliver(job.reply, error_response(error, job.request.id))


def _deliver(reply: Callable[[Reply], None], message: Reply) -> None:
    try:
        reply(message)
    except Exception:  # a transport's fault must not end the worker
        log.exception("a reply could not be handed to its transport")


def _internal() -> RequestError:
    return RequestError("internal", "the daemon failed on this request; its log has the details")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # 15 ms that a start need not pay

    try:
        return version("diffusion-llm")
    except PackageNotFoundError:
        return "unknown"
