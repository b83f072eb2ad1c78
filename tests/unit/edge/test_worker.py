"""The worker: one terminal reply for whatever it took in."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge.engine import Completion, Engine, Plan, Snapshot
from edge.worker import PARTIAL_INTERVAL_S, Worker
from shared.messages import GenerateRequest, Partial, Reply, Response


class Mailbox:
    """Takes the replies to one request."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self._done = threading.Event()

    def __call__(self, reply: Reply) -> None:
        self.replies.append(reply)
        if isinstance(reply, Response):
            self._done.set()

    @property
    def answered(self) -> bool:
        return self._done.is_set()

    def response(self) -> Response:
        assert self._done.wait(20)
        (response,) = (reply for reply in self.replies if isinstance(reply, Response))
        return response

    def error_code(self) -> str:
        error = self.response().error
        assert error is not None
        return error.code


class GatedEngine(Engine):
    """The real engine on the fake backend, held at every step until the test lets it go on."""

    def __init__(self, inner: Engine) -> None:
        self.__dict__.update(inner.__dict__)
        self.at_step = threading.Semaphore(0)
        self.may_step = threading.Semaphore(0)

    def run(self, plan: Plan, on_step: Callable[[Snapshot], None] | None = None) -> Completion:
        assert on_step is not None
        tell = on_step

        def hold(snapshot: Snapshot) -> None:
            self.at_step.release()
            assert self.may_step.acquire(timeout=20)
            tell(snapshot)

        return super().run(plan, hold)

    def go(self) -> None:
        """Let every step pass from now on."""
        self.may_step.release(100_000)


@pytest.fixture
def engine(debug_bundle: Path) -> GatedEngine:
    return GatedEngine(Engine.load(debug_bundle, "fake"))


@pytest.fixture
def worker(engine: GatedEngine) -> Iterator[Worker]:
    """Two may wait."""
    worker = Worker(engine, queue_size=2)
    worker.start()
    yield worker
    engine.go()
    worker.stop()


def submit(worker: Worker, gone: Callable[[], bool] = lambda: False, **fields: object) -> Mailbox:
    mailbox = Mailbox()
    worker.submit(GenerateRequest(**({"prompt": "Once", "max_tokens": 8} | fields)), mailbox, gone)  # type: ignore[arg-type]
    return mailbox


def submit_running(worker: Worker, engine: GatedEngine, **fields: object) -> Mailbox:
    """A request that is held at its first step."""
    mailbox = submit(worker, **fields)  # type: ignore[arg-type]
    assert engine.at_step.acquire(timeout=20)
    return mailbox


def test_requests_are_answered_in_the_order_they_came(worker: Worker, engine: GatedEngine) -> None:
    first = submit_running(worker, engine)
    order: list[str | None] = []
    both = threading.Event()

    def note(reply: Reply) -> None:
        assert isinstance(reply, Response) and first.answered
        order.append(reply.id)
        if len(order) == 2:
            both.set()

    for name in ("a", "b"):
        worker.submit(GenerateRequest(prompt="Once", id=name, max_tokens=1), note)
    engine.go()
    assert both.wait(20)
    assert order == ["a", "b"]


def test_a_refused_request_is_answered_at_once_and_by_its_id(worker: Worker) -> None:
    mailbox = submit(worker, id="x", prompt="time " * 5000)
    assert mailbox.answered
    assert mailbox.error_code() == "too_large" and mailbox.response().id == "x"


def test_a_full_queue_refuses_and_room_is_room_again(worker: Worker, engine: GatedEngine) -> None:
    submit_running(worker, engine)
    waiting = [submit(worker) for _ in range(2)]
    refused = submit(worker)
    assert refused.error_code() == "queue_full"
    error = refused.response().error
    assert error is not None and error.retryable and error.retry_after_ms is not None and error.retry_after_ms > 0
    assert not any(mailbox.answered for mailbox in waiting)

    engine.go()
    assert all(mailbox.response().status == "ok" for mailbox in waiting)
    assert submit(worker).response().status == "ok"


def test_the_time_to_come_again_follows_the_measured_service_time(worker: Worker, engine: GatedEngine) -> None:
    def advice() -> int:
        for _ in range(2):
            submit(worker)
        error = submit(worker).response().error
        assert error is not None and error.retry_after_ms is not None
        return error.retry_after_ms

    running = submit_running(worker, engine)
    before = advice()
    engine.go()
    running.response()
    for _ in range(20):
        submit(worker, max_tokens=1).response()
    while engine.may_step.acquire(blocking=False):
        pass
    while engine.at_step.acquire(blocking=False):
        pass
    submit_running(worker, engine)
    assert advice() < before  # the fake backend answers in a few milliseconds


def test_a_request_nobody_waits_for_stops_at_its_next_step(worker: Worker, engine: GatedEngine) -> None:
    left = threading.Event()
    mailbox = submit_running(worker, engine, gone=left.is_set)
    left.set()
    engine.may_step.release()
    assert mailbox.response().status == "cancelled" and mailbox.error_code() == "cancelled"


