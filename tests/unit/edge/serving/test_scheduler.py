"""The scheduler: one terminal reply for whatever it took in."""

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edge.backends.fake import FakeBackend
from edge.serving.job import EARLY_SNAPSHOTS
from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.runs import Plan, Run
from edge.serving.scheduler import Scheduler
from shared.errors import RequestError
from shared.messages import GenerateRequest, Partial, Reply, Response
from tests.support.mailbox import Mailbox, submit


class GatedBundle(LoadedBundle):
    """A real bundle on the fake backend, held behind every pass until the test lets it go on."""

    def __init__(self, inner: LoadedBundle) -> None:
        self.__dict__.update(inner.__dict__)
        assert isinstance(self.backend, FakeBackend)
        self.backend.lanes = 1
        self.at_step = threading.Semaphore(0)
        self.may_step = threading.Semaphore(0)

    def step(self, runs: Sequence[Run], under_way: int = 1) -> None:
        super().step(runs, under_way)
        self.at_step.release()
        assert self.may_step.acquire(timeout=20)

    def go(self) -> None:
        """Let every pass go on from now."""
        self.may_step.release(100_000)


@pytest.fixture
def loaded(debug_bundle: Path) -> GatedBundle:
    return GatedBundle(LoadedBundle.load(debug_bundle, "fake"))


@pytest.fixture
def scheduler(loaded: GatedBundle) -> Iterator[Scheduler]:
    """Two may wait."""
    scheduler = Scheduler(loaded, queue_size=2)
    scheduler.start()
    yield scheduler
    loaded.go()
    scheduler.stop()


def submit_running(scheduler: Scheduler, loaded: GatedBundle, **fields: Any) -> Mailbox:
    """A request that is held at its first step."""
    mailbox = submit(scheduler, **fields)
    assert loaded.at_step.acquire(timeout=20)
    return mailbox


def test_scheduler_answers_equal_requests_in_their_order(loaded: GatedBundle) -> None:
    order: list[str | None] = []
    scheduler = Scheduler(loaded, queue_size=16)
    for name in "abcdefghij":
        request = GenerateRequest(prompt="Once", id=name, max_tokens=3)
        scheduler.submit(request, lambda reply: order.append(getattr(reply, "id", None)))
    loaded.go()
    scheduler.refuse_new()
    scheduler.run()
    assert order == list("abcdefghij")


def test_scheduler_answers_a_short_request_before_a_long_one_ends(scheduler: Scheduler, loaded: GatedBundle) -> None:
    long = submit_running(scheduler, loaded, max_tokens=60, steps=60)
    short = submit(scheduler, max_tokens=1)
    loaded.may_step.release(4)
    assert short.response().status == "ok" and not long.answered


def test_scheduler_refuses_a_request_at_once_under_its_id(scheduler: Scheduler) -> None:
    mailbox = submit(scheduler, id="x", prompt="time " * 5000)
    assert mailbox.answered
    assert mailbox.error_code() == "too_large" and mailbox.response().id == "x"


def test_scheduler_refuses_at_a_full_queue_until_there_is_room(scheduler: Scheduler, loaded: GatedBundle) -> None:
    submit_running(scheduler, loaded)
    waiting = [submit(scheduler) for _ in range(2)]
    refused = submit(scheduler)
    assert refused.error_code() == "queue_full"
    error = refused.response().error
    assert error is not None and error.retryable and error.retry_after_ms is not None and error.retry_after_ms > 0
    assert not any(mailbox.answered for mailbox in waiting)

    loaded.go()
    assert all(mailbox.response().status == "ok" for mailbox in waiting)
    assert submit(scheduler).response().status == "ok"


def test_scheduler_retry_after_follows_the_measured_service_time(scheduler: Scheduler, loaded: GatedBundle) -> None:
    def advice() -> int:
        for _ in range(2):
            submit(scheduler)
        error = submit(scheduler).response().error
        assert error is not None and error.retry_after_ms is not None
        return error.retry_after_ms

    running = submit_running(scheduler, loaded)
    before = advice()
    loaded.go()
    running.response()
    for _ in range(20):
        submit(scheduler, max_tokens=1).response()
    while loaded.may_step.acquire(blocking=False):
        pass
    while loaded.at_step.acquire(blocking=False):
        pass
    submit_running(scheduler, loaded)
    assert advice() < before  # the fake backend answers in a few milliseconds


