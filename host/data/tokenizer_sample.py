"""The text a tokenizer is trained on: spread evenly over a stream of unknown length, bounded in size and words."""

from collections.abc import Iterable
from typing import Final

SAMPLE_BYTES: Final = 100_000_000
DISTINCT_WORD_BYTES: Final = 8_000_000
"""BPE training takes about 100 bytes of memory for each byte of distinct words, of which text without spaces or random
text has many. The limit keeps the trainer below 1 GB."""


class SpreadSample:
    """Every `stride`-th text of a stream; the stride doubles whenever the texts outgrow `limit_bytes`."""

    def __init__(self, limit_bytes: int = SAMPLE_BYTES) -> None:
        self.texts: list[str] = []
        self.stride = 1
        self._seen = 0
        self._limit_bytes = limit_bytes
        self._size_bytes = 0

    def offer(self, text: str) -> None:
        """Show the next text of the stream."""
        self._seen += 1
        if (self._seen - 1) % self.stride:
            return
        self.texts.append(text)
        self._size_bytes += len(text.encode())
        while self._size_bytes > self._limit_bytes and len(self.texts) > 1:
            self.texts = self.texts[::2]  # what stays are the multiples of the doubled stride
            self.stride *= 2
            self._size_bytes = sum(len(kept.encode()) for kept in self.texts)


def with_few_words(texts: list[str], limit_bytes: int = DISTINCT_WORD_BYTES) -> list[str]:
    """Every second, fourth, ... text, until their distinct words (between blanks) take at most `limit_bytes`."""
    while len(texts) > 1 and _distinct_words_exceed(texts, limit_bytes):
        texts = texts[::2]
    return texts


def _distinct_words_exceed(texts: Iterable[str], limit_bytes: int) -> bool:
    words: set[str] = set()
    size_bytes = 0
    for text in texts:
        new = set(text.split()) - words
        words |= new
        size_bytes += sum(len(word.encode()) for word in new)
        if size_bytes > limit_bytes:
            return True
    return False
