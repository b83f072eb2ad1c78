"""The journal: what it keeps, for how long, and what it says when it cannot."""

import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import edge.delivery.journal
from edge.delivery.journal import FILE, KEEP_S, LITTLE, SHARED, Journal
from shared.errors import ConfigError, RequestError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / FILE


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    journal = Journal(path.parent)
    yield journal
    journal.close()


def accept(journal: Journal, id: str | None = None, **changed: Any) -> int:
    fields: dict[str, Any] = {
        "client": "me",
        "address": "edgelm/reply/me",
        "payload_sha256": b"\1" * 32,
        "request": b'{"prompt":"x","seed":7}',
        "correlation": b"\0\xff",
        "bundle": "debug@0123",
        "deadline_s": 1e10,
    }
    return journal.accept(id=id, **(fields | changed))


def test_journal_returns_a_request_with_all_its_fields(path: Path) -> None:
    journal = Journal(path.parent)
    seq = accept(journal, "a")
    journal.close()
    journal = Journal(path.parent)
    (entry,) = journal.unfinished()
    assert journal.find("me", "edgelm/reply/me", "a") == entry and entry.seq == seq
    assert (entry.address, entry.id, entry.payload_sha256) == ("edgelm/reply/me", "a", b"\1" * 32)
    assert (entry.request, entry.correlation) == (b'{"prompt":"x","seed":7}', b"\0\xff")
    assert (entry.bundle, entry.deadline_s, entry.attempts, entry.answer) == ("debug@0123", 1e10, 0, None)
    journal.close()


def test_journal_identifies_by_client_address_and_id(journal: Journal) -> None:
    accept(journal, "a")
    accept(journal, "b")
    accept(journal, "a", address="edgelm/reply/you")
    accept(journal, "a", client="you")
    assert journal.find("me", "edgelm/reply/you", "b") is None
    with pytest.raises(sqlite3.IntegrityError):
        accept(journal, "a")


def test_journal_keeps_requests_without_an_id_apart(journal: Journal) -> None:
    assert accept(journal) != accept(journal)
    assert len(journal.unfinished()) == 2


def test_journal_keeps_the_first_answer_undelivered_until_delivery(journal: Journal) -> None:
    seq = accept(journal, "a")
    journal.record(answers=[(seq, b"first", None)])
    journal.record(answers=[(seq, b"second", None)])
    assert journal.undelivered() == [seq] and journal.unfinished() == []
    entry = journal.entry(seq)
    assert entry is not None and entry.answer == b"first"
    journal.record(delivered=[seq])
    assert journal.undelivered() == []
    found = journal.find("me", "edgelm/reply/me", "a")
    assert found is not None and found.answer == b"first"


DIES = """
import os, sys
from pathlib import Path
from edge.delivery.journal import Journal
journal = Journal(Path(sys.argv[1]).parent)
journal.computing([int(n) for n in sys.argv[2:]])
os.kill(os.getpid(), 9)
"""


def test_journal_charges_a_crash_to_a_request_that_ran_alone(path: Path) -> None:
    journal = Journal(path.parent)
    first, second, third = accept(journal), accept(journal), accept(journal)
    journal.close()
    for numbers in [(first, second), (second,)]:
        subprocess.run([sys.executable, "-c", DIES, str(path), *map(str, numbers)], check=False)
    journal = Journal(path.parent)
    blamed = {entry.seq: (bool(entry.suspect), entry.attempts) for entry in journal.unfinished()}
    assert blamed == {first: (True, 0), second: (True, 1), third: (False, 0)}
    journal.close()


def test_journal_charges_no_request_after_an_orderly_end(path: Path) -> None:
    journal = Journal(path.parent)
    seq = accept(journal)
    journal.computing([seq])
    journal.close()
    journal = Journal(path.parent)
    assert [entry.attempts for entry in journal.unfinished()] == [0]
    journal.close()


