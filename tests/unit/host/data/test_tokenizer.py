"""The tokenizer: control tokens only where we put them, every text comes back as it was, one canvas a story."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from host.data.tokenizer import (
    MAX_TOKEN_BYTES,
    encode_stories,
    load_tokenizer,
    token_byte_lengths,
    train_tokenizer,
)
from host.data.tokenizer_sample import SpreadSample, with_few_words
from shared.errors import DataError
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, PAD, SPECIAL_TOKENS

LITERALS = "<PAD><BOS><EOS><MASK> <MASK> <|endoftext|>"
TEXTS = ["Once upon a time, there was a cat.", "The cat said: naïve ☃!", LITERALS] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 320)


def text_ids(canvas: np.ndarray) -> list[int]:
    return [int(i) for i in canvas if i not in (PAD, BOS, EOS)]


def test_tokenizer_gives_control_tokens_the_first_ids_and_each_byte_a_token(tokenizer: Tokenizer) -> None:
    assert [tokenizer.id_to_token(i) for i in range(FIRST_TEXT_ID)] == list(SPECIAL_TOKENS)
    assert (token_byte_lengths(tokenizer) == 1).sum() == 256


def test_tokenizer_takes_control_tokens_of_a_text_as_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(LITERALS).ids
    assert min(ids) >= FIRST_TEXT_ID
    assert tokenizer.decode(ids) == LITERALS


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_tokenizer_decodes_what_it_encoded(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert token_byte_lengths(tokenizer)[ids].sum() == len(text.encode())


def test_canvas_is_bos_text_eos_pad(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The cat").ids
    canvas = encode_stories(tokenizer, ["The cat"])[0]
    assert canvas.dtype == np.uint16
    assert canvas.tolist() == [BOS, *ids, EOS] + [PAD] * (256 - 2 - len(ids))


@pytest.mark.parametrize(("text_tokens", "last"), [(253, PAD), (254, EOS), (255, None), (400, None)])
def test_canvas_of_a_story_cut_at_the_end_has_no_eos(tokenizer: Tokenizer, text_tokens: int, last: int | None) -> None:
    text = "\x01" * text_tokens  # a byte no merge knows: one token each
    canvas = encode_stories(tokenizer, [text])[0]
    assert canvas[-1] == (canvas[1] if last is None else last)
    assert tokenizer.decode(text_ids(canvas)) == text[:255]


def test_canvas_of_a_long_text_is_that_of_its_head() -> None:
    dashes = train_tokenizer(["-" * 4096] * 50, 320)
    assert 8 < max(token_byte_lengths(dashes)) <= MAX_TOKEN_BYTES
    canvas = encode_stories(dashes, ["-" * 100_000])[0]
    assert canvas[1:].tolist() == dashes.encode("-" * 100_000).ids[:255]
    assert EOS not in canvas


def test_canvas_is_the_same_encoded_alone_and_together(tokenizer: Tokenizer) -> None:
    together = encode_stories(tokenizer, TEXTS[:3])
    assert np.array_equal(together, np.stack([encode_stories(tokenizer, [text])[0] for text in TEXTS[:3]]))


def test_tokenizer_loaded_takes_control_tokens_as_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.encode(LITERALS).ids == tokenizer.encode(LITERALS).ids


def test_tokenizer_file_of_another_kind_is_refused_by_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(path)
    path.write_text(tokenizer.to_str().replace("<BOS>", "<S>"))
    with pytest.raises(DataError, match=r"does not have the control tokens <PAD> <BOS> <EOS> <MASK>"):
        load_tokenizer(path)


def test_tokenizer_trained_twice_is_the_same() -> None:
    assert train_tokenizer(TEXTS, 300).to_str() == train_tokenizer(TEXTS, 300).to_str()


def test_sample_is_bounded_and_spread_over_the_whole_stream() -> None:
    sample = SpreadSample(limit_bytes=1000)
    for number in range(10_000):
        sample.offer(f"{number:05d}")
    numbers = [int(text) for text in sample.texts]
    assert 500 <= 5 * len(numbers) <= 1000
    assert numbers == list(range(0, 10_000, sample.stride))


def test_sample_of_distinct_words_is_thinned_out() -> None:
    letters = random.Random(0)
    distinct = ["".join(letters.choices("abcdefgh", k=100)) for _ in range(64)]
    assert len(with_few_words(distinct, limit_bytes=1600)) == 16
    assert with_few_words(["the same words"] * 64, limit_bytes=1600) == ["the same words"] * 64
