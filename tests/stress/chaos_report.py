"""What chaos did to a daemon, and what came of it: the journals that it left, and the promises that it broke."""

import shutil
import sqlite3
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

LATE_S: Final = 10.0
"""How much later than the broker a client may hear an answer: it was away, and asked again after a while."""
Answers = Mapping[str, Mapping[bytes, float]]
"""Id → answers that differ in a byte → when each was heard first, on the harness's clock."""


@dataclass
class Report:
    """What was done, and what came of it.

    memory_peak_mb: resident, of the daemon at its fullest. refused_full: replies that the journal had no room. pauses:
    times that the daemon left the broker to another of its name for a minute or more. locked_out: times that a newcomer
    found no place among idle connections. repeated: answers that came again, the same to the byte. doubled: requests
    that the daemon and another of its name answered each. renewed: requests that came again after their answer was kept
    as long as promised, and got another. lost: requests without an answer. forgotten: requests that were in the journal
    at some kill and are no longer, though they are younger than what it keeps, or never got an answer there. twice:
    requests that one daemon gave answers that differ while it was to keep the first. unstored: requests with an answer
    that no journal held. hurried: times that the journal's own time went ahead of the machine's.
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
    pauses: int
    repeated: int
    doubled: int
    renewed: int
    locked_out: int
    lost: int
    forgotten: int
    twice: list[str]
    unstored: list[str]
    hurried: int

    @property
    def broken(self) -> int:
        """Promises that were not kept."""
        return self.locked_out + self.lost + self.forgotten + len(self.twice) + len(self.unstored) + self.hurried


@dataclass(frozen=True)
class Kept:
    """A request in the journal. accepted_s: what the daemon's clock showed; the other times are the journal's own."""

    id: str | None
    accepted_s: float
    answer: bytes | None
    answered_s: float | None
    delivered_s: float | None


@dataclass(frozen=True)
class Journal:
    """What a journal held when its daemon was dead. now_s: its own time, at least. read_s: the harness's."""

    now_s: float
    read_s: float
    kept: Mapping[int, Kept]


def read_journal(path: Path) -> Journal:
    """What a journal holds whose daemon is dead, by number. From a copy: opening it would change it."""
    with tempfile.TemporaryDirectory(prefix="journal-") as folder:
        for file in path.parent.glob(f"{path.name}*"):
            shutil.copy(file, folder)
        db = sqlite3.connect(Path(folder) / path.name)
        try:
            rows = db.execute("SELECT seq, id, accepted_s, answer, answered_s, delivered_s FROM request").fetchall()
            times = "SELECT max(coalesce(max(answered_s), 0), coalesce(max(delivered_s), 0)) FROM request"
            (now_s,) = db.execute(times).fetchone()
        finally:
            db.close()
    return Journal(now_s, time.monotonic(), {seq: Kept(*row) for seq, *row in rows})


def forgotten(journals: Sequence[Journal], keep_s: float) -> int:
    """How many requests are gone too early, or without an answer at the end. Those without an id may always go."""
    last = journals[-1]
    lost = {seq for seq, kept in last.kept.items() if kept.answer is None}
    for journal in journals:
        for seq, kept in journal.kept.items():
            delivered_s = journal.now_s if kept.delivered_s is None else kept.delivered_s
            if seq not in last.kept and kept.id is not None and last.now_s - delivered_s < keep_s:
                lost.add(seq)
    return len(lost)


@dataclass
class Verdict:
    """Ids by what came of asking more than once. See Report."""

    twice: set[str]
    renewed: set[str]
    doubled: set[str]
    unstored: set[str]


def verdict_of(heard: Answers, daemons: Sequence[Sequence[Journal]], keep_s: float) -> Verdict:
    """Every answer that was heard or kept, by the times of the journals and by those of the clients.

    daemons: the journals of each daemon in the order in which they were read. An answer names the daemon that computed
    it: it stands in that one's journal, and in no other.
    """
    verdict = Verdict(set(), set(), set(), set())
    sources: dict[str, dict[bytes, int]] = {}
    for number, journals in enumerate(daemons):
        for id, rows in _rows(journals).items():
            sources.setdefault(id, {}).update({kept.answer: number for _, kept in rows if kept.answer is not None})
            for (seq, earlier), (later_seq, later) in pairwise(rows):
                if earlier.answer != later.answer:
                    outlived = seq != later_seq and _outlived(earlier, later, keep_s)
                    (verdict.renewed if outlived else verdict.twice).add(id)
    for id, answers in heard.items():
        known = sources.get(id, {})
        if not answers.keys() <= known.keys():
            verdict.unstored.add(id)
        for number in set(known.values()):
            times = sorted(heard_s for answer, heard_s in answers.items() if known.get(answer) == number)
            if any(later_s - earlier_s < keep_s - LATE_S for earlier_s, later_s in pairwise(times)):
                verdict.twice.add(id)
    verdict.doubled |= {id for id, known in sources.items() if len(set(known.values())) > 1}
    return verdict


def _rows(journals: Sequence[Journal]) -> dict[str, list[tuple[int, Kept]]]:
    """What one daemon answered to each id, by number: the last state of every row and answer."""
    states = {
        (seq, kept.answer): kept
        for journal in journals
        for seq, kept in journal.kept.items()
        if kept.id is not None and kept.answer is not None
    }
    rows: dict[str, list[tuple[int, Kept]]] = {}
    for (seq, _), kept in sorted(states.items(), key=lambda item: item[0][0]):
        assert kept.id is not None
        rows.setdefault(kept.id, []).append((seq, kept))
    return rows


def _outlived(earlier: Kept, later: Kept, keep_s: float) -> bool:
    """Whether the earlier answer was kept as long as promised before the later one was given."""
    if earlier.delivered_s is None or later.answered_s is None:
        return False
    return later.answered_s - earlier.delivered_s >= keep_s


def hurried(journals: Sequence[Journal]) -> int:
    """How often a journal's own time went ahead of the machine's between two readings."""
    lives = pairwise(journals)
    return sum(later.now_s - earlier.now_s > later.read_s - earlier.read_s + LATE_S for earlier, later in lives)
