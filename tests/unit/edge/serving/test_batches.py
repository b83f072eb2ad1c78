"""Continuous batching: who shares a pass with whom, whose turn it is, and that no text shows it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge.backends.fake import FakeBackend
from edge.decoding.canvas import advance
from edge.decoding.types import Row
from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.request_table import ACTIVE
from edge.serving.scheduler import Scheduler
from edge.transports.mqtt.status import info
from shared.messages import GenerateRequest
from tests.support.mailbox import Mailbox, submit


class Recorder:
    """A backend that steps several rows of one length, notes the shape of every pass, and can refuse a canvas."""

    def __init__(self, inner: FakeBackend, longest: int, batches: tuple[int, ...]) -> None:
        self._inner = inner
        self.lengths: tuple[int, ...] = (16, 32, longest)
        self.batches = batches
        self.failure: str | None = None
        self.shapes: list[tuple[int, int]] = []
        self.refuses: set[bytes] = set()
        self.closed = False

    def advance(self, rows: Sequence[Row], length: int) -> None:
        assert len(rows) in self.batches and length in self.lengths
        assert all(row.active <= length for row in rows)
        if any(row.canvas[:8].tobytes() in self.refuses for row in rows):
            raise ZeroDivisionError("the accelerator fell off")
        self.shapes.append((len(rows), length))
        advance(self._inner, "linear", rows)

    def close(self) -> None:
        self.closed = True


def recorded(folder: Path, *batches: int) -> tuple[LoadedBundle, Recorder]:
    loaded = LoadedBundle.load(folder, "fake")
    assert isinstance(loaded.backend, FakeBackend)
    recorder = Recorder(loaded.backend, loaded.manifest.model.canvas_len, batches)
    loaded.backend = recorder
    return loaded, recorder


def serve_all(scheduler: Scheduler) -> None:
    scheduler.refuse_new()
    scheduler.run()


def test_batches_hold_requests_of_one_length_up_to_the_backends_limit(debug_bundle: Path) -> None:
    loaded, recorder = recorded(debug_bundle, 1, 2, 4)
    scheduler = Scheduler(loaded, queue_size=16)
    mailboxes = [submit(scheduler, max_tokens=2, steps=2) for _ in range(7)]
    serve_all(scheduler)
    assert [mailbox.response().status for mailbox in mailboxes] == ["ok"] * 7
    assert sum(batch for batch, _ in recorder.shapes) == 7 * 2
    assert recorder.shapes[:2] == [(4, 16), (4, 16)]  # who was left out is first in the next


def test_batches_never_mix_lengths(debug_bundle: Path) -> None:
    loaded, recorder = recorded(debug_bundle, 1, 2, 4, 8)
    scheduler = Scheduler(loaded, queue_size=16)
    short = [submit(scheduler, max_tokens=2, steps=1) for _ in range(2)]
    long = [submit(scheduler, max_tokens=20, steps=1) for _ in range(2)]
    serve_all(scheduler)
    assert all(mailbox.response().status == "ok" for mailbox in [*short, *long])
    assert recorder.shapes == [(2, 16), (2, 32)]


def test_batches_write_the_text_of_a_request_alone(debug_bundle: Path) -> None:
    asked: list[dict[str, Any]] = [
        {"prompt": "time " * i, "seed": i, "steps": 3 + i % 3, "temperature": 1.0} for i in range(12)
    ]
    texts = []
    for batches in [(1,), (1, 2, 4, 8)]:
        loaded, recorder = recorded(debug_bundle, *batches)
        scheduler = Scheduler(loaded, queue_size=16)
        mailboxes = [submit(scheduler, max_tokens=None, **fields) for fields in asked]
        serve_all(scheduler)
        assert max(batch for batch, _ in recorder.shapes) == batches[-1]
        texts.append([mailbox.response().text for mailbox in mailboxes])
    assert texts[0] == texts[1]


def test_info_says_whether_a_text_may_depend_on_the_requests_beside_it(debug_bundle: Path) -> None:
    for batches, deterministic in (((1,), True), ((1, 2, 4), False)):
        loaded, _ = recorded(debug_bundle, *batches)
        assert info(Scheduler(loaded, queue_size=1).health(), loaded, queue_size=1).deterministic is deterministic


def test_batches_leave_a_suspect_of_an_earlier_crash_alone(debug_bundle: Path) -> None:
    loaded, recorder = recorded(debug_bundle, 1, 2, 4)
    scheduler = Scheduler(loaded, queue_size=16)
    suspect = GenerateRequest(prompt="Once", max_tokens=2, steps=1)
    scheduler.submit(suspect, Mailbox(), resumed=True, alone=True)
    others = [submit(scheduler, max_tokens=2, steps=1) for _ in range(2)]
    serve_all(scheduler)
    assert recorder.shapes == [(1, 16), (2, 16)] and all(mailbox.answered for mailbox in others)


def test_batches_that_fail_give_up_the_culprit_only(debug_bundle: Path) -> None:
    loaded, recorder = recorded(debug_bundle, 1, 2, 4)
    scheduler = Scheduler(loaded, queue_size=16)
    culprit = GenerateRequest(prompt="culprit of all", max_tokens=4)
    recorder.refuses.add(loaded.prepare(culprit).layout.canvas[:8].tobytes())
    mailboxes = [submit(scheduler, prompt=text) for text in ("Once", culprit.prompt, "Twice", "Thrice")]
    serve_all(scheduler)
    assert [mailbox.response().status for mailbox in mailboxes] == ["ok", "error", "ok", "ok"]
    assert mailboxes[1].error_code() == "internal"


# --- clients ---------------------------------------------------------------------------------------------------------


def test_queue_keeps_its_last_places_for_clients_that_have_none(debug_bundle: Path) -> None:
    loaded, _ = recorded(debug_bundle, 1)
    scheduler = Scheduler(loaded, queue_size=7)
    greedy = [submit(scheduler, client="greedy") for _ in range(8)]
    modest = [submit(scheduler, client="modest") for _ in range(2)]
    assert [mailbox.answered for mailbox in greedy] == [False] * 6 + [True] * 2
    assert [mailbox.answered for mailbox in modest] == [False, True]
    assert {greedy[-1].error_code(), modest[-1].error_code()} == {"queue_full"}
    serve_all(scheduler)
    assert modest[0].response().status == "ok"


def test_queue_lets_a_new_client_pass_one_that_took_every_place(debug_bundle: Path) -> None:
    loaded, _ = recorded(debug_bundle, 1)
    scheduler = Scheduler(loaded, queue_size=100)
    order: list[str | None] = []
    for i in range(ACTIVE + 5):
        request = GenerateRequest(prompt="Once", id=f"greedy {i}", max_tokens=2, steps=2)
        scheduler.submit(request, lambda reply: order.append(getattr(reply, "id", None)), client="greedy")
    request = GenerateRequest(prompt="Once", id="modest", max_tokens=2, steps=2)
    scheduler.submit(request, lambda reply: order.append(getattr(reply, "id", None)), client="modest")
    serve_all(scheduler)
    assert order[0] == "modest" and len(order) == ACTIVE + 6


# --- what stands around it -------------------------------------------------------------------------------------------


def test_reload_closes_the_old_bundle_after_its_last_request(debug_bundle: Path) -> None:
    (old, old_backend), (new, new_backend) = recorded(debug_bundle, 1), recorded(debug_bundle, 1)
    scheduler = Scheduler(old, queue_size=4)
    before = submit(scheduler, steps=3)
    scheduler.replace_bundle(new)
    after = submit(scheduler, steps=5)
    assert not old_backend.closed
    serve_all(scheduler)
    assert before.response().status == after.response().status == "ok"
    assert (len(old_backend.shapes), len(new_backend.shapes)) == (3, 5)
    assert old_backend.closed and not new_backend.closed and scheduler.loaded is new


def test_reload_closes_an_unused_bundle_at_once(debug_bundle: Path) -> None:
    (old, old_backend), (new, _) = recorded(debug_bundle, 1), recorded(debug_bundle, 1)
    scheduler = Scheduler(old, queue_size=4)
    scheduler.replace_bundle(new)
    assert old_backend.closed
