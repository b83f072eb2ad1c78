"""Who answers an id of a pool, as the journal keeps it: the device whose claim the broker handed on first.

For use inside the journal's transactions. All devices hear all claims in the broker's order, and so decide alike.
"""

import sqlite3
from collections.abc import Iterable
from typing import Final, Literal

from shared.errors import RequestError

MAX_FOREIGN: Final = 200_000
"""Ids of other devices that are remembered; the oldest go first."""

ASK_AGAIN_MS: Final = 500

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS claim (
    number INTEGER PRIMARY KEY,
    key BLOB NOT NULL UNIQUE,               -- hash of client, address and id
    seq INTEGER UNIQUE,                     -- the request here; NULL: another device answers it
    won INTEGER NOT NULL,                   -- whether the request here came first
    at_s REAL NOT NULL                      -- the journal's own time
);
"""

Outcome = Literal["won", "lost", "asked again", "noted"]


def add(db: sqlite3.Connection, key: bytes, seq: int, now_s: float) -> None:
    """A request here is going to be claimed. Raises RequestError when another device's was heard just now."""
    if is_taken(db, key):
        raise RequestError("queue_full", "another device of the pool has this request already", ASK_AGAIN_MS)
    db.execute("INSERT OR REPLACE INTO claim (key, seq, won, at_s) VALUES (?, ?, 0, ?)", (key, seq, now_s))


def is_taken(db: sqlite3.Connection, key: bytes) -> bool:
    """Whether another device answers this id."""
    return db.execute("SELECT 1 FROM claim WHERE key = ? AND seq IS NULL", (key,)).fetchone() is not None


def settle(db: sqlite3.Connection, key: bytes, own: bool, now_s: float) -> tuple[Outcome, int | None]:
    """Take note of a claim.  → what it means for the request here, and its number

    own: whether this device made it. A request that lost is deleted: its owner answers it.
    """
    row = db.execute("SELECT seq, won FROM claim WHERE key = ?", (key,)).fetchone()
    if own:
        if row is None or row[0] is None:
            return "noted", None
        db.execute("UPDATE claim SET won = 1 WHERE key = ?", (key,))
        return "won", row[0]
    if row is None:
        db.execute("INSERT INTO claim (key, seq, won, at_s) VALUES (?, NULL, 0, ?)", (key, now_s))
        db.execute(
            "DELETE FROM claim WHERE number <= (SELECT max(number) FROM claim) - ? AND seq IS NULL", (MAX_FOREIGN,)
        )
        return "noted", None
    seq, won = row
    if seq is None:
        return "noted", None
    if won:
        return "asked again", seq
    db.execute("UPDATE claim SET seq = NULL WHERE key = ?", (key,))
    db.execute("DELETE FROM request WHERE seq = ?", (seq,))
    db.execute("DELETE FROM shown WHERE seq = ?", (seq,))
    db.execute("DELETE FROM picture WHERE sha256 NOT IN (SELECT sha256 FROM shown)")
    return "lost", seq


def unsettled(db: sqlite3.Connection) -> Iterable[tuple[bytes, int, bytes, bytes | None]]:
    """Key, number, hash of the payload and correlation data of the requests here whose claim has not been heard."""
    columns = "claim.key, claim.seq, payload_sha256, correlation"
    return db.execute(f"SELECT {columns} FROM claim JOIN request USING (seq) WHERE NOT won ORDER BY claim.number")


def prune(db: sqlite3.Connection, before_s: float) -> None:
    """Forget other devices' claims from before that time, and those of requests that are gone."""
    db.execute("DELETE FROM claim WHERE seq IS NULL AND at_s < ?", (before_s,))
    db.execute("DELETE FROM claim WHERE seq IS NOT NULL AND seq NOT IN (SELECT seq FROM request)")
