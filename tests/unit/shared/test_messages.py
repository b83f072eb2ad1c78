"""What a daemon accepts: decoding, bounds, and refusals that name the field."""

from typing import Any

import msgspec
import pytest

from shared.errors import ERROR_CODES, RequestError
from shared.manifest import MAX_STEPS, MAX_WINDOW
from shared.messages import (
    MAX_DEADLINE_MS,
    MAX_GAP,
    MAX_MESSAGE_BYTES,
    MAX_SEGMENTS,
    Gap,
    GenerateRequest,
    HealthRequest,
    decode_line,
    decode_request,
    encode,
    error_response,
    id_of,
)


def refusal(payload: bytes) -> RequestError:
    """The error that a line is refused with."""
    with pytest.raises(RequestError) as caught:
        decode_line(payload)
    return caught.value


def line(**fields: Any) -> bytes:
    return msgspec.json.encode({"prompt": "x"} | fields)


def test_request_needs_only_a_prompt() -> None:
    assert decode_request(b'{"prompt": "Once"}') == GenerateRequest(prompt="Once")


def test_segments_mix_texts_and_gaps() -> None:
    request = decode_request(b'{"segments": ["Tom had a ", {"gap": 4}, "."]}')
    assert request.segments == ["Tom had a ", Gap(4), "."]


def test_request_is_encoded_without_its_defaults() -> None:
    assert encode(GenerateRequest(prompt="x", seed=0)) == b'{"type":"generate","prompt":"x","seed":0}'


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b'{"prompt": "x"}', GenerateRequest(prompt="x")),
        (b'{"type": "generate", "prompt": "x"}', GenerateRequest(prompt="x")),
        (b'{"type": "health"}', HealthRequest()),
    ],
)
def test_line_without_a_type_is_a_generate_request(payload: bytes, expected: GenerateRequest | HealthRequest) -> None:
    assert decode_line(payload) == expected


BOUNDS: list[tuple[str, list[Any], list[Any]]] = [
    ("id", ["a", "a" * 128, "ümläut 1"], ["", "a" * 129, "a/b", "a+", "#", "a\n", "\0", 1]),
    ("prompt", ["", "<MASK>"], [7]),
    ("max_tokens", [1, MAX_GAP], [0, MAX_GAP + 1, 1.5]),
    ("decode", ["blocks", "canvas"], ["diffusion", 1]),
    ("window", [0, MAX_WINDOW], [-1, MAX_WINDOW + 1]),
    ("steps", [1, MAX_STEPS], [0, MAX_STEPS + 1, "8"]),
    ("selection", ["confidence", "random", "margin", "entropy"], ["best"]),
    ("temperature", [0, 0.7, 10], [-0.1, 10.1]),
    ("top_k", [1], [0]),
    ("top_p", [1e-6, 1], [0, 1.01]),
    ("threshold", [1e-6, 1], [0, 1.01]),
    ("entropy_bound", [0, 1000], [-1, 1001]),
    ("words", [["dragon"], ["ice cream", "café", "l'eau", "T-shirt", "7"]], [[], "dragon", ["a"] * 9]),
    ("images", [["YQ=="], ["attachment:card"]], [[], "YQ==", ["YQ=="] * 9]),
    ("seed", [0, 2**63 - 1], [-1, 2**63]),
    ("stream", [True, False], [1, "yes"]),
    ("deadline_ms", [1, MAX_DEADLINE_MS], [0, MAX_DEADLINE_MS + 1]),
    ("response_topic", ["a" * 1024], ["a" * 1025]),
]


def test_bounds_table_has_every_field() -> None:
    assert {name for name, _, _ in BOUNDS} == set(GenerateRequest.__struct_fields__) - {"segments", "guidance", "stop"}


@pytest.mark.parametrize(("field", "inside", "outside"), BOUNDS, ids=[name for name, _, _ in BOUNDS])
def test_fields_are_bounded_and_refused_by_name(field: str, inside: list[Any], outside: list[Any]) -> None:
    for value in inside:
        assert getattr(decode_request(line(**{field: value})), field) == value
    for value in outside:
        error = refusal(line(**{field: value}))
        assert error.code == "bad_request"
        assert f"`{field}` must be " in str(error)


@pytest.mark.parametrize("guidance", [-0.1, 5.1, "2"])
def test_guidance_is_bounded(guidance: object) -> None:
    assert decode_request(line(words=["dragon"], guidance=5)).guidance == 5
    sentence = str(refusal(line(words=["dragon"], guidance=guidance)))
    assert "`guidance` must be a number, at least 0 and at most 5" in sentence


@pytest.mark.parametrize(
    "word", ["", " ", "a ", " a", "a  b", "\n", "a\0", "...", "a,b", "-a", "_", "a" * 33, "<MASK>", "\u200b", 7]
)
def test_words_that_are_none_are_refused_by_their_number(word: object) -> None:
    error = refusal(line(words=["dragon", word]))
    assert error.code == "bad_request"
    assert "`words[1]` must be a word: 1 to 32 letters and digits" in str(error)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"words": ["dragon"], "steps": 8}, "`steps` is of decoding by canvas, `words` by blocks"),
        ({"images": ["YQ=="], "threshold": 0.9}, "`threshold` is of decoding by canvas, `images` by blocks"),
        ({"words": ["dragon"], "decode": "canvas"}, "`words` is of decoding by blocks: leave it out, or `decode`"),
        ({"guidance": 1}, "`guidance` goes with `words` or `images`"),
    ],
)
def test_conditions_that_contradict_the_rest_are_refused(fields: dict[str, Any], sentence: str) -> None:
    assert sentence in str(refusal(line(**fields)))


