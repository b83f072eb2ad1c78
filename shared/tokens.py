"""Special tokens: the same ids in every vocabulary, for graphs, tokenizers and decoding loops."""

from collections.abc import Mapping
from typing import Final

PAD: Final = 0
BOS: Final = 1
EOS: Final = 2
MASK: Final = 3

SPECIAL_TOKENS: Final = ("<PAD>", "<BOS>", "<EOS>", "<MASK>")
"""In id order. Byte-level BPE spells every byte, so there is no UNK."""

FIRST_TEXT_ID: Final = len(SPECIAL_TOKENS)
"""First id of text; smaller ids are control tokens, which no prompt can produce."""

CANVAS_LEN: Final = 256
"""Positions of a canvas in training; the edge takes the number from the bundle's manifest."""


def words_go_on(pieces: Mapping[str, int]) -> frozenset[int]:
    """Ids of the tokens of a byte-level BPE that go on with the word before them: they begin with a letter or digit.

    What begins a word begins with a space, spelt Ġ.
    """
    return frozenset(token for piece, token in pieces.items() if piece[0].isascii() and piece[0].isalnum())
