"""Between a request's text and the canvas: what is given comes back verbatim, what does not fit is refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge.decoding.layout_text import Layout, Texts
from host.data.tokenizer import train_tokenizer
from shared.errors import RequestError
from shared.messages import OPEN_POSITION, Gap, GenerateRequest, Part
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, MASK, PAD, SPECIAL_TOKENS

LENGTH = 64
STORIES = ["Once upon a time, Tom had a red ball and it was big.", "Tom and Sue had fun in the park, and it was good."]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As the edge gets it: read from the file, which does not say that control tokens are to be spelled out."""
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(STORIES * 4, 340).save(str(path))
    return Tokenizer.from_file(str(path))


@pytest.fixture(scope="module")
def texts(tokenizer: Tokenizer) -> Texts:
    return Texts(tokenizer, LENGTH)


def infill(*segments: str | int) -> GenerateRequest:
    return GenerateRequest(segments=[Gap(s) if isinstance(s, int) else s for s in segments])


def filled(layout: Layout, tokenizer: Tokenizer, *fillings: str) -> NDArray[np.int32]:
    """The canvas with each text in its gap; a gap must have room for it, what is left over stays open."""
    canvas: NDArray[np.int32] = layout.canvas.copy()
    gaps = [part for part in layout.parts if not isinstance(part, str)]
    for (first, end), filling in zip(gaps, fillings, strict=True):
        ids = tokenizer.encode(filling, add_special_tokens=False).ids
        assert len(ids) <= end - first
        canvas[first : first + len(ids)] = ids
    return canvas


@pytest.mark.parametrize("word", ["dragon", "ice cream"])
def test_word_is_the_same_in_capitals(texts: Texts, tokenizer: Tokenizer, word: str) -> None:
    ids = tuple(tokenizer.encode(f" {word}", add_special_tokens=False).ids)
    assert {texts.word(written) for written in (word, word.capitalize(), word.title(), word.upper())} == {ids}


# --- laying out ------------------------------------------------------------------------------------------------------


def test_lay_out_puts_the_prompt_after_bos_and_leaves_the_rest_open(texts: Texts) -> None:
    layout = texts.lay_out(GenerateRequest(prompt="Once upon a time"))
    n = layout.prompt_tokens
    assert layout.canvas.dtype == np.int32
    assert layout.canvas[0] == BOS
    assert n > 0
    assert (layout.canvas[1 : n + 1] >= FIRST_TEXT_ID).all()
    assert (layout.canvas[n + 1 :] == MASK).all()
    assert layout.fill.tolist() == [False] * (n + 1) + [True] * (LENGTH - n - 1)


def test_lay_out_of_an_empty_prompt_leaves_all_but_bos_open(texts: Texts) -> None:
    layout = texts.lay_out(GenerateRequest(prompt=""))
    assert layout.prompt_tokens == 0
    assert layout.fill.sum() == LENGTH - 1


def test_max_tokens_bounds_what_is_generated(texts: Texts) -> None:
    """Behind the bound lies PAD: the model sees that the text has ended by there."""
    layout = texts.lay_out(GenerateRequest(prompt="Tom", max_tokens=5))
    first = layout.prompt_tokens + 1
    assert np.flatnonzero(layout.fill).tolist() == list(range(first, first + 5))
    assert (layout.canvas[first + 5 :] == PAD).all()
    more_than_fits = texts.lay_out(GenerateRequest(prompt="Tom", max_tokens=1000))
    assert more_than_fits.fill.sum() == LENGTH - first


def test_lay_out_masks_but_does_not_fill_what_follows_an_infill(texts: Texts) -> None:
    layout = texts.lay_out(infill("Tom had a ", 3, "."))
    assert layout.fill.sum() == 3
    assert (layout.canvas[-20:] == MASK).all()
    assert not layout.fill[-20:].any()


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_lay_out_takes_the_name_of_a_control_token_as_text(texts: Texts, name: str) -> None:
    for request in (GenerateRequest(prompt=f"Tom {name}{name} had"), infill(name, 2, f" {name}.")):
        layout = texts.lay_out(request)
        given_ids = layout.canvas[1 : layout.prompt_tokens + 1][~layout.fill[1 : layout.prompt_tokens + 1]]
        assert (given_ids >= FIRST_TEXT_ID).all()
        assert name in texts.read(layout, layout.canvas)