def test_a_deadline_ends_a_running_request(worker: Worker, engine: GatedEngine) -> None:
    mailbox = submit_running(worker, engine, deadline_ms=300)
    time.sleep(0.301)
    engine.may_step.release()
    assert mailbox.error_code() == "timeout"


def test_the_queue_hears_of_its_deadlines_while_another_runs(worker: Worker, engine: GatedEngine) -> None:
    running = submit_running(worker, engine)
    left = threading.Event()
    late, deserted = submit(worker, deadline_ms=1), submit(worker, gone=left.is_set)
    time.sleep(0.002)
    left.set()
    engine.may_step.release()  # a single step of the running request

    assert late.error_code() == "timeout"
    assert deserted.error_code() == "cancelled"
    assert not running.answered
    assert worker.health().queued == 0


def test_an_unexpected_failure_ends_one_request_and_not_the_worker(
    worker: Worker, engine: GatedEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine.go()

    def fail(plan: Plan, on_step: Callable[[Snapshot], None] | None = None) -> Completion:
        raise ZeroDivisionError("the accelerator fell off")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "run", fail)
        mailbox = submit(worker)
        assert mailbox.error_code() == "internal"
    error = mailbox.response().error
    assert error is not None and "accelerator" not in error.message  # the client learns nothing of our insides
    assert "the accelerator fell off" in caplog.text and "Traceback" in caplog.text
    assert submit(worker).response().status == "ok"


def test_a_transport_that_fails_does_not_end_the_worker(worker: Worker, engine: GatedEngine) -> None:
    engine.go()

    def fail(reply: Reply) -> None:
        raise OSError("no way back")

    worker.submit(GenerateRequest(prompt="Once"), fail)
    assert submit(worker).response().status == "ok"


def test_snapshots_come_only_to_those_who_ask_and_not_too_often(worker: Worker, engine: GatedEngine) -> None:
    engine.go()
    started_s = time.monotonic()
    streamed, plain = submit(worker, stream=True, id="s"), submit(worker)
    streamed.response()
    allowed = 1 + (time.monotonic() - started_s) / PARTIAL_INTERVAL_S
    plain.response()

    partials = [reply for reply in streamed.replies if isinstance(reply, Partial)]
    assert 1 <= len(partials) <= allowed
    assert isinstance(streamed.replies[-1], Response)
    assert len(plain.replies) == 1


def test_health_tells_idle_busy_and_draining(worker: Worker, engine: GatedEngine) -> None:
    assert worker.health().state == "idle" and not worker.busy
    running = submit_running(worker, engine)
    submit(worker)
    assert (worker.health().state, worker.health().queued, worker.busy) == ("busy", 1, True)
    assert worker.health().model == f"{engine.manifest.name}@{engine.digest[:12]}"
    worker.refuse_new()
    assert worker.health().state == "draining"
    engine.go()
    running.response()


def test_a_drain_finishes_what_was_accepted_and_refuses_the_rest(worker: Worker, engine: GatedEngine) -> None:
    accepted = [submit_running(worker, engine), submit(worker)]
    worker.refuse_new()
    assert submit(worker).error_code() == "draining"
    engine.go()
    assert [mailbox.response().status for mailbox in accepted] == ["ok", "ok"]


def test_a_stop_answers_what_it_does_not_finish(worker: Worker, engine: GatedEngine) -> None:
    unfinished = [submit_running(worker, engine), submit(worker)]
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    while worker.health().state != "draining":
        time.sleep(0.001)
    time.sleep(0.01)
    engine.may_step.release()
    stopping.join(20)
    assert [mailbox.error_code() for mailbox in unfinished] == ["draining", "draining"]


def test_a_worker_serves_in_the_callers_thread_as_well(engine: GatedEngine) -> None:
    engine.go()
    worker = Worker(engine, queue_size=1)
    mailbox = submit(worker, max_tokens=2)
    worker.refuse_new()
    worker.run()
    assert mailbox.answered and mailbox.response().status == "ok"


def test_a_replaced_engine_finishes_what_it_accepted_and_is_closed_then(
    worker: Worker, engine: GatedEngine, debug_bundle: Path
) -> None:
    closed = threading.Event()
    engine.close = closed.set  # type: ignore[method-assign]
    running, waiting = submit_running(worker, engine), submit(worker)
    successor = GatedEngine(Engine.load(debug_bundle, "fake"))
    successor.digest = "successor" * 8
    successor.go()
    worker.replace_engine(successor)
    new = submit(worker)
    assert not closed.is_set()

    engine.go()
    assert new.response().model == successor.model
    assert (running.response().model, waiting.response().model) == (engine.model, engine.model)
    assert closed.wait(20)
    assert worker.health().model == successor.model


def test_an_idle_engine_is_closed_when_it_is_replaced(worker: Worker, engine: GatedEngine, debug_bundle: Path) -> None:
    closed = threading.Event()
    engine.close = closed.set  # type: ignore[method-assign]
    worker.replace_engine(Engine.load(debug_bundle, "fake"))
    assert closed.is_set()


def test_steps_are_counted_while_they_are_made(worker: Worker, engine: GatedEngine) -> None:
    before = worker.steps_done
    engine.go()
    usage = submit(worker).response().usage
    assert usage is not None and worker.steps_done == before + usage.steps
