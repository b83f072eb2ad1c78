"""Special tokens: fixed ids in every vocabulary, so that graphs, tokenizers and loops agree without asking."""

from typing import Final

PAD: Final = 0
BOS: Final = 1
EOS: Final = 2
MASK: Final = 3

SPECIAL_TOKENS: Final = ("<PAD>", "<BOS>", "<EOS>", "<MASK>")
"""In id order. Byte-level BPE spells every byte, so there is no UNK."""

FIRST_TEXT_ID: Final = len(SPECIAL_TOKENS)
"""Ids from here on are text; ids below are control tokens that no prompt can produce."""

CANVAS_LEN: Final = 256
"""Positions of a canvas, of whatever is trained here; at the edge a bundle's manifest says it."""
