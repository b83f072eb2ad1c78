"""Byte-level BPE, and stories as canvases: BOS, text, EOS, PAD to the end; a story cut at the end has no EOS."""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from shared.errors import DataError
from shared.tokens import BOS, CANVAS_LEN, EOS, FIRST_TEXT_ID, PAD, SPECIAL_TOKENS

MIN_VOCAB_SIZE: Final = FIRST_TEXT_ID + 256  # control tokens and every byte
MAX_VOCAB_SIZE: Final = 1 << 16  # ids are stored as uint16
MAX_TOKEN_BYTES: Final = 32
NO_TEMPLATE: Final = b'"post_processor": null'
BOS_TEMPLATE: Final = (
    b'"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<BOS>", "type_id": 0}}, '
    b'{"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, '
    b'{"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {"<BOS>": {"id": "<BOS>", "ids": [1], '
    b'"tokens": ["<BOS>"]}}}'
)
"""Makes the Hugging Face libraries begin a text with BOS; in this project the caller adds it."""


def head(text: str, canvas_len: int = CANVAS_LEN) -> str:
    """The beginning of a story that can reach its canvas, since no token has more than MAX_TOKEN_BYTES bytes."""
    return text[: canvas_len * MAX_TOKEN_BYTES]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE with the control tokens at ids 0 to 3.

    vocab_size: control tokens and bytes included; little text may yield fewer. Merges stay inside a pre-token, and no
    pre-token mixes letters with brackets, so that the text "<MASK>" never becomes one token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read tokenizer.json, and set what the file does not keep: control tokens in a text are encoded as text.

    Raises DataError when the file is missing, is not a tokenizer, or has other control tokens.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} cannot be read as a tokenizer: {error}") from None
    if [tokenizer.id_to_token(i) for i in range(FIRST_TEXT_ID)] != list(SPECIAL_TOKENS):
        raise DataError(f"{path} does not have the control tokens {' '.join(SPECIAL_TOKENS)} at its first ids")
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokenizer_with_bos(plain: bytes) -> bytes:
    """A tokenizer.json that begins every text with BOS; DataError when it has a template of its own."""
    if plain.count(NO_TEMPLATE) != 1:
        raise DataError("the tokenizer has a post-processor of its own: it cannot be given one that begins with BOS")
    return plain.replace(NO_TEMPLATE, BOS_TEMPLATE)


def plain_tokenizer(file: Path) -> bytes:
    """The tokenizer.json that a run was trained with, also of a published folder; DataError when it cannot be read."""
    try:
        return file.read_bytes().replace(BOS_TEMPLATE, NO_TEMPLATE)
    except OSError as error:
        raise DataError(f"{file} cannot be read as a tokenizer: {error.strerror}") from None


def identity_of(file: Path) -> str:
    """SHA-256 of the tokenizer that `file` holds, the same before and after it was published."""
    return hashlib.sha256(plain_tokenizer(file)).hexdigest()


def encode_stories(tokenizer: Tokenizer, texts: Sequence[str], canvas_len: int = CANVAS_LEN) -> np.ndarray:
    """One canvas a story.  → (len(texts), canvas_len) uint16"""
    canvases = np.full((len(texts), canvas_len), PAD, dtype=np.uint16)
    canvases[:, 0] = BOS
    encodings = tokenizer.encode_batch_fast([head(text, canvas_len) for text in texts], add_special_tokens=False)
    for canvas, encoding in zip(canvases, encodings, strict=True):
        ids = encoding.ids
        kept = min(len(ids), canvas_len - 1)
        canvas[1 : 1 + kept] = ids[:kept]
        if 1 + kept < canvas_len:
            canvas[1 + kept] = EOS
    return canvases


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each id spells, 0 for control tokens.  → (vocabulary,) int64"""
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, token_id in tokenizer.get_vocab().items():
        if token_id >= FIRST_TEXT_ID:
            lengths[token_id] = len(token)  # the byte-level alphabet spells each byte as one character
    return lengths