def test_read_takes_a_spelled_control_token_as_text(texts: Texts, tokenizer: Tokenizer) -> None:
    layout = texts.lay_out(infill("Tom", 20))
    spelled = tokenizer.encode(" <MASK><EOS>", add_special_tokens=False).ids
    layout.canvas[layout.fill] = [*spelled, *[PAD] * (20 - len(spelled))]
    assert texts.read(layout, layout.canvas) == "Tom <MASK><EOS>"


# --- refusing --------------------------------------------------------------------------------------------------------


def test_prompt_may_fill_all_but_one_position(texts: Texts) -> None:
    fits = "!" * (LENGTH - 2)
    layout = texts.lay_out(GenerateRequest(prompt=fits))
    assert np.flatnonzero(layout.fill).tolist() == [LENGTH - 1]
    with pytest.raises(RequestError) as refused:
        texts.lay_out(GenerateRequest(prompt=fits + "!"))
    assert refused.value.code == "too_large"
    assert str(refused.value) == "the prompt takes 63 tokens; at most 62 fit on the canvas"


def test_segments_may_fill_the_canvas_and_no_more(texts: Texts) -> None:
    assert texts.lay_out(infill("!", LENGTH - 3, "!")).fill.sum() == LENGTH - 3
    with pytest.raises(RequestError) as refused:
        texts.lay_out(infill("!", LENGTH - 2, "!"))
    assert refused.value.code == "too_large"
    assert str(refused.value) == "the segments with their gaps take 64 tokens; at most 63 fit on the canvas"


def test_text_that_cannot_fit_is_refused_without_cutting_it_into_tokens(texts: Texts) -> None:
    longest = max(map(len, texts._tokenizer.get_vocab()))
    for request in (GenerateRequest(prompt="x" * (LENGTH * longest + 1)), infill("ü" * (LENGTH * longest), 2, "x")):
        with pytest.raises(RequestError, match=f"bytes of text cannot fit on the canvas, which holds {LENGTH}") as told:
            texts.lay_out(request)
        assert told.value.code == "too_large"


def test_segments_without_a_gap_are_refused(texts: Texts) -> None:
    with pytest.raises(RequestError, match="no gap to fill") as refused:
        texts.lay_out(infill("Tom had a ball."))
    assert refused.value.code == "bad_request"


def test_max_tokens_does_not_go_with_segments(texts: Texts) -> None:
    with pytest.raises(RequestError, match="`max_tokens` goes with `prompt`") as refused:
        texts.lay_out(GenerateRequest(segments=["Tom", Gap(3)], max_tokens=4))
    assert refused.value.code == "bad_request"


# --- reading ---------------------------------------------------------------------------------------------------------


def test_read_joins_text_and_gap_with_one_space(texts: Texts, tokenizer: Tokenizer) -> None:
    """The space before a gap is the next word's own; it is neither doubled nor lost."""
    for before, after in (("Tom had a ", " and it was big."), ("Tom had a", " and it was big.")):
        layout = texts.lay_out(infill(before, 3, after))
        canvas = filled(layout, tokenizer, " red")
        canvas[layout.fill & (canvas == MASK)] = tokenizer.encode("!", add_special_tokens=False).ids[0]
        assert texts.read(layout, canvas).replace("!", "") == "Tom had a red and it was big."


def test_lay_out_ignores_a_space_before_a_gap(texts: Texts) -> None:
    np.testing.assert_array_equal(
        texts.lay_out(infill("Tom had a ", 3, ".")).canvas, texts.lay_out(infill("Tom had a", 3, ".")).canvas
    )


@given(st.text(st.characters(codec="utf-8"), max_size=12), st.text(st.characters(codec="utf-8"), max_size=6))
@settings(max_examples=150, deadline=None, database=None, derandomize=True)
def test_given_text_comes_back_verbatim(texts: Texts, first: str, second: str) -> None:
    big = Texts(texts._tokenizer, 512)
    layout = big.lay_out(infill(first, 2, second))
    assert big.read(layout, layout.canvas) == first + 2 * OPEN_POSITION + second
    prompt = big.lay_out(GenerateRequest(prompt=first, max_tokens=1))
    assert big.read(prompt, prompt.canvas) == first + OPEN_POSITION


