"""Counter-based randomness: the draw depends on (seed, step, position, token id) alone, never on what ran before.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

UInt32 = NDArray[np.uint32]
Float32 = NDArray[np.float32]

TOKEN_DOMAIN: Final = 0  # Gumbel noise of a candidate
ORDER_DOMAIN: Final = 1  # which positions `random` selection commits

_MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_LOW: Final = np.uint64(0xFFFFFFFF)
_SHIFT: Final = np.uint64(32)


def philox(counter: tuple[UInt32, UInt32, UInt32, UInt32], key: int) -> tuple[UInt32, UInt32, UInt32, UInt32]:
    """Ten rounds over broadcastable counters; key is 64 bits, low word first."""
    c0, c1, c2, c3 = (c.astype(np.uint64) for c in counter)  # not yet broadcast: the first rounds stay small
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0)
        c2 = (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1)
        c1, c3 = product1 & _LOW, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0.astype(np.uint32), c1.astype(np.uint32), c2.astype(np.uint32), c3.astype(np.uint32)


def uniform(seed: int, step: int, position: UInt32, token: UInt32, domain: int) -> Float32:
    """Uniform draws strictly inside (0, 1), exact in float32: (23 random bits + ½)·2⁻²³."""
    words = philox((token, position, np.array([step], np.uint32), np.array([domain], np.uint32)), seed)
    u: Float32 = ((words[0] >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    return u


def gumbel(seed: int, step: int, position: UInt32, token: UInt32) -> Float32:
    """Standard Gumbel noise of each candidate; the argmax of score + noise is a draw from softmax(score)."""
    noise: Float32 = -np.log(-np.log(uniform(seed, step, position, token, TOKEN_DOMAIN)))
    return noise
