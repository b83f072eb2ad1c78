"""Continuous batching: threads that run the next denoising step of the requests in progress, in fair order.

Requests join and leave between steps. Each keeps its own schedule, seed and end; on a CPU what shares its steps changes
no text. A backend has one lane or several: on a GPU one thread steps many requests at once; on a CPU several threads
step one canvas each, or a few requests by blocks, so that no core idles while another draws tokens.

Every request that `submit` accepts gets exactly one terminal reply.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from edge.serving.job import Job
from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.request_log import RequestLog
from edge.serving.request_table import RequestTable
from edge.serving.runs import Plan
from edge.serving.side_thread import SideThread
from edge.system.board import Board
from edge.system.installed import version
from edge.system.memory import available_mb, resident_mb
from shared.errors import RequestError
from shared.messages import GenerateRequest, Health, Reply, Response, State, error_response
from shared.metrics import Metrics

log = logging.getLogger(__name__)

SNAPSHOT_S: Final = 1 / 30
"""Least time between two snapshots of a request: each costs a little of a step, and more are not seen."""
STOP_GRACE_S: Final = 5.0
"""How long `stop` waits for the steps that are running."""


class Scheduler:
    """Serves requests on a loaded bundle. queue_size: how many may wait while one is computed.

    `reply` is called from the scheduler's threads, one call at a time per request, or from the submitting thread when
    the request is refused; it must return at once. Requests with a condition are checked, and accepted or refused, in a
    thread of their own: decoding pictures would delay a transport, or everybody's steps. on_failure: called when the
    device has failed for good: `failure` says why, accepted requests get an error, and new ones are refused.
    """

    def __init__(self, loaded: LoadedBundle, queue_size: int) -> None:
        self.on_failure: Callable[[], None] = lambda: None
        self.requests = RequestLog()
        self._board = Board()
        self._table = RequestTable(loaded, size=queue_size + 1)
        self._started_s = time.monotonic()
        self._version = version()
        self._threads: list[threading.Thread] = []
        self._conditions = SideThread("conditions")

    def start(self) -> None:
        """Begin to serve, in as many threads as the bundle has lanes."""
        while len(self._threads) < self.loaded.lanes:
            thread = threading.Thread(target=self.run, name=f"lane {len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def run(self) -> None:
        """Serve in this thread until drained."""
        while (work := self._table.take()) is not None:
            for job, error in work.stopped:
                self._finish(job, error_response(error, job.request.id))
            if work.batch:
                self._step(work.batch, work.under_way)

    def watch(self, watch: Callable[[Sequence[int]], None]) -> None:
        """Report the tags of the requests being computed whenever they change; `watch` must return at once."""
        self._table.watch = watch

    @property
    def loaded(self) -> LoadedBundle:
        """The bundle that new requests are accepted for."""
        return self._table.loaded

    @property
    def model(self) -> str:
        """NAME@DIGEST of the bundle that new requests are accepted for."""
        return self.loaded.model

    @property
    def failure(self) -> str | None:
        """Why the device is out of service; None while it is healthy."""
        return self._table.failure

    @property
    def busy(self) -> bool:
        """Whether an accepted request is still without its answer."""
        return self._table.counts().load > 0

    def sign(self) -> tuple[int, bool]:
        """For the watchdog: steps so far, and whether there is work."""
        counts = self._table.counts()
        return counts.steps, counts.load > 0

    def health(self) -> Health:
        """The daemon's state."""
        counts, loaded = self._table.counts(), self.loaded
        state: State = "busy" if counts.load else "idle"
        if self.failure is not None:
            state = "error"
        elif counts.draining:
            state = "draining"
        elif loaded.degraded is not None:
            state = "degraded"
        return Health(
            state=state,
            queued=counts.waiting,
            model=loaded.model,
            backend=loaded.backend_name,
            version=self._version,
            failure=self.failure or loaded.degraded,
        )

    def metrics(self) -> Metrics:
        """Counters since the start, and what the board tells."""
        health, counts, board = self.health(), self._table.counts(), self._board.read()
        return self.requests.metrics(
            version=health.version,
            model=health.model,
            backend=health.backend,
            state=health.state,
            failure=health.failure,
            uptime_s=round(time.monotonic() - self._started_s, 3),
            accepted=counts.accepted,
            active=counts.load - counts.waiting,
            queued=counts.waiting,
            steps=counts.steps,
            resident_mb=resident_mb(),
            available_mb=available_mb(),
            watts=board.watts,
            celsius=board.celsius,
        )

    def submit(
        self,
        request: GenerateRequest,
        reply: Callable[[Reply], None],
        *,
        gone: Callable[[], bool] = lambda: False,
        client: str = "",
        commit: Callable[[Plan], int] = lambda plan: 0,
        within_s: float | None = None,
        resumed: bool = False,
        alone: bool = False,
        partial_every_s: float = SNAPSHOT_S,
    ) -> None:
        """Accept a request, or refuse it with an error reply (`queue_full`, `draining`, or what is wrong with it).

        gone: whether the answer is no longer wanted; called before every step. client: the unit of fair queueing.
        commit: stores the accepted request and returns its tag for `watch`; a RequestError from it refuses. within_s:
        seconds left, instead of the request's own deadline. resumed: accepted by an earlier process, so the queue is
        never full for it. alone: nothing else is computed beside it. partial_every_s: least time between snapshots.
        """
        now = time.monotonic()
        if within_s is None:
            within_s = float("inf") if request.deadline_ms is None else request.deadline_ms / 1e3
        try:
            loaded, number = self._table.reserve(client, resumed)
        except RequestError as error:
            self._refuse(request, reply, client=client, error=error)
            return

        def take_in() -> None:
            try:
                plan = loaded.prepare(request)
                tag = commit(plan)
                run = loaded.begin(plan)
            except Exception as error:
                if not isinstance(error, RequestError):
                    log.exception("a request could not be prepared")
                    error = _internal()
                self._table.release(client, loaded)
                self._refuse(request, reply, client=client, error=error)
                return
            self._table.add(
                Job(
                    request=request,
                    reply=reply,
                    gone=gone,
                    client=client,
                    number=number,
                    tag=tag,
                    loaded=loaded,
                    run=run,
                    accepted_s=now,
                    deadline_s=now + within_s,
                    partial_every_s=partial_every_s,
                    alone=alone,
                )
            )

        if request.conditioned:
            self._conditions.put(take_in)
        else:
            take_in()

    def _refuse(
        self, request: GenerateRequest, reply: Callable[[Reply], None], *, client: str, error: RequestError
    ) -> None:
        self.requests.note(code=error.code, id=request.id, client=client)
        _deliver(reply, error_response(error, request.id))

    def replace_bundle(self, loaded: LoadedBundle) -> None:
        """Accept for another bundle from now on. The old one is closed once its last request is answered."""
        self._table.replace_bundle(loaded)
        if self._threads:
            self.start()

    def refuse_new(self) -> None:
        """Begin to drain: accepted requests are finished, new ones refused as `draining`."""
        self._table.drain()

    def stop(self) -> None:
        """End the threads; unanswered requests stop at their next step and are answered as `draining`."""
        self._table.drain(stop=True)
        give_up_s = time.monotonic() + STOP_GRACE_S
        for thread in self._threads:
            thread.join(max(0.0, give_up_s - time.monotonic()))

    def _step(self, batch: Sequence[Job], under_way: int) -> None:
        loaded, started_s = batch[0].loaded, time.monotonic()
        for job in batch:
            job.started_s = job.started_s or started_s
        failed = False
        try:
            loaded.step([job.run for job in batch], under_way)
        except Exception:  # of any type; each request of the batch is then tried alone, and only those fail
            log.exception("a step of %d requests failed", len(batch))
            failed = True
        now = time.monotonic()
        for job in batch:
            job.compute_s += (now - started_s) / len(batch)
        if failed and loaded.failure is not None:  # only a new process can use the device again
            self._table.drain(stop=True, failure=loaded.failure)
            self.on_failure()
            finished: list[Job] = []
        elif failed:
            finished = [job for job in batch if len(batch) == 1]
            for job in batch:
                job.alone = True
        else:
            finished = self._answer(batch, now)
        self._table.end_step(batch, finished)
        for job in finished:
            self._finish(job, error_response(_internal(), job.request.id) if failed else job.answer())

    def _answer(self, batch: Sequence[Job], now: float) -> list[Job]:
        """Send the snapshots that are due.  → finished jobs"""
        for job in batch:
            job.first_token_s = job.first_token_s or now
            if not job.run.done and (partial := job.partial()) is not None:
                _deliver(job.reply, partial)
        return [job for job in batch if job.run.done]

    def _finish(self, job: Job, response: Response) -> None:
        self.requests.note(
            code="ok" if response.error is None else response.error.code,
            id=job.request.id,
            client=job.client,
            prompt_tokens=job.run.plan.prompt_tokens,
            ms=(time.monotonic() - job.accepted_s) * 1e3,
            served=job.served,
        )
        self._table.remove(job, service_ms=job.compute_s * 1e3 if response.error is None else None)
        _deliver(job.reply, response)


def _deliver(reply: Callable[[Reply], None], message: Reply) -> None:
    try:
        reply(message)
    except Exception:  # a transport's fault must not end the scheduler
        log.exception("a reply could not be handed to its transport")


def _internal() -> RequestError:
    return RequestError("internal", "the daemon failed on this request; its log has the details")