def test_conditions_ask_for_blocks() -> None:
    assert decode_request(line(words=["dragon"])).decoder == "blocks"
    assert decode_request(line(images=["YQ=="])).conditioned and not decode_request(line()).conditioned


@pytest.mark.parametrize(
    ("segments", "place"),
    [
        ([], "`segments`"),
        (["x"] * (MAX_SEGMENTS + 1), "`segments`"),
        ([7], "`segments[0]`"),
        (["x", {"gap": 0}], "`segments[1].gap`"),
        ([{"gap": MAX_GAP + 1}], "`segments[0].gap`"),
        ([{"hole": 3}], "unknown field `hole` in `segments[0]`: known are `gap`"),
    ],
)
def test_impossible_segments_are_refused_with_their_place(segments: list[Any], place: str) -> None:
    error = refusal(msgspec.json.encode({"segments": segments}))
    assert error.code == "bad_request"
    assert place in str(error)


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        (b"", "Input data was truncated"),
        (b'{"prompt": "x"', "Input data was truncated"),
        (b'{"prompt": "x"} {}', "trailing characters"),
        (b"Once upon a time", "malformed"),
        (b"[]", "the message must be an object, not []"),
        (b'{"prompt": "\xff"}', "the message is not UTF-8"),
        (b'{"prompt": ' + b"[" * 60_000, "recursion"),
        (b'{"prompt": "x", "promt": "y"}', "unknown field `promt`: known are `id`, `prompt`, "),
        (b'{"type": "health", "prompt": "x"}', "unknown field `prompt`: known are none"),
        (b'{"type": "stop"}', 'unknown type \'stop\': send "generate", "cancel" or "health"'),
        (b'{"type": 1}', "`type` must be text, not 1"),
        (
            b'{"prompt": "x", "seed": -1}',
            "`seed` must be an integer, at least 0 and at most 9223372036854775807, not -1",
        ),
        (
            b'{"prompt": "x", "selection": "best"}',
            '`selection` must be one of "confidence", "entropy", "margin", "random", not "best"',
        ),
        (b'{"prompt": "x", "top_p": 0}', "`top_p` must be a number, above 0 and at most 1, not 0"),
        (b'{"prompt": "x", "temperature": 1e999}', "`temperature` must be a number, at least 0 and at most 10"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "an integer is out of range"),
        (b'{"prompt": "x", "id": "a/b"}', "`id` must be 1 to 128 characters without `/`, `+`, `#` and control char"),
        (b'{"prompt": "x", "stream": 1}', "`stream` must be true or false, not 1"),
        (b'{"segments": [{}]}', "`segments[0]` lacks the field `gap`"),
        (b'{"segments": []}', "`segments` must be a list of at least 1 and at most 64 items, not []"),
        (b"{}", "give exactly one of `prompt` and `segments`"),
        (b'{"prompt": "x", "segments": ["x"]}', "give exactly one of `prompt` and `segments`"),
        (b'{"prompt": "x", "threshold": 1, "entropy_bound": 1}', "at most one of `threshold` and `entropy_bound`"),
    ],
)
def test_bad_lines_are_refused_with_one_sentence(payload: bytes, sentence: str) -> None:
    error = refusal(payload)
    assert error.code == "bad_request"
    assert sentence in str(error)
    assert "\n" not in str(error)


def test_message_may_fill_its_bytes_and_no_more() -> None:
    frame = len(line(prompt=""))
    assert decode_line(line(prompt="x" * (MAX_MESSAGE_BYTES - frame)))
    error = refusal(line(prompt="x" * (MAX_MESSAGE_BYTES - frame + 1)))
    assert error.code == "too_large"
    assert f"{MAX_MESSAGE_BYTES + 1}" in str(error)


def test_decode_request_takes_generate_requests_only() -> None:
    with pytest.raises(RequestError, match="type"):
        decode_request(b'{"type": "health"}')


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b'{"id": "a", "promt": "x"}', "a"),
        (b'{"id": "a", "prompt": 7, "steps": [[]]}', "a"),
        (b'{"prompt": "x"}', None),
        (b'{"id": "a/b", "prompt": "x"}', None),
        (b'{"id": 7}', None),
        (b'{"id": "a", "prompt": "x', None),
        (b'{"id": "\xff"}', None),
        (b'{"id": "a", "prompt": ' + b"[" * 60_000, None),
        (b"[]", None),
    ],
)
def test_id_of_a_refused_request_is_kept_where_readable(payload: bytes, expected: str | None) -> None:
    assert id_of(payload) == expected


@pytest.mark.parametrize("code", ERROR_CODES)
def test_error_response_is_the_terminal_answer(code: str) -> None:
    response = error_response(RequestError(code, "because", retry_after_ms=50), "a")
    assert response.id == "a"
    assert response.status == ("cancelled" if code == "cancelled" else "error")
    assert response.text is None
    assert response.error is not None
    assert (response.error.code, response.error.message) == (code, "because")
    assert (response.error.retryable, response.error.retry_after_ms) == (ERROR_CODES[code][1], 50)
