"""A word that a text has told is asked for no more: when it is told, and what is read from then on."""

from pathlib import Path

import numpy as np
import pytest

from edge.backends.fake import FakeBackend
from edge.decoding.blocks import Law, Writing, advance
from edge.decoding.conditions import Condition, Remaining
from shared.manifest import read_manifest
from shared.tokens import BOS, FIRST_TEXT_ID, MASK

NO_PICTURES = np.zeros((0, 64, 64, 3), np.uint8)
A_PICTURE = np.zeros((1, 64, 64, 3), np.uint8)
WORDS = ((7,), (8, 9))


@pytest.mark.parametrize(
    ("text", "new", "told", "left"),
    [
        ([], [5, 7, 6], 1, {1}),
        ([5, 7], [6, 5], None, {0, 1}),
        ([5, 8], [9, 7], 0, {0}),
        ([9], [8, 5, 9], None, {0, 1}),
        ([], [8, 9, 7], 1, {0}),
        ([8], [8, 8, 9], 2, {0}),
    ],
)
def test_word_is_told_where_its_last_token_stands_behind_the_others(
    text: list[int], new: list[int], told: int | None, left: set[int]
) -> None:
    remaining = Remaining(Condition(WORDS, NO_PICTURES, 1.0))
    assert remaining.first_told(text, new) == told
    assert remaining.left == left and not remaining.nothing


def test_told_words_are_hidden_one_by_one_and_nothing_is_left_behind_the_last() -> None:
    """Row 0 stands before the words, and goes with the last of them; a picture stays."""
    remaining = Remaining(Condition(WORDS, NO_PICTURES, 1.0))
    assert remaining.hidden.tolist() == [False, False, False, False]
    remaining.first_told([8], [9])
    assert remaining.hidden.tolist() == [False, False, True, True] and not remaining.nothing
    remaining.first_told([], [7])
    assert remaining.hidden.tolist() == [True] * 4 and remaining.nothing
    beside = Remaining(Condition(((7,),), A_PICTURE, 1.0))
    beside.first_told([], [7])
    assert beside.hidden.tolist() == [True, True] and not beside.nothing


def test_same_word_asked_for_twice_is_told_once() -> None:
    remaining = Remaining(Condition(((7,), (7,)), NO_PICTURES, 1.0))
    remaining.first_told([], [7])
    assert remaining.nothing


@pytest.mark.parametrize("window", [0, 1, 2, 3])
def test_text_behind_a_told_word_does_not_depend_on_drafts(blocks_bundle: Path, window: int) -> None:
    """All of the fake's drafts hold, so a word is told in the middle of a pass. Token 31 p + the condition's number."""
    manifest = read_manifest(blocks_bundle)
    backend = FakeBackend(manifest)
    ids, first, second = manifest.model.vocab_size - FIRST_TEXT_ID, 6, 15
    words = [FIRST_TEXT_ID + (-2 * FIRST_TEXT_ID - 31 * p) % ids for p in (second, first)]  # each at the other's place
    canvas = np.full(40, MASK, np.int32)
    canvas[0] = BOS
    condition = Condition(((words[0],), (words[1],)), NO_PICTURES, 0.0)
    w = Writing(canvas, canvas == MASK, True, Law(0, 0.0, 64, 1.0, window), manifest.model.vocab_size)
    w.slot, w.condition = backend.open_slot(), condition
    while not w.done:
        advance(backend, w)
    places = np.arange(1, 40)
    asked = np.where(places <= second, sum(words), 0)
    assert canvas[first] == words[0] and canvas[second] == words[1]
    np.testing.assert_array_equal(canvas[1:], FIRST_TEXT_ID + (31 * places + asked) % ids)
    assert w.remaining is None and w.slot.condition is None
    assert (w.passes < 39) == (window > 0)
