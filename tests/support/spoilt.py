"""Input that was valid once."""

import json
import random
from typing import Any, Final

VALID: Final[tuple[dict[str, Any], ...]] = (
    {"prompt": "Once", "max_tokens": 1},
    {"id": "a", "prompt": "Once upon a time", "steps": 1, "seed": 7, "stream": True, "top_p": 0.9},
    {"id": "b", "segments": ["Tom had a ", {"gap": 4}, "."], "steps": 1, "temperature": 0.5, "selection": "margin"},
    {"prompt": "x", "max_tokens": 2, "threshold": 0.5, "deadline_ms": 60000},
    {"prompt": "x", "max_tokens": 2, "entropy_bound": 1.5, "top_k": 5, "response_topic": "edgelm/reply/me"},
    {"type": "health"},
    {"type": "cancel", "id": "a"},
)
"""Messages of every kind, with every field of a request, and each done in a pass or two."""

SPICE: Final = (b"\0", b"\xff", b"\xed\xa0\x80", b"{", b"[", b'"', b"\\u0000", b"-1", b"1e999", b"null", b"[" * 600)
ODD: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, -1, 1, 0.5, 1.0, -0.0, 1e308, 2**31, 2**63, -(2**63), 2**64, 10**400),
    *("", " ", "a", "\0", "\u2028", "\ufffe", "é" * 300, "/", "+", "#", "$SYS/x", "<MASK>", "9" * 200),
    *([], {}, [[]], [None], {"gap": 1}, {"gap": 0}, [{"gap": 2}] * 3, ["x"] * 70),
)
"""Values to put where others were expected."""


def spoilt(line: bytes, luck: random.Random) -> bytes:
    """A line with a few bytes taken out, put in, doubled or changed, and still a line."""
    out = bytearray(line)
    for _ in range(luck.randrange(0, 5)):
        at, end = sorted(luck.randrange(len(out) + 1) for _ in range(2))
        change = luck.randrange(4)
        if change == 0:
            del out[at : min(end, at + 8)]
        elif change == 1:
            out[at:at] = luck.choice(SPICE)
        elif change == 2:
            out[at:at] = out[at:end]
        elif at < len(out):
            out[at] = luck.randrange(256)
    return bytes(out).replace(b"\n", b" ")


def twisted(value: Any, luck: random.Random) -> Any:
    """A JSON value with one thing in it replaced, renamed, left out or put twice: well-formed, and wrong mostly."""
    if isinstance(value, dict) and value and luck.random() < 0.9:
        key = luck.choice(list(value))
        change = luck.randrange(4)
        if change == 0:
            return {k: v for k, v in value.items() if k != key}
        if change == 1:
            return value | {str(luck.choice(ODD)): luck.choice(ODD)}
        return value | {key: twisted(value[key], luck)}
    if isinstance(value, list) and value and luck.random() < 0.9:
        at = luck.randrange(len(value))
        return [*value[:at], twisted(value[at], luck), *value[at + luck.randrange(2) :]]
    return luck.choice(ODD)


def wrong(value: dict[str, Any], luck: random.Random) -> bytes:
    """A message of which the bytes or the values are spoilt, or, seldom, nothing."""
    if luck.random() < 0.5:
        return spoilt(json.dumps(value).encode(), luck)
    for _ in range(luck.randrange(1, 3)):
        value = twisted(value, luck)
    return json.dumps(value, ensure_ascii=luck.random() < 0.5).encode("utf-8", "surrogatepass")
