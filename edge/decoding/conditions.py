"""What a text is to tell of: words and pictures, which a backend encodes once into a memory that every row reads.

With guidance w a token is drawn from l = (1 + w) · l_conditioned − w · l_unconditioned (Ho and Salimans, arXiv
2207.12598), of two streams of rows in one pass: those that read the memory, and those that do not.

A word that the text has told is asked for no more: later rows do not read it. Where nothing is left to read, they are
drawn from as without a condition. Read to the end, a word comes back over and over (docs/quality.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

ROWS_OF_A_PICTURE: Final = 16
"""Encoding a picture costs about as much as so many rows of a pass."""


@dataclass(frozen=True, eq=False)
class Condition:
    """words: the tokens of each. pixels (n, S, S, 3) uint8: pictures. guidance: 0 for the network's own law.

    go_on: the tokens that go on with the word before them.
    """

    words: tuple[tuple[int, ...], ...]
    pixels: NDArray[np.uint8]
    guidance: float
    go_on: frozenset[int] = frozenset()

    @property
    def cost(self) -> int:
        """What encoding it costs, in rows of a pass."""
        return sum(map(len, self.words)) + ROWS_OF_A_PICTURE * len(self.pixels)

    def word_rows(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """Token, place in its word, and number of its word, of all tokens one after another (rows,)."""
        rows = [(t, place, w) for w, word in enumerate(self.words) for place, t in enumerate(word)]
        tokens, places, words = np.array(rows, np.int32).reshape(-1, 3).T
        return tokens, places, words


@dataclass(eq=False)
class Remaining:
    """What a text is still asked for. left: numbers of the words that it has not told."""

    condition: Condition
    left: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.left = set(range(len(self.condition.words)))

    def tell(self, text: Sequence[int], new: Sequence[int]) -> int | None:
        """Take note of the first word that `new`, behind `text`, tells: its tokens stand there one after another, and
        what follows does not go on with it.

        → where in `new` is the token behind it; what follows that was drawn while the word was asked for. None where
        no word is told
        """
        whole = [*text, *new]
        for behind in range(len(text), len(whole)):
            if whole[behind] in self.condition.go_on:
                continue
            words = {i: self.condition.words[i] for i in self.left}
            told = {i for i, word in words.items() if tuple(whole[max(0, behind - len(word)) : behind]) == word}
            if told:
                self.left -= told
                return behind - len(text)
        return None

    @property
    def nothing(self) -> bool:
        """Whether all is told, and there are no pictures."""
        return not self.left and not len(self.condition.pixels)

    @property
    def hidden(self) -> NDArray[np.bool_]:
        """Of the memory's rows of words, those that are read no more: of told words, at last the one before them, too.

        → (1 + tokens of the words,)
        """
        _, _, words = self.condition.word_rows()
        return np.concatenate([[not self.left], ~np.isin(words, list(self.left))])
