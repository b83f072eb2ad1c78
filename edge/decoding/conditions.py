"""What a text is to tell of: words and pictures, which a backend encodes once into a memory that every row reads.

With guidance w a token is drawn from l = (1 + w) · l_conditioned − w · l_unconditioned (Ho and Salimans, arXiv
2207.12598), of two streams of rows in one pass: those that read the memory, and those that do not.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

ROWS_OF_A_PICTURE: Final = 16
"""Encoding a picture costs about as much as so many rows of a pass."""


@dataclass(frozen=True, eq=False)
class Condition:
    """words: the tokens of each. pixels (n, S, S, 3) uint8: pictures. guidance: 0 for the network's own law."""

    words: tuple[tuple[int, ...], ...]
    pixels: NDArray[np.uint8]
    guidance: float

    @property
    def cost(self) -> int:
        """What encoding it costs, in rows of a pass."""
        return sum(map(len, self.words)) + ROWS_OF_A_PICTURE * len(self.pixels)

    def word_rows(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """Token, place in its word, and number of its word, of all tokens one after another (rows,)."""
        rows = [(t, place, w) for w, word in enumerate(self.words) for place, t in enumerate(word)]
        tokens, places, words = np.array(rows, np.int32).reshape(-1, 3).T
        return tokens, places, words
