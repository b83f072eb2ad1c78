"""A word that a text has told is asked for no more: when it is told, and what is read from then on."""

from pathlib import Path

import numpy as np
import pytest

from edge.backends.fake import FakeBackend
from edge.decoding.blocks import Law, Slot, Writing, advance, keep
from edge.decoding.conditions import Condition, Remaining
from shared.manifest import read_manifest
from shared.tokens import BOS, FIRST_TEXT_ID, MASK, words_go_on

NO_PICTURES = np.zeros((0, 64, 64, 3), np.uint8)
A_PICTURE = np.zeros((1, 64, 64, 3), np.uint8)
WORDS = ((7,), (8, 9))


@pytest.mark.parametrize(
    ("text", "new", "behind", "left"),
    [
        ([], [5, 7, 6], 2, {1}),
        ([5, 7], [6, 5], 0, {1}),
        ([], [5, 7], None, {0, 1}),
        ([], [7, 20, 6], None, {0, 1}),
        ([], [7, 2], 1, {1}),
        ([5, 8], [9, 7, 6], 1, {0}),
        ([9], [8, 5, 9, 6], None, {0, 1}),
        ([8], [8, 8, 9, 20, 8, 9, 21], None, {0, 1}),
        ([], [8, 9, 5, 7, 6], 2, {0}),
    ],
)
def test_word_is_told_by_the_token_behind_it_unless_that_goes_on_with_it(
    text: list[int], new: list[int], behind: int | None, left: set[int]
) -> None:
    """20 and 21 go on with a word."""
    remaining = Remaining(Condition(WORDS, NO_PICTURES, 1.0, frozenset({20, 21})))
    assert remaining.tell(text, new) == behind
    assert remaining.left == left and not remaining.nothing


def test_tokens_that_go_on_with_a_word_are_those_that_begin_with_a_letter_or_digit() -> None:
    pieces = {"<EOS>": 2, "Ġham": 5, "mer": 6, "s": 7, "'": 8, ".": 9, "Ċ": 10, "Ġ": 11, "3": 12, "Ã": 13}
    assert words_go_on(pieces) == {6, 7, 12}


def test_told_words_are_hidden_one_by_one_and_nothing_is_left_behind_the_last() -> None:
    """Row 0 stands before the words, and goes with the last of them; a picture stays."""
    remaining = Remaining(Condition(WORDS, NO_PICTURES, 1.0))
    assert remaining.hidden.tolist() == [False, False, False, False]
    remaining.tell([8], [9, 5])
    assert remaining.hidden.tolist() == [False, False, True, True] and not remaining.nothing
    remaining.tell([], [7, 5])
    assert remaining.hidden.tolist() == [True] * 4 and remaining.nothing
    beside = Remaining(Condition(((7,),), A_PICTURE, 1.0))
    beside.tell([], [7, 5])
    assert beside.hidden.tolist() == [True, True] and not beside.nothing


def test_same_word_asked_for_twice_is_told_once() -> None:
    remaining = Remaining(Condition(((7,), (7,)), NO_PICTURES, 1.0))
    remaining.tell([], [7, 5])
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
    asked = np.where(places <= second + 1, sum(words), 0)  # the token behind the last word tells it
    assert canvas[first] == words[0] and canvas[second] == words[1]
    np.testing.assert_array_equal(canvas[1:], FIRST_TEXT_ID + (31 * places + asked) % ids)
    assert w.remaining is None and w.slot.condition is None
    assert (w.passes < 39) == (window > 0)


def writing(words: tuple[tuple[int, ...], ...], fill: list[bool]) -> Writing:
    canvas = np.where(fill, MASK, 30).astype(np.int32)
    canvas[0] = BOS
    made = Writing(canvas, np.array(fill), False, Law(0, 0.0, 64, 1.0, 3), 64)
    made.slot, made.remaining = Slot(np.zeros(64, np.int32), None), Remaining(Condition(words, NO_PICTURES, 0.0))
    return made


def test_word_of_three_tokens_is_told_over_passes() -> None:
    w = writing(((7, 8, 9),), [False] + [True] * 9)
    for drawn in ([7], [8], [9]):
        assert keep(w, drawn)[2] is False
    w.drafts = [5, 6]
    assert keep(w, [5, 6, 4]) == (0, True, True), "the drafts agree, and are drawn anew"
    assert w.canvas[1:6].tolist() == [7, 8, 9, 5, MASK] and w.slot is not None and w.slot.cached == 4


def test_word_is_not_told_by_tokens_of_two_gaps_or_of_the_given_text() -> None:
    w = writing(((7, 8), (30, 5)), [False, True, False, True, True, True, False])
    assert keep(w, [7])[2] is False  # the first gap is full
    assert keep(w, [8])[2] is False and keep(w, [5])[2] is False and keep(w, [6])[2] is False
    assert w.done and w.remaining is not None and w.remaining.left == {0, 1}
