"""Stop strings in a text that grows by any pieces."""

from hypothesis import given
from hypothesis import strategies as st

from edge.decoding.stops import begun, stop_at

letters = st.text("ab", max_size=12)
stops = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


def test_stop_at_is_the_first_of_all() -> None:
    assert stop_at("one two three", ["three", "two"]) == 4
    assert stop_at("one two three", ["four"]) is None


def test_stop_at_is_the_one_that_is_whole_first() -> None:
    """Even where another began before it: who reads as the text grows knows of no other."""
    assert stop_at("abcdef", ["bcdef", "cd"]) == 2
    assert stop_at("abcdef", ["bcd", "cd"]) == 1, "of two that end there, the longer"


def test_begun_is_the_longest_beginning_at_the_end() -> None:
    assert begun("abcab", ["abx", "bcabz"]) == 4
    assert begun("abc", ["abc"]) == 0
    assert begun("", ["a"]) == 0


@given(letters, stops, st.integers(1, 5))
def test_stops_do_not_depend_on_the_pieces_that_a_text_grows_by(text: str, found: list[str], piece: int) -> None:
    for size in range(0, len(text) + piece, piece):
        if (at := stop_at(text[:size], found)) is not None:
            assert at == stop_at(text, found)
            return
    assert stop_at(text, found) is None


@given(letters, stops)
def test_stops_what_is_shown_of_a_growing_text_is_a_beginning_of_its_end(text: str, found: list[str]) -> None:
    at = stop_at(text, found)
    ended = text if at is None else text[:at]
    for size in range(len(text) + 1):
        seen = text[:size]
        if stop_at(seen, found) is None:
            assert ended.startswith(seen[: len(seen) - begun(seen, found)])
