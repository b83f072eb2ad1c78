"""The journal: what it keeps, for how long, and what it says when it cannot."""

import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edge.delivery.journal
from edge.delivery.journal import Journal
from shared.errors import ConfigError, RequestError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.sqlite"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    journal = Journal(path)
    yield journal
    journal.close()


def accept(journal: Journal, id: str | None = None, **changed: Any) -> int:
    fields: dict[str, Any] = {
        "address": "edgelm/reply/me",
        "payload_sha256": b"\1" * 32,
        "request": b'{"prompt":"x","seed":7}',
        "correlation": b"\0\xff",
        "bundle": "debug@0123",
        "deadline_s": 1e10,
    }
    return journal.accept(id=id, **(fields | changed))


def test_what_is_accepted_is_there_again_with_all_it_was_accepted_with(path: Path) -> None:
    journal = Journal(path)
    seq = accept(journal, "a")
    journal.close()
    journal = Journal(path)
    (entry,) = journal.unfinished()
    assert journal.find("edgelm/reply/me", "a") == entry and entry.seq == seq
    assert (entry.address, entry.id, entry.payload_sha256) == ("edgelm/reply/me", "a", b"\1" * 32)
    assert (entry.request, entry.correlation) == (b'{"prompt":"x","seed":7}', b"\0\xff")
    assert (entry.bundle, entry.deadline_s, entry.attempts, entry.answer) == ("debug@0123", 1e10, 0, None)
    journal.close()


def test_a_name_is_address_and_id_together(journal: Journal) -> None:
    accept(journal, "a")
    accept(journal, "b")
    accept(journal, "a", address="edgelm/reply/you")
    assert journal.find("edgelm/reply/you", "b") is None
    with pytest.raises(sqlite3.IntegrityError):
        accept(journal, "a")


def test_requests_without_an_id_are_never_the_same(journal: Journal) -> None:
    assert accept(journal) != accept(journal)
    assert len(journal.unfinished()) == 2


def test_an_answer_is_undelivered_until_it_is_delivered_and_the_first_one_stays(journal: Journal) -> None:
    seq = accept(journal, "a")
    journal.record(answers=[(seq, b"first")])
    journal.record(answers=[(seq, b"second")])
    (entry,) = journal.undelivered()
    assert entry.answer == b"first" and journal.unfinished() == []
    journal.record(delivered=[seq])
    assert journal.undelivered() == []
    found = journal.find("edgelm/reply/me", "a")
    assert found is not None and found.answer == b"first"


DIES = """
import os, sys
from pathlib import Path
from edge.delivery.journal import Journal
journal = Journal(Path(sys.argv[1]))
journal.computing([int(n) for n in sys.argv[2:]])
os.kill(os.getpid(), 9)
"""


def test_the_requests_on_the_engine_are_blamed_for_the_end_of_the_process(path: Path) -> None:
    journal = Journal(path)
    first, second, third = accept(journal), accept(journal), accept(journal)
    journal.close()
    for numbers in [(first, second), (second,)]:
        subprocess.run([sys.executable, "-c", DIES, str(path), *map(str, numbers)], check=False)
    journal = Journal(path)
    assert {entry.seq: entry.attempts for entry in journal.unfinished()} == {first: 1, second: 2, third: 0}
    journal.close()


def test_nobody_is_blamed_for_an_orderly_end(path: Path) -> None:
    journal = Journal(path)
    seq = accept(journal)
    journal.computing([seq])
    journal.close()
    journal = Journal(path)
    assert [entry.attempts for entry in journal.unfinished()] == [0]
    journal.close()


def test_old_answers_are_forgotten_when_they_were_delivered(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    delivered, undelivered, unfinished = accept(journal, "a"), accept(journal, "b"), accept(journal, "c")
    journal.record(answers=[(delivered, b"1"), (undelivered, b"2")], delivered=[delivered])
    later = time.monotonic() + edge.delivery.journal.KEEP_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    journal.prune()
    assert journal.find("edgelm/reply/me", "a") is None
    assert [entry.seq for entry in journal.undelivered()] == [undelivered]
    assert [entry.seq for entry in journal.unfinished()] == [unfinished]


def test_a_clock_that_is_set_makes_no_answer_old(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path)
    seq = accept(journal, "a")
    journal.record(answers=[(seq, b"1")], delivered=[seq])
    far = time.time() + 100 * edge.delivery.journal.KEEP_S
    monkeypatch.setattr(time, "time", lambda: far)
    journal.prune()
    journal.close()
    journal = Journal(path)
    journal.prune()
    assert journal.find("edgelm/reply/me", "a") is not None
    later = time.monotonic() + edge.delivery.journal.KEEP_S + 1  # nor young for ever
    monkeypatch.setattr(time, "monotonic", lambda: later)
    journal.prune()
    assert journal.find("edgelm/reply/me", "a") is None
    journal.close()


def test_there_is_a_bound_to_their_number(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.delivery.journal, "KEEP_ROWS", 5)
    numbers = [accept(journal, str(i)) for i in range(8)]
    journal.record(answers=[(seq, b"x") for seq in numbers], delivered=numbers[:6])
    journal.prune()
    assert [journal.find("edgelm/reply/me", str(i)) is not None for i in range(8)] == [False] * 3 + [True] * 5


def test_and_to_the_size_of_the_file(journal: Journal, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.delivery.journal, "MAX_BYTES", 1 << 20)
    refused = 0
    for _ in range(200):
        try:
            seq = accept(journal, request=b"x" * 60_000)
        except RequestError as error:
            assert error.code == "storage_full" and error.retryable and error.retry_after_ms
            refused += 1
            continue
        journal.record(answers=[(seq, b"y")], delivered=[seq])
    assert 0 < refused < 100  # each refusal makes room by forgetting what was delivered
    assert path.stat().st_size < 2 << 20


def test_a_disk_with_little_room_takes_nothing_new(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    seq = accept(journal, "a")
    monkeypatch.setattr(edge.delivery.journal, "SPARE_BYTES", 1 << 60)
    with pytest.raises(RequestError, match="no room is left") as refused:
        accept(journal, "b")
    assert refused.value.code == "storage_full"
    journal.record(answers=[(seq, b"still kept")])
    assert [entry.answer for entry in journal.undelivered()] == [b"still kept"]


def test_two_daemons_do_not_share_one(journal: Journal, path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from edge.delivery.journal import Journal; Journal(Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False, capture_output=True, text=True)
    assert f"ConfigError: journal {path} is used by another daemon" in done.stderr


@pytest.mark.parametrize("content", [b"this is no database, but it is long enough to be mistaken for one" * 20])
def test_a_file_that_is_no_journal_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal.sqlite").write_bytes(content)
    with pytest.raises(ConfigError, match=r"journal .*journal\.sqlite cannot be opened: file is not a database"):
        Journal(tmp_path / "journal.sqlite")


def test_a_journal_of_a_later_release_is_refused(path: Path) -> None:
    Journal(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 2")
    db.close()
    with pytest.raises(ConfigError, match="made by a later release"):
        Journal(path)


def test_prompts_are_for_the_owner_alone(journal: Journal, path: Path) -> None:
    accept(journal)
    assert {file.stat().st_mode & 0o077 for file in path.parent.iterdir()} == {0}
    assert path.parent.stat().st_mode & 0o077 == 0
