"""What chaos did to a daemon, and what came of it: the journals that it left, and the promises that it broke."""

import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Report:
    """What was done, and what came of it.

    memory_peak_mb: resident, of the daemon at its fullest. refused_full: replies that the journal had no room.
    locked_out: times that a newcomer found no place among idle connections. repeated: answers that came again, the same
    to the byte. lost: requests without an answer. forgotten: requests that were in the journal at some kill and are no
    longer, though they are younger than what it keeps, or never got an answer there. twice: requests with answers that
    differ, whether a client heard them or the journal kept them. mixed: requests of the time in which two daemons had
    one name, which may have two.
    """

    requests: int
    answers: dict[str, int]
    sent_again: int
    misfortunes: dict[str, int]
    memory_peak_mb: float
    clock_span_days: float
    vanished_mqtt_clients: int
    accepted: int
    refused_full: int
    repeated: int
    mixed: int
    locked_out: int
    lost: int
    forgotten: int
    twice: list[str]

    @property
    def broken(self) -> int:
        """Promises that were not kept."""
        return self.locked_out + self.lost + self.forgotten + len(self.twice)


@dataclass(frozen=True)
class Kept:
    """A request in the journal. accepted_s: what the daemon's clock showed. delivered_s: the journal's own time."""

    id: str | None
    accepted_s: float
    answer: bytes | None
    delivered_s: float | None


@dataclass(frozen=True)
class Journal:
    """What a journal held when its daemon was dead. now_s: its own time, at least."""

    now_s: float
    kept: Mapping[int, Kept]


def read_journal(path: Path) -> Journal:
    """What a journal holds whose daemon is dead, by number. From a copy: opening it would change it."""
    with tempfile.TemporaryDirectory(prefix="journal-") as folder:
        for file in path.parent.glob(f"{path.name}*"):
            shutil.copy(file, folder)
        db = sqlite3.connect(Path(folder) / path.name)
        try:
            rows = db.execute("SELECT seq, id, accepted_s, answer, delivered_s FROM request").fetchall()
            times = "SELECT max(coalesce(max(answered_s), 0), coalesce(max(delivered_s), 0)) FROM request"
            (now_s,) = db.execute(times).fetchone()
        finally:
            db.close()
    return Journal(now_s, {seq: Kept(*row) for seq, *row in rows})


def forgotten(journals: list[Journal], keep_s: float) -> int:
    """How many requests are gone too early, or without an answer at the end. Those without an id may always go."""
    last = journals[-1]
    lost = {seq for seq, kept in last.kept.items() if kept.answer is None}
    for journal in journals:
        for seq, kept in journal.kept.items():
            delivered_s = journal.now_s if kept.delivered_s is None else kept.delivered_s
            if seq not in last.kept and kept.id is not None and last.now_s - delivered_s < keep_s:
                lost.add(seq)
    return len(lost)


def answered_twice(heard: Mapping[str, Iterable[bytes]], journals: list[Journal]) -> set[str]:
    """The ids with answers that differ, among all that was heard or kept."""
    answers = {id: set(payloads) for id, payloads in heard.items()}
    for journal in journals:
        for kept in journal.kept.values():
            if kept.answer is not None and kept.id is not None:
                answers.setdefault(kept.id, set()).add(kept.answer)
    return {id for id, payloads in answers.items() if len(payloads) > 1}