def test_scheduler_stops_a_cancelled_request_at_its_next_step(scheduler: Scheduler, loaded: GatedBundle) -> None:
    left = threading.Event()
    mailbox = submit_running(scheduler, loaded, gone=left.is_set)
    left.set()
    loaded.may_step.release()
    assert mailbox.response().status == "cancelled" and mailbox.error_code() == "cancelled"


def test_scheduler_ends_a_running_request_at_its_deadline(scheduler: Scheduler, loaded: GatedBundle) -> None:
    mailbox = submit_running(scheduler, loaded, deadline_ms=300)
    time.sleep(0.301)
    loaded.may_step.release()
    assert mailbox.error_code() == "timeout"


def test_scheduler_ends_waiting_requests_at_their_deadlines(scheduler: Scheduler, loaded: GatedBundle) -> None:
    running = submit_running(scheduler, loaded)
    left = threading.Event()
    late, deserted = submit(scheduler, deadline_ms=1), submit(scheduler, gone=left.is_set)
    time.sleep(0.002)
    left.set()
    loaded.may_step.release()  # a single step of the running request

    assert late.error_code() == "timeout"
    assert deserted.error_code() == "cancelled"
    assert not running.answered
    assert scheduler.health().queued == 0


def test_scheduler_survives_an_unexpected_failure_of_one_request(
    scheduler: Scheduler, loaded: GatedBundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded.go()

    def fail(runs: Sequence[Run], under_way: int) -> None:
        raise ZeroDivisionError("the accelerator fell off")

    with monkeypatch.context() as patch:
        patch.setattr(loaded, "step", fail)
        mailbox = submit(scheduler)
        assert mailbox.error_code() == "internal"
    error = mailbox.response().error
    assert error is not None and "accelerator" not in error.message  # the client learns nothing of our insides
    assert "the accelerator fell off" in caplog.text and "Traceback" in caplog.text
    assert submit(scheduler).response().status == "ok"


def test_scheduler_survives_a_transport_that_fails(scheduler: Scheduler, loaded: GatedBundle) -> None:
    loaded.go()

    def fail(reply: Reply) -> None:
        raise OSError("no way back")

    scheduler.submit(GenerateRequest(prompt="Once"), fail)
    assert submit(scheduler).response().status == "ok"


def test_scheduler_sends_snapshots_on_request_and_at_a_bounded_rate(scheduler: Scheduler, loaded: GatedBundle) -> None:
    loaded.go()
    plain = submit(scheduler)
    plain.response()
    streams = {every_s: Mailbox() for every_s in (0.0, 0.05, 3600.0)}
    started_s = time.monotonic()
    for every_s, mailbox in streams.items():
        request = GenerateRequest(prompt="Once", stream=True, steps=20)
        scheduler.submit(request, mailbox, partial_every_s=every_s)
    steps = [mailbox.response().usage for mailbox in streams.values()]
    allowed = 1 + (time.monotonic() - started_s) / 0.05

    for mailbox in streams.values():
        assert isinstance(mailbox.replies[-1], Response)
    every, some, one = (
        [reply for reply in mailbox.replies if isinstance(reply, Partial)] for mailbox in streams.values()
    )
    assert steps[0] is not None and len(every) == steps[0].steps - 1 > 1
    assert len(one) == EARLY_SNAPSHOTS <= len(some) <= EARLY_SNAPSHOTS + allowed
    assert len(plain.replies) == 1


def test_scheduler_sends_every_snapshot_of_a_short_text(scheduler: Scheduler, loaded: GatedBundle) -> None:
    loaded.go()
    mailbox = Mailbox()
    scheduler.submit(GenerateRequest(prompt="Once", stream=True, steps=4), mailbox, partial_every_s=3600.0)
    usage = mailbox.response().usage
    assert usage is not None and 3 <= usage.steps <= EARLY_SNAPSHOTS
    assert len(mailbox.replies) == usage.steps


def test_scheduler_health_is_idle_busy_or_draining(scheduler: Scheduler, loaded: GatedBundle) -> None:
    assert scheduler.health().state == "idle" and not scheduler.busy
    running = submit_running(scheduler, loaded)
    submit(scheduler)
    assert (scheduler.health().state, scheduler.health().queued, scheduler.busy) == ("busy", 1, True)
    assert scheduler.health().model == f"{loaded.manifest.name}@{loaded.digest[:12]}"
    scheduler.refuse_new()
    assert scheduler.health().state == "draining"
    loaded.go()
    running.response()


def test_scheduler_drain_finishes_accepted_requests_and_refuses_new_ones(
    scheduler: Scheduler, loaded: GatedBundle
) -> None:
    accepted = [submit_running(scheduler, loaded), submit(scheduler)]
    scheduler.refuse_new()
    assert submit(scheduler).error_code() == "draining"
    loaded.go()
    assert [mailbox.response().status for mailbox in accepted] == ["ok", "ok"]


def test_scheduler_stop_answers_unfinished_requests(scheduler: Scheduler, loaded: GatedBundle) -> None:
    unfinished = [submit_running(scheduler, loaded), submit(scheduler)]
    stopping = threading.Thread(target=scheduler.stop)
    stopping.start()
    while scheduler.health().state != "draining":
        time.sleep(0.001)
    time.sleep(0.01)
    loaded.may_step.release()
    stopping.join(20)
    assert [mailbox.error_code() for mailbox in unfinished] == ["draining", "draining"]


def test_scheduler_serves_in_the_callers_thread(loaded: GatedBundle) -> None:
    loaded.go()
    scheduler = Scheduler(loaded, queue_size=1)
    mailbox = submit(scheduler, max_tokens=2)
    scheduler.refuse_new()
    scheduler.run()
    assert mailbox.answered and mailbox.response().status == "ok"


def test_scheduler_sign_counts_steps_for_the_watchdog(scheduler: Scheduler, loaded: GatedBundle) -> None:
    assert scheduler.metrics().steps == 0
    submit_running(scheduler, loaded, steps=4)
    loaded.may_step.release(2)
    assert loaded.at_step.acquire(timeout=20) and loaded.at_step.acquire(timeout=20)
    assert scheduler.metrics().steps == 2  # the third is held


def test_scheduler_refuses_when_the_commit_fails(scheduler: Scheduler, loaded: GatedBundle) -> None:
    def full(plan: Plan) -> int:
        raise RequestError("storage_full", "no room")

    mailbox = Mailbox()
    scheduler.submit(GenerateRequest(prompt="Once"), mailbox, commit=full)
    assert mailbox.error_code() == "storage_full" and not scheduler.busy


def test_scheduler_watch_reports_the_requests_of_a_step(scheduler: Scheduler, loaded: GatedBundle) -> None:
    told: list[list[int]] = []
    scheduler.watch(lambda tags: told.append(list(tags)))
    loaded.go()
    mailbox = Mailbox()
    scheduler.submit(GenerateRequest(prompt="Once", max_tokens=4), mailbox, commit=lambda plan: 77)
    assert mailbox.response().status == "ok"
    scheduler.stop()
    assert told == [[77], []]


def test_scheduler_metrics_count_what_was_done(scheduler: Scheduler, loaded: GatedBundle) -> None:
    loaded.go()
    submit(scheduler, max_tokens=4).response()
    submit(scheduler, prompt="time " * 5000).response()
    metrics = scheduler.metrics()
    assert (metrics.accepted, metrics.answered) == (2, {"ok": 1, "too_large": 1})
    assert metrics.generated_tokens == 4 and metrics.steps >= 1
    assert (metrics.active, metrics.queued) == (0, 0) and metrics.resident_mb > 10


def test_health_looks_for_the_version_once(debug_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It walks the file system: at every question, under the lock, that would hold up the passes."""
    walks: list[str] = []

    def walk(name: str) -> str:
        walks.append(name)
        return "1.2.3"

    monkeypatch.setattr("edge.system.installed.version_of", walk)
    scheduler = Scheduler(LoadedBundle.load(debug_bundle, "fake"), queue_size=1)
    assert [scheduler.health().version for _ in range(3)] == ["1.2.3"] * 3
    assert walks == ["diffusion-llm"]