def test_journal_prunes_old_answers_once_delivered(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    delivered, undelivered, unfinished = accept(journal, "a"), accept(journal, "b"), accept(journal, "c")
    journal.record(answers=[(delivered, b"1", None), (undelivered, b"2", None)], delivered=[delivered])
    later = time.monotonic() + KEEP_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    journal.prune()
    assert journal.find("me", "edgelm/reply/me", "a") is None
    assert journal.undelivered() == [undelivered]
    assert [entry.seq for entry in journal.unfinished()] == [unfinished]


def test_journal_ages_do_not_follow_the_wall_clock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path.parent)
    seq = accept(journal, "a")
    journal.record(answers=[(seq, b"1", None)], delivered=[seq])
    far = time.time() + 100 * KEEP_S
    monkeypatch.setattr(time, "time", lambda: far)
    journal.prune()
    journal.close()
    journal = Journal(path.parent)
    journal.prune()
    assert journal.find("me", "edgelm/reply/me", "a") is not None
    later = time.monotonic() + KEEP_S + 1  # nor young for ever
    monkeypatch.setattr(time, "monotonic", lambda: later)
    journal.prune()
    assert journal.find("me", "edgelm/reply/me", "a") is None
    journal.close()


def fill(journal: Journal, client: str, *, prefix: str, request: bytes = b"x" * 60_000, answer: bytes = b"y") -> int:
    """Requests of a client that were taken, answered and delivered, until the journal refuses one.  → their number"""
    for number in range(10_000):
        id = f"{prefix}{number}"
        try:
            seq = accept(journal, id, client=client, address=f"edgelm/reply/{client}", request=request)
        except RequestError as error:
            assert error.code == "storage_full" and error.retryable and error.retry_after_ms
            return number
        journal.record(answers=[(seq, answer, None)], delivered=[seq])
    raise AssertionError("the journal is never full")


def test_journal_when_full_refuses_new_requests_and_keeps_answers_for_a_day(
    journal: Journal, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge.delivery.journal, "MAX_BYTES", 1 << 20)
    taken = fill(journal, "me", prefix="a", answer=b"z" * 5_000)
    assert taken > 80
    fill(journal, "you", prefix="b", request=b"x", answer=b"z" * 60_000)
    for _ in range(3):
        journal.prune()
    answers = [journal.find("me", "edgelm/reply/me", f"a{number}") for number in range(taken)]
    assert all(entry is not None and entry.answer == b"z" * 5_000 for entry in answers)
    assert path.stat().st_size < 2 << 20

    later = time.monotonic() + KEEP_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    accept(journal, "the day after")
    assert journal.find("me", "edgelm/reply/me", "a0") is None


def test_journal_keeps_many_small_answers(journal: Journal) -> None:
    """More than the 10,000 of which the oldest were once forgotten."""
    first = accept(journal, "first")
    journal.record(answers=[(first, b"mine", None)], delivered=[first])
    with journal._transaction() as db:
        columns = "client, address, id, payload_sha256, request, bundle, accepted_s, answer, answered_s, delivered_s"
        rows = (
            ("you", "edgelm/reply/you", str(i), b"\1" * 32, b"", "debug", 0.0, b"x", 0.0, 0.0) for i in range(10_050)
        )
        db.executemany(f"INSERT INTO request ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    journal.prune()
    found = journal.find("me", "edgelm/reply/me", "first")
    assert found is not None and found.answer == b"mine"


def test_journal_reserves_room_for_other_clients(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.delivery.journal, "MAX_BYTES", 4 << 20)
    fill(journal, "greedy", prefix="a", request=b"x", answer=b"z" * 30_000)
    with pytest.raises(RequestError, match="most of its last room is for other clients"):
        accept(journal, "more", client="greedy")
    few = fill(journal, "modest", prefix="b", request=b"x", answer=b"z" * 30_000)
    assert few >= (1 - SHARED) * LITTLE * (4 << 20) // 30_000 and few >= 5
    accept(journal, "one", client="new")


def test_journal_drops_request_and_correlation_data_after_delivery(journal: Journal) -> None:
    seq = accept(journal, "a", request=b"x" * 60_000, correlation=b"c" * 60_000)
    journal.record(answers=[(seq, b"answer", None)], delivered=[seq])
    entry = journal.find("me", "edgelm/reply/me", "a")
    assert entry is not None and (entry.request, entry.correlation, entry.answer) == (b"", None, b"answer")
    assert entry.payload_sha256 == b"\1" * 32


def test_journal_deletes_a_request_without_an_id_after_delivery(journal: Journal) -> None:
    seq = accept(journal)
    journal.record(answers=[(seq, b"answer", None)])
    assert journal.undelivered() == [seq]
    journal.record(delivered=[seq])
    assert journal.undelivered() == []
    with journal._db as db:
        assert db.execute("SELECT count(*) FROM request").fetchone() == (0,)


def test_journal_refuses_new_requests_on_an_almost_full_disk(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    seq = accept(journal, "a")
    monkeypatch.setattr(edge.delivery.journal, "SPARE_BYTES", 1 << 60)
    with pytest.raises(RequestError, match="no room to keep") as refused:
        accept(journal, "b")
    assert refused.value.code == "storage_full"
    journal.record(answers=[(seq, b"still kept", None)])
    assert journal.undelivered() == [seq]


def test_journal_is_not_shared_by_two_daemons(journal: Journal, path: Path) -> None:
    script = "import sys; from pathlib import Path; from edge.delivery.journal import *; Journal(Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", script, str(path.parent)], check=False, capture_output=True, text=True)
    assert f"ConfigError: journal {path} is used by another daemon" in done.stderr


