"""Counter-based randomness: the draw depends on (seed, step, position, token id) alone, never on what ran before.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge.native import library

UInt32 = NDArray[np.uint32]
Float32 = NDArray[np.float32]

TOKEN_DOMAIN: Final = 0  # Gumbel noise of a candidate
ORDER_DOMAIN: Final = 1  # which positions `random` selection commits
BLOCK_DOMAIN: Final = 2  # Gumbel noise of a position's whole vocabulary, four tokens to a counter

NOISE_BLOCK: Final = 8
"""Positions whose noise is made together: one by one, each costs three times as much."""

_MULTIPLIERS: Final = np.array([0xCD9E8D57, 0xD2511F53], np.uint64)
_WEYL: Final = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
_ROUNDS: Final = np.arange(10, dtype=np.uint64)[:, None]
_LOW: Final = np.uint64(0xFFFFFFFF)
_SHIFT: Final = np.uint64(32)


def philox(counter: tuple[UInt32, UInt32, UInt32, UInt32], key: int) -> tuple[UInt32, UInt32, UInt32, UInt32]:
    """Ten rounds over broadcastable counters; key is 64 bits, low word first."""
    shape = np.broadcast_shapes(*(word.shape for word in counter))
    # Words 0 and 2 are computed alike, and so are 1 and 3: in pairs they take half as many calls into numpy.
    even, odd, product = np.empty((3, 2, *shape), np.uint64)
    even[0], odd[0], even[1], odd[1] = counter
    words = (-1, 2, *(1 for _ in shape))
    multipliers = _MULTIPLIERS.reshape(words[1:])
    for round_key in ((np.array([key & 0xFFFFFFFF, key >> 32], np.uint64) + _ROUNDS * _WEYL) & _LOW).reshape(words):
        np.multiply(even[::-1], multipliers, out=product)
        np.right_shift(product, _SHIFT, out=even)
        even ^= odd
        even ^= round_key
        np.bitwise_and(product, _LOW, out=odd)
    return even[0].astype(np.uint32), odd[0].astype(np.uint32), even[1].astype(np.uint32), odd[1].astype(np.uint32)


def uniform(seed: int, step: int, *, position: UInt32, token: UInt32, domain: int) -> Float32:
    """Uniform draws strictly inside (0, 1), exact in float32: (23 random bits + ½)·2⁻²³."""
    words = philox((token, position, np.array([step], np.uint32), np.array([domain], np.uint32)), seed)
    return _open_unit(words[0])


def gumbel(seed: int, step: int, position: UInt32, token: UInt32) -> Float32:
    """Standard Gumbel noise of each candidate; the argmax of score + noise is a draw from softmax(score)."""
    noise: Float32 = -np.log(-np.log(uniform(seed, step, position=position, token=token, domain=TOKEN_DOMAIN)))
    return noise


def block_noise(seed: int, positions: UInt32, vocab_size: int) -> Float32:
    """Standard Gumbel noise of every token at these positions (P,): what `blocks` draws and drafts with.  → (P, V)

    Token i is word i mod 4 of the counter (i div 4, position, 0, BLOCK_DOMAIN): all of Philox's four words are used.
    By the compiled library or numpy, whose logarithms may differ in the last bits.
    """
    if (native := library()) is not None:
        made: Float32 = np.empty((len(positions), vocab_size), np.float32)
        for row, position in zip(made, positions.tolist(), strict=True):
            native.noise(seed, position, 1, vocab_size, row.ctypes.data)
        return made
    return _block_noise(seed, positions, vocab_size)


def _block_noise(seed: int, positions: UInt32, vocab_size: int) -> Float32:
    """The same by numpy."""
    counters = np.arange(-(-vocab_size // 4), dtype=np.uint32)
    zero, domain = np.zeros(1, np.uint32), np.array([BLOCK_DOMAIN], np.uint32)
    words = np.stack(philox((counters, positions[:, None], zero, domain), seed), -1)  # (P, V / 4, 4)
    noise = _open_unit(words.reshape(len(positions), -1)[:, :vocab_size])
    for _ in range(2):  # in place: copies cost as much as the logarithms
        np.log(noise, out=noise)
        np.negative(noise, out=noise)
    return noise


class Noise:
    """`block_noise` of a seed, position after position, made ahead for a few. none: zeros, for temperature 0."""

    def __init__(self, seed: int, vocab_size: int, *, none: bool = False) -> None:
        self._seed, self._vocab_size, self._none = seed, vocab_size, none
        self._first = 0
        self._made: Float32 = np.empty((0, vocab_size), np.float32)

    def of(self, position: int, count: int) -> Float32:
        """(count, V), from `position` on."""
        if self._none:
            return np.zeros((count, self._vocab_size), np.float32)
        end = self._first + len(self._made)
        if not self._first <= position <= end:
            self._first, self._made, end = position, self._made[:0], position
        if position + count > end:
            more = np.arange(end, max(position + count, end + NOISE_BLOCK), dtype=np.uint32)
            kept = self._made[position - self._first :]
            self._made = np.concatenate([kept, block_noise(self._seed, more, self._vocab_size)])
            self._first = position
        start = position - self._first
        return self._made[start : start + count]


def _open_unit(words: UInt32) -> Float32:
    u: Float32 = (words >> np.uint32(9)).astype(np.float32)
    u += np.float32(0.5)
    u *= np.float32(2.0**-23)
    return u
