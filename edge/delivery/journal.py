"""Accepted requests of MQTT, and those with an id of HTTP, and their answers: one SQLite file that survives power cuts.

A request is written before it is acknowledged, its answer before it is published. It is identified by (client, reply
address, id): sent again with the same payload it gets the stored answer, byte for byte; with another payload it is a
conflict. That holds for KEEP_S after delivery under any load: when the file is full, new requests are refused.
The Unix socket needs no journal: its clients stay connected until the answer, and hanging up cancels.
"""

import os
import sqlite3
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from edge.delivery import claims
from edge.system.locked import Locked
from shared.errors import ConfigError, RequestError

KEEP_S: Final = 24 * 3600.0
"""How long a delivered answer can be requested again, in the journal's own time."""
MAX_BYTES: Final = 256 << 20
"""Size of the file above which new requests are refused, until answers are old enough to go."""
SHARED: Final = 0.75
"""Above this share of MAX_BYTES only clients that hold less than LITTLE are accepted: room for the others."""
LITTLE: Final = 0.05
"""Share of MAX_BYTES."""
ROW_BYTES: Final = 200
"""Approximate size of a row without its payloads."""
SPARE_BYTES: Final = 4 << 20
"""Below this much free space new requests are refused, so that answers to accepted ones can still be stored."""
RETRY_AFTER_MS: Final = 60_000
MAX_ATTEMPTS: Final = 2
MAX_COMPUTING: Final = 64
FILE: Final = "journal.sqlite"

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS request (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- never reused: a late answer cannot reach another request
    client TEXT NOT NULL,
    address TEXT NOT NULL,
    id TEXT,
    payload_sha256 BLOB NOT NULL,
    request BLOB NOT NULL,                  -- JSON with its seed; empty once it is delivered
    correlation BLOB,                       -- the same
    bundle TEXT NOT NULL,
    accepted_s REAL NOT NULL,               -- Unix time
    deadline_s REAL,                        -- Unix time
    suspect INTEGER NOT NULL DEFAULT 0,     -- whether the process ended while computing this
    attempts INTEGER NOT NULL DEFAULT 0,    -- how often it ended while computing nothing else
    answer BLOB,
    answered_s REAL,                        -- the journal's own time
    tries INTEGER NOT NULL DEFAULT 0,       -- how often the broker refused the answer
    delivered_s REAL                        -- when the broker took it, or it was given up; the journal's own time
);
CREATE TABLE IF NOT EXISTS picture (sha256 BLOB PRIMARY KEY, content BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS shown (          -- the pictures of requests without an answer
    seq INTEGER NOT NULL,
    sha256 BLOB NOT NULL,
    PRIMARY KEY (seq, sha256)
) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS identity ON request (client, address, id) WHERE id IS NOT NULL;
CREATE INDEX IF NOT EXISTS open ON request (seq) WHERE answer IS NULL;
CREATE INDEX IF NOT EXISTS undelivered ON request (seq) WHERE answer IS NOT NULL AND delivered_s IS NULL;
CREATE INDEX IF NOT EXISTS client ON request (client);
CREATE INDEX IF NOT EXISTS delivered ON request (delivered_s) WHERE delivered_s IS NOT NULL;
"""
NO_PICTURES: Final[Mapping[bytes, bytes]] = MappingProxyType({})
_VERSION: Final = 2
_COLUMNS: Final = ("seq", "client", "address", "id", "payload_sha256", "request", "correlation", "bundle", "deadline_s")
_ENTRY: Final = ", ".join([*_COLUMNS, "accepted_s", "suspect", "attempts", "answer", "tries"])
_PAYLOADS: Final = ("address", "request", "correlation", "answer")
_SIZE: Final = " + ".join([str(ROW_BYTES), *(f"coalesce(length({column}), 0)" for column in _PAYLOADS)])


@dataclass(frozen=True)
class Entry:
    """A request of the journal. deadline_s, accepted_s: Unix time. answer: None while it is unfinished.

    suspect: the process ended while computing this, perhaps beside others. attempts: how often it ended while computing
    nothing else.
    """

    seq: int
    client: str
    address: str
    id: str | None
    payload_sha256: bytes
    request: bytes
    correlation: bytes | None
    bundle: str
    deadline_s: float | None
    accepted_s: float
    suspect: bool
    attempts: int
    answer: bytes | None
    tries: int


class Journal:
    """One file in the state folder, owned by one daemon. Thread-safe. Raises ConfigError when it cannot be opened.

    Its own time advances while it is open, and continues from the last answer at the next start: setting the clock,
    perhaps by years once a device has a network, ages no answer.
    """

    def __init__(self, folder: Path) -> None:
        self._path = path = folder / FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._db = Locked(_open(path))
            self._computing = os.open(path.with_suffix(".computing"), os.O_RDWR | os.O_CREAT, 0o600)
        except (sqlite3.Error, OSError) as error:
            if "locked" in str(error):
                raise ConfigError(f"journal {path} is used by another daemon; give each its own `state`") from None
            raise ConfigError(f"journal {path} cannot be opened: {error}") from None
        last = "SELECT max(coalesce(max(answered_s), 0), coalesce(max(delivered_s), 0)) FROM request"
        with self._db as db:
            self._began_s: float = db.execute(last).fetchone()[0] - time.monotonic()
        self._mark_suspects()

    def find(self, client: str, address: str, id: str) -> Entry | None:
        """The request of that identity."""
        return next(self._select("client = ? AND address = ? AND id = ?", client, address, id), None)

    def entry(self, seq: int) -> Entry | None:
        """The request of that number, unless it was deleted."""
        return next(self._select("seq = ?", seq), None)

    def accept(
        self,
        *,
        client: str,
        address: str,
        id: str | None,
        payload_sha256: bytes,
        request: bytes,
        correlation: bytes | None,
        bundle: str,
        deadline_s: float | None,
        accepted_s: float | None = None,
        pictures: Mapping[bytes, bytes] = NO_PICTURES,
        claim: bytes | None = None,
    ) -> int:
        """Store a request.  → its number. Raises RequestError `storage_full`; for a `claim`, see claims.add.

        client: counts against its share of the file. accepted_s: Unix time, now by default. pictures: files by hash,
        each kept once while requests without an answer show it. claim: what it is claimed by in a pool of devices.
        """
        self._make_room(client)
        came_s = time.time() if accepted_s is None else accepted_s
        row = (client, address, id, payload_sha256, request, correlation, bundle, came_s, deadline_s)
        columns = "client, address, id, payload_sha256, request, correlation, bundle, accepted_s, deadline_s"
        try:
            with self._transaction() as db:
                done = db.execute(f"INSERT INTO request ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
                db.executemany("INSERT OR IGNORE INTO picture VALUES (?, ?)", pictures.items())
                db.executemany("INSERT INTO shown VALUES (?, ?)", [(done.lastrowid, digest) for digest in pictures])
                if claim is not None and done.lastrowid is not None:
                    claims.add(db, claim, done.lastrowid, self._now_s())
        except sqlite3.OperationalError:  # the disk is full, or fails
            raise storage_full("the disk has no room to keep this request safe") from None
        assert done.lastrowid is not None
        return done.lastrowid

    def record(
        self,
        answers: Iterable[tuple[int, bytes, bytes | None]] = (),
        delivered: Iterable[int] = (),
        tried: Iterable[int] = (),
        given_up: Iterable[int] = (),
    ) -> None:
        """Store answers with their correlation data, and outcomes of sending, in one transaction.

        delivered: the broker has them; requests without an id are deleted, of others the answer stays. tried: the
        broker refused them once more. given_up: not sent again, unless requested. The first answer to a request stays.
        Raises sqlite3.Error, for instance when the disk is full.
        """
        now = self._now_s()
        with self._transaction() as db:
            rows = [(answer, now, correlation, seq) for seq, answer, correlation in answers]
            stores = "UPDATE request SET answer = ?, answered_s = ?, correlation = ? WHERE seq = ? AND answer IS NULL"
            db.executemany(stores, rows)
            shown = db.executemany("DELETE FROM shown WHERE seq = ?", [(row[-1],) for row in rows])
            if shown.rowcount > 0:
                db.execute("DELETE FROM picture WHERE sha256 NOT IN (SELECT sha256 FROM shown)")
            db.executemany("UPDATE request SET tries = tries + 1 WHERE seq = ?", [(seq,) for seq in tried])
            numbers = [(seq,) for seq in delivered]
            db.executemany("DELETE FROM request WHERE seq = ? AND id IS NULL", numbers)
            closed = "request = x'', correlation = NULL, delivered_s = coalesce(delivered_s, ?)"
            ended = [(now, seq) for seq in (*(seq for (seq,) in numbers), *given_up)]
            db.executemany(f"UPDATE request SET {closed} WHERE seq = ?", ended)

    def is_taken(self, key: bytes) -> bool:
        """Whether another device of the pool answers what has that key."""
        with self._db as db:
            return claims.is_taken(db, key)

    def settle(self, heard: Iterable[tuple[bytes, bool]]) -> list[tuple[claims.Outcome, int | None]]:
        """What claims, each a key and whether it is our own, mean for the requests here: see claims.settle."""
        now_s = self._now_s()
        with self._transaction() as db:
            return [claims.settle(db, key, own, now_s) for key, own in heard]

    def unsettled(self) -> list[tuple[bytes, int, bytes, bytes | None]]:
        """The requests whose claim has not come back, oldest first: see claims.unsettled."""
        with self._db as db:
            return list(claims.unsettled(db))

    def win_all(self) -> None:
        """All that was claimed here is answered here."""
        with self._transaction() as db:
            db.execute("UPDATE claim SET won = 1 WHERE seq IS NOT NULL")

    def pictures(self, seq: int) -> dict[bytes, bytes]:
        """The pictures of a request without an answer, by hash."""
        query = "SELECT sha256, content FROM picture JOIN shown USING (sha256) WHERE seq = ?"
        with self._db as db:
            return dict(db.execute(query, (seq,)))

    def unfinished(self) -> list[Entry]:
        """Accepted and not answered, oldest first."""
        return list(self._select("answer IS NULL"))

    def undelivered(self) -> list[int]:
        """Numbers of undelivered answers, oldest first; the answers themselves might fill the memory."""
        condition = "answer IS NOT NULL AND delivered_s IS NULL"
        with self._db as db:
            return [seq for (seq,) in db.execute(f"SELECT seq FROM request WHERE {condition} ORDER BY seq")]

    def prune(self) -> None:
        """Delete answers that were delivered, or given up, more than KEEP_S ago."""
        with suppress(sqlite3.Error), self._transaction() as db:  # a full disk
            db.execute("DELETE FROM request WHERE delivered_s < ?", (self._now_s() - KEEP_S,))
            claims.prune(db, self._now_s() - 2 * KEEP_S)  # their owners keep an answer for a day from its delivery

    def computing(self, numbers: Iterable[int]) -> None:
        """Record which requests are being computed: survives a crash of the process, and needs no sync."""
        numbers = list(numbers)[:MAX_COMPUTING]
        os.pwrite(self._computing, _pack(numbers), 0)

    def close(self, orderly: bool = True) -> None:
        """Close the file. orderly: no unfinished request is suspected of having ended the process."""
        if orderly:
            self.computing([])
        os.close(self._computing)
        with self._db as db:
            db.close()

    def _mark_suspects(self) -> None:
        """Mark the requests being computed when the last process ended; a single one is charged an attempt."""
        noted = os.pread(self._computing, 8 * MAX_COMPUTING, 0).ljust(8 * MAX_COMPUTING, b"\0")
        numbers = [(number,) for number in struct.unpack(f"<{MAX_COMPUTING}q", noted) if number]
        charge = "suspect = 1, attempts = attempts + 1" if len(numbers) == 1 else "suspect = 1"
        with self._transaction() as db:
            db.executemany(f"UPDATE request SET {charge} WHERE seq = ?", numbers)
        self.computing([])

    def _make_room(self, client: str) -> None:
        """Raise RequestError `storage_full` when no more of that client may be stored."""
        if _free_bytes(self._path) < SPARE_BYTES:
            raise storage_full("the disk has no room to keep this request safe")
        used = self._bytes()
        if used > SHARED * MAX_BYTES:
            self.prune()
            used = self._bytes()
        if used > MAX_BYTES:
            raise storage_full("the journal is full of answers that are kept for a day")
        if used > SHARED * MAX_BYTES and self._holds_more(client, LITTLE * MAX_BYTES):
            raise storage_full("the journal is almost full, and most of its last room is for other clients")

    def _holds_more(self, client: str, most_bytes: float) -> bool:
        """Whether a client's rows hold more than `most_bytes`."""
        shown = "SELECT sum(length(content)) FROM picture JOIN shown USING (sha256) JOIN request USING (seq)"
        with self._db as db:
            held = db.execute(f"{shown} WHERE client = ?", (client,)).fetchone()[0] or 0
            for (size,) in db.execute(f"SELECT {_SIZE} FROM request WHERE client = ?", (client,)):
                held += size
                if held > most_bytes:
                    return True
        return False

    def _select(self, condition: str, *values: object) -> Iterator[Entry]:
        with self._db as db:
            rows = db.execute(f"SELECT {_ENTRY} FROM request WHERE {condition} ORDER BY seq", values).fetchall()
        return (Entry(*row) for row in rows)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._db as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # SQLite rolls a transaction back by itself when the disk is full
                    db.execute("ROLLBACK")
                raise

    def _now_s(self) -> float:
        return self._began_s + time.monotonic()

    def _bytes(self) -> int:
        """Bytes in use, without free pages."""
        names = ("page_count", "freelist_count", "page_size")
        with self._db as db:
            pages, free, size = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
        return int((pages - free) * size)


def storage_full(why: str) -> RequestError:
    """The refusal of a request that cannot be stored."""
    return RequestError("storage_full", why, retry_after_ms=RETRY_AFTER_MS)


def _open(path: Path) -> sqlite3.Connection:
    path.touch(0o600)  # prompts are in it
    db = sqlite3.connect(path, timeout=0.5, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")  # one daemon a journal, and no shared-memory file
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA cache_size = -256")  # KiB; the kernel caches the rest
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise sqlite3.DatabaseError(f"it is of version {version}, this release makes version {_VERSION}")
        db.executescript(_SCHEMA + claims.SCHEMA)
        db.execute(f"PRAGMA user_version = {_VERSION}")
    except sqlite3.Error:
        db.close()
        raise
    return db


def _pack(numbers: list[int]) -> bytes:
    return struct.pack(f"<{MAX_COMPUTING}q", *numbers, *[0] * (MAX_COMPUTING - len(numbers)))


def _free_bytes(path: Path) -> int:
    disk = os.statvfs(path.parent)
    return disk.f_bavail * disk.f_frsize
