"""Input that was valid once."""

import random
from typing import Final

SPICE: Final = (b"\0", b"\xff", b"\xed\xa0\x80", b"{", b"[", b'"', b"\\u0000", b"-1", b"1e999", b"null", b"[" * 600)


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
