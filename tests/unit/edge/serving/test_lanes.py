"""Requests side by side on a CPU: each in a lane of its own, none waiting for another's pass."""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.backends.fake import FakeBackend
from edge.decoding.types import Ids, Positions, StepResult
from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.scheduler import Scheduler
from shared.messages import GenerateRequest
from tests.support.mailbox import Mailbox, submit


class Lanes:
    """The fake's scores in six lanes; notes how many passes run at once, and what it is told of the rows under way.

    meet: a pass waits until as many are there. held: passes over canvases that begin so wait for `let_go`.
    """

    def __init__(self, inner: FakeBackend) -> None:
        self._inner = inner
        self.lanes = 6
        self.meet: threading.Barrier | None = None
        self.held: bytes | None = None
        self.is_held, self.let_go = threading.Event(), threading.Event()
        self.most_at_once = 0
        self.rows: Counter[int] = Counter()
        self._lock = threading.Lock()  # guards the counts
        self._inside = 0

    def score(self, canvas: Ids, t: float, positions: Positions, rows: int = 1) -> StepResult:
        with self._lock:
            self._inside += 1
            self.most_at_once = max(self.most_at_once, self._inside)
            self.rows[rows] += 1
        if self.held is not None and canvas.tobytes().startswith(self.held):
            self.is_held.set()
            assert self.let_go.wait(20)
        if self.meet is not None:
            self.meet.wait(20)
        result = self._inner.score(canvas, t, positions)
        with self._lock:
            self._inside -= 1
        return result

    def close(self) -> None:
        """Nothing to free."""


@pytest.fixture
def backend(debug_bundle: Path) -> Lanes:
    return Lanes(FakeBackend(LoadedBundle.load(debug_bundle, "fake").manifest))


@pytest.fixture
def scheduler(debug_bundle: Path, backend: Lanes) -> Iterator[Scheduler]:
    loaded = LoadedBundle.load(debug_bundle, "fake")
    loaded.backend = backend
    scheduler = Scheduler(loaded, queue_size=16)
    yield scheduler
    backend.let_go.set()
    scheduler.stop()


def test_lanes_serve_requests_of_any_length_at_once(scheduler: Scheduler, backend: Lanes) -> None:
    """Two requests in six lanes, one short and one long: every pass meets one of the other."""
    backend.meet = threading.Barrier(2)
    mailboxes = [submit(scheduler, max_tokens=n, steps=1) for n in (3, 40)]
    scheduler.start()
    assert [mailbox.response().status for mailbox in mailboxes] == ["ok", "ok"]
    assert backend.rows == {2: 2}  # each is to take half of the threads


def test_lanes_do_not_wait_for_each_other(scheduler: Scheduler, backend: Lanes) -> None:
    """One request finishes many passes while a single pass of another lasts."""
    slow = GenerateRequest(prompt="slow", max_tokens=4)
    backend.held = scheduler.loaded.prepare(slow).layout.canvas[:4].tobytes()
    mailbox = Mailbox()
    scheduler.submit(slow, mailbox)
    scheduler.start()
    assert backend.is_held.wait(20)
    quick = submit(scheduler, max_tokens=20, steps=20)
    assert quick.response().status == "ok" and not mailbox.answered
    backend.let_go.set()
    assert mailbox.response().status == "ok"


def test_lanes_tell_a_lone_request_that_it_is_alone(scheduler: Scheduler, backend: Lanes) -> None:
    mailbox = submit(scheduler, max_tokens=8, steps=4)
    scheduler.start()
    assert mailbox.response().status == "ok"
    assert set(backend.rows) == {1} and backend.most_at_once == 1


def test_lanes_are_never_more_than_the_backend_has(scheduler: Scheduler, backend: Lanes) -> None:
    backend.lanes = 3
    mailboxes = [submit(scheduler, max_tokens=20, steps=10) for _ in range(12)]
    scheduler.start()
    assert all(mailbox.response().status == "ok" for mailbox in mailboxes)
    assert 1 <= backend.most_at_once <= 3


def test_lanes_stand_still_beside_a_suspect_of_an_earlier_crash(scheduler: Scheduler, backend: Lanes) -> None:
    """Nothing else runs while its pass does, so that a second death names it and no neighbour."""
    suspect = GenerateRequest(prompt="slow", max_tokens=4, steps=4)
    backend.held = scheduler.loaded.prepare(suspect).layout.canvas[:4].tobytes()
    mailbox = Mailbox()
    reported: list[list[int]] = []
    scheduler.watch(lambda tags: reported.append(list(tags)))
    scheduler.submit(suspect, mailbox, resumed=True, alone=True, commit=lambda plan: 7)
    scheduler.start()
    assert backend.is_held.wait(20)
    other = submit(scheduler, max_tokens=2, steps=1)
    assert not other.answered and reported == [[7]]
    backend.let_go.set()
    assert mailbox.response().status == other.response().status == "ok"
    assert not any(7 in tags and len(tags) > 1 for tags in reported)
    assert backend.most_at_once == 1


def test_lanes_all_end_with_a_drain(scheduler: Scheduler) -> None:
    mailboxes = [submit(scheduler, max_tokens=20, steps=10) for _ in range(8)]
    scheduler.start()
    scheduler.refuse_new()
    assert all(mailbox.response().status == "ok" for mailbox in mailboxes)
    scheduler.stop()
    assert not any(thread.name.startswith("lane ") and thread.is_alive() for thread in scheduler._threads)