@pytest.mark.parametrize("content", [b"this is no database, but it is long enough to be mistaken for one" * 20])
def test_journal_refuses_a_foreign_file_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal.sqlite").write_bytes(content)
    with pytest.raises(ConfigError, match=r"journal .*journal\.sqlite cannot be opened: file is not a database"):
        Journal(tmp_path)


def test_journal_of_another_release_is_refused(path: Path) -> None:
    Journal(path.parent).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 1")
    db.close()
    with pytest.raises(ConfigError, match="it is of version 1, this release makes version 2"):
        Journal(path.parent)


def test_journal_file_is_readable_by_its_owner_only(journal: Journal, path: Path) -> None:
    accept(journal)
    assert {file.stat().st_mode & 0o077 for file in path.parent.iterdir()} == {0}
    assert path.parent.stat().st_mode & 0o077 == 0


def test_journal_keeps_an_answer_that_was_given_up(journal: Journal) -> None:
    seq = accept(journal, "a")
    journal.record(answers=[(seq, b"text", None)])
    journal.record(tried=[seq])
    journal.record(tried=[seq], given_up=[seq])
    assert journal.undelivered() == []
    found = journal.find("me", "edgelm/reply/me", "a")
    assert found is not None and found.answer == b"text" and found.tries == 2


def contents(path: Path) -> list[tuple[bytes, bytes]]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT sha256, content FROM picture ORDER BY sha256").fetchall()


def test_journal_keeps_a_picture_once_until_its_last_request_is_answered(path: Path) -> None:
    card, dragon = (b"c" * 32, b"card"), (b"d" * 32, b"dragon")
    journal = Journal(path.parent)
    first = accept(journal, "a", pictures=dict([card]))
    second = accept(journal, "b", pictures=dict([card, dragon]))
    third = accept(journal, "c")
    journal.close()
    journal = Journal(path.parent)
    assert [journal.pictures(seq) for seq in (first, second, third)] == [dict([card]), dict([card, dragon]), {}]
    journal.record(answers=[(second, b"{}", None), (third, b"{}", None)])
    assert [journal.pictures(seq) for seq in (first, second)] == [dict([card]), {}]
    journal.close()
    assert contents(path) == [card]
    journal = Journal(path.parent)
    journal.record(answers=[(first, b"{}", None)])
    journal.close()
    assert contents(path) == []


def test_journal_counts_pictures_against_their_client(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.delivery.journal, "MAX_BYTES", 400_000)
    accept(journal, "a", pictures={b"c" * 32: b"x" * 310_000})
    with pytest.raises(RequestError, match="most of its last room is for other clients"):
        accept(journal, "b")
    accept(journal, "b", client="you")