def test_read_decodes_a_character_of_several_tokens_whole(texts: Texts, tokenizer: Tokenizer) -> None:
    """A byte-level token may be part of a character; a half of one must not raise, nor eat its neighbours."""
    heart = tokenizer.encode("💜", add_special_tokens=False).ids
    assert len(heart) == 4
    layout = texts.lay_out(infill("Tom", 6))
    canvas = layout.canvas.copy()
    where = np.flatnonzero(layout.fill)
    canvas[where] = [*heart, EOS, PAD]
    assert texts.read(layout, canvas) == "Tom💜"
    canvas[where[2]] = MASK
    half = texts.read(layout, canvas)
    assert half.startswith("Tom�")
    assert half.count(OPEN_POSITION) == 1


def test_read_leaves_out_a_character_that_the_last_token_has_only_begun(texts: Texts, tokenizer: Tokenizer) -> None:
    """Where the room ends within it; bytes in the middle that are no character stay visible."""
    heart = tokenizer.encode("💜", add_special_tokens=False).ids
    for begun in (heart[:1], heart[:3]):
        for request in (infill("Tom", len(heart) + len(begun), "."), GenerateRequest(prompt="Tom", max_tokens=8)):
            layout = texts.lay_out(request)
            canvas = layout.canvas.copy()
            where = np.flatnonzero(layout.fill)
            canvas[where] = PAD
            canvas[where[: len(heart) + len(begun)]] = [*heart, *begun]
            assert texts.read(layout, canvas) == "Tom💜" + "." * (request.prompt is None)
    layout = texts.lay_out(infill("Tom", 5, "."))
    canvas = layout.canvas.copy()
    canvas[layout.fill] = [heart[0], *heart]
    assert texts.read(layout, canvas) == "Tom\ufffd💜."


def test_read_marks_each_open_position(texts: Texts, tokenizer: Tokenizer) -> None:
    layout = texts.lay_out(infill("Tom had a ", 4, " and it was ", 3, "."))
    assert texts.read(layout, layout.canvas).count(OPEN_POSITION) == 7
    canvas = filled(layout, tokenizer, " red", "")
    open_now = int((layout.fill & (canvas == MASK)).sum())
    assert texts.read(layout, canvas) == f"Tom had a red{(open_now - 3) * OPEN_POSITION} and it was ░░░."
    prompt = texts.lay_out(GenerateRequest(prompt="Once", max_tokens=6))
    assert texts.read(prompt, prompt.canvas) == "Once░░░░░░"


def test_parts_tell_committed_text_from_drafts(texts: Texts, tokenizer: Tokenizer) -> None:
    red, big = (tokenizer.encode(word, add_special_tokens=False).ids for word in (" red", " big"))
    layout = texts.lay_out(infill("Tom had a ", len(red) + 1, " and it was ", len(big), "."))
    first, second = np.split(np.flatnonzero(layout.fill), [len(red) + 1])
    canvas, draft = layout.canvas.copy(), np.full_like(layout.canvas, MASK)
    canvas[second] = big
    untold = [Part("Tom had a "), Part((len(red) + 1) * "░", draft=True), Part(" and it was big.")]
    assert texts.parts(layout, canvas, draft) == untold
    draft[first] = [*red, EOS]
    told = [Part("Tom had a "), Part("red", draft=True), Part(" and it was big.")]
    assert texts.parts(layout, canvas, draft) == told
    canvas[first[:-1]] = red
    assert texts.parts(layout, canvas, draft) == [Part("Tom had a red and it was big.")]


def test_read_ends_at_the_end_of_the_text(texts: Texts, tokenizer: Tokenizer) -> None:
    layout = texts.lay_out(GenerateRequest(prompt="Tom"))
    canvas = layout.canvas.copy()
    where = np.flatnonzero(layout.fill)
    canvas[where] = PAD
    canvas[where[0]] = EOS
    assert texts.read(layout, canvas) == "Tom"
