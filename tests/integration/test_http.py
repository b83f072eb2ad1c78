"""HTTP with the daemon as its users start it: curl, OpenAI's own client, streams, gaps, errors."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ERROR_CODES
from tests.integration.harness import ROOT, Daemon, Line
from tests.integration.http_client import address_of, ask, complete, events

openai = pytest.importorskip("openai", reason="the client of the extra `dev`")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, debug_bundle: Path) -> Iterator[Daemon]:
    """One daemon for all tests of this file; a step takes it 2 ms."""
    started = Daemon(tmp_path_factory.mktemp("daemon"), debug_bundle, "--backend", "fake:2", "--http", "127.0.0.1:0")
    yield started
    started.close()


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[Any]:
    host, port = address_of(daemon)
    with openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0) as made:
        yield made


def on_the_socket(daemon: Daemon, **fields: Any) -> dict[str, Any]:
    line = Line(daemon.socket)
    try:
        return line.ask(fields)
    finally:
        line.close()


def test_http_completion_is_the_text_of_the_socket_without_its_prompt(daemon: Daemon, client: Any) -> None:
    done = client.completions.create(model="any", prompt="Once upon", max_tokens=12, seed=5)
    same = on_the_socket(daemon, prompt="Once upon", max_tokens=12, seed=5)

    assert "Once upon" + done.choices[0].text == same["text"]
    assert done.model == same["model"] and done.seed == 5
    assert done.object == "text_completion" and done.id.startswith("cmpl-")
    assert done.choices[0].finish_reason == same["finish_reason"]
    assert done.usage.prompt_tokens == same["usage"]["prompt_tokens"]
    assert done.usage.completion_tokens == same["usage"]["generated_tokens"]
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.usage.steps == same["usage"]["steps"]


def test_http_suffix_is_a_gap_of_max_tokens(daemon: Daemon, client: Any) -> None:
    done = client.completions.create(model="any", prompt="Tom had", suffix=" and it was red.", max_tokens=4, seed=5)
    same = on_the_socket(daemon, segments=["Tom had", {"gap": 4}, " and it was red."], seed=5)

    assert "Tom had" + done.choices[0].text + " and it was red." == same["text"]
    assert done.choices[0].finish_reason == "length"


def test_http_segments_give_the_whole_text(daemon: Daemon) -> None:
    segments = ["Tom had ", {"gap": 3}, " and ", {"gap": 2}, "."]
    done = complete(daemon, segments=segments, seed=5).object
    assert done["choices"][0]["text"] == on_the_socket(daemon, segments=segments, seed=5)["text"]


@pytest.mark.parametrize("fields", [{"prompt": "Once upon"}, {"prompt": "Tom had", "suffix": " and it was red."}])
def test_http_stream_adds_up_to_the_text(client: Any, fields: dict[str, str]) -> None:
    whole = client.completions.create(model="any", seed=7, max_tokens=30, **fields)
    options = {"include_usage": True}
    stream = client.completions.create(
        model="any", seed=7, max_tokens=30, stream=True, stream_options=options, **fields
    )
    *pieces, last = list(stream)

    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert len({piece.id for piece in (*pieces, last)}) == 1
    assert last.choices == [] and last.usage == whole.usage


def test_http_stream_by_canvas_adds_up_and_shows_snapshots(daemon: Daemon) -> None:
    fields = {"prompt": "Once upon", "seed": 3, "decode": "canvas", "steps": 100}
    whole = complete(daemon, **fields).object
    *got, (_, done) = events(daemon, snapshots=True, **fields)
    pieces = [json.loads(data) for name, data in got if name == "message"]
    snapshots = [json.loads(data) for name, data in got if name == "snapshot"]

    assert done == "[DONE]"
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole["choices"][0]["text"]
    assert len(snapshots) >= 3
    assert [shown["seq"] for shown in snapshots] == sorted(shown["seq"] for shown in snapshots)
    assert all(shown["text"].startswith("Once upon") and shown["parts"] for shown in snapshots)


def test_http_stream_has_no_snapshots_unless_asked(daemon: Daemon) -> None:
    assert {name for name, _ in events(daemon, prompt="Once upon", decode="canvas", steps=50)} == {"message"}


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"prompt": "a", "logprobs": 3}, "logprobs", "`logprobs` is not supported"),
        ({"prompt": "a", "best_of": 2}, "best_of", "`best_of` is not supported"),
        ({"prompt": "a", "n": 2}, "n", "`n` is not supported"),
        ({"prompt": "a", "echo": True}, "echo", "`echo` is not supported"),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", "`presence_penalty` is not supported"),
        ({"prompt": "a", "sped": 1}, "sped", "unknown field `sped`"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "`max_tokens` must be an integer, at least 1"),
        ({"prompt": "a", "max_tokens": "9"}, "max_tokens", "`max_tokens` must be an integer"),
        ({"prompt": ["a", "b"]}, "prompt", "`prompt` must be text"),
        ({"suffix": "a"}, "suffix", "`suffix` is what follows"),
        ({}, "prompt", "give exactly one of `prompt` and `segments`"),
        ({"prompt": "a", "snapshots": True}, "snapshots", "goes with `stream`"),
        ({"prompt": "a", "window": 2, "steps": 3}, "steps", "`steps` is of decoding by canvas"),
        ({"prompt": "a", "top_k": 10**6}, "top_k", "`top_k` 1000000 is above"),
        ({"segments": ["a", {"gap": 0}]}, "segments", "`segments[1].gap` must be an integer"),
        ({"prompt": "a", "stream": True, "stream_options": {"include_usage": 3}}, "stream_options", "`stream_options."),
    ],
)
def test_http_bad_field_is_named(daemon: Daemon, fields: dict[str, Any], param: str, said: str) -> None:
    answer = complete(daemon, **fields)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error" and answer.error["code"] == "bad_request"
    assert said in answer.error["message"]
    assert answer.error["param"] == param


def test_http_harmless_fields_are_taken(client: Any) -> None:
    done = client.completions.create(
        model="gpt", prompt="a", max_tokens=2, user="me", n=1, best_of=1, echo=False, presence_penalty=0
    )
    assert len(done.choices) == 1


def test_http_openai_client_raises_its_own_errors(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="any", prompt="a", logprobs=1)
    assert (caught.value.code, caught.value.param) == ("bad_request", "logprobs")
    with pytest.raises(openai.APIStatusError) as timed_out:
        client.completions.create(model="any", prompt="a", extra_body={"deadline_ms": 1, "decode": "canvas"})
    assert timed_out.value.status_code == ERROR_CODES["timeout"][0] and timed_out.value.code == "timeout"


def test_http_models_say_what_a_request_may_choose(client: Any, daemon: Daemon) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    assert model.id == complete(daemon, prompt="a", max_tokens=1).object["model"]
    assert model.decoders and model.limits["canvas_tokens"] > 0
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_http_health_is_that_of_the_socket(daemon: Daemon) -> None:
    answer = ask(daemon, "/health")
    assert answer.status == 200
    assert answer.object == on_the_socket(daemon, type="health")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/page/../server.py", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/completions", 405, "method_not_allowed"),
    ],
)
def test_http_wrong_place_is_named(daemon: Daemon, method: str, path: str, status: int, code: str) -> None:
    answer = ask(daemon, path, method=method)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert path.partition("?")[0] in answer.error["message"]


def chat(client: Any, *texts: str, **fields: Any) -> Any:
    """An answer to these messages, of the user and the assistant in turns."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return client.chat.completions.create(**{"model": "any", "messages": messages, "seed": 3, "max_tokens": 8} | fields)


def test_http_chat_goes_on_from_the_last_message(client: Any) -> None:
    text = client.completions.create(model="", prompt="Tom had", seed=3, max_tokens=8)
    answer = chat(client, "Once", " upon a time", "Tom had")
    assert answer.choices[0].message.content == text.choices[0].text
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8 and answer.object == "chat.completion"
    parts = [{"type": "text", "text": "Tom"}, {"type": "text", "text": " had"}]
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": parts}]
    assert chat(client, messages=said).choices[0].message == answer.choices[0].message


def test_http_chat_streams_the_same_text(client: Any) -> None:
    whole = chat(client, "Tom had").choices[0].message.content
    chunks = list(chat(client, "Tom had", stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.delta.content for chunk in chunks for choice in chunk.choices) == whole
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert [choice.finish_reason for choice in chunks[-2].choices] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": []}, "`messages` must be a list of at least 1"),
        ({"messages": [{"role": "tool", "content": "a"}]}, '`messages[0].role` must be one of "assistant"'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            'content[0].type` must be one of "text"',
        ),
        ({"max_completion_tokens": 9}, "`max_tokens` and `max_completion_tokens` differ"),
        ({"n": 2}, "`n` is not supported"),
        ({"tools": []}, "unknown field `tools`: known are `m"),
    ],
)
def test_http_chat_bad_field_is_named(client: Any, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, "Tom had", **fields)
    assert said in caught.value.message and caught.value.code == "bad_request"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_http_curl_works_and_is_told_of_the_content_type(daemon: Daemon) -> None:
    host, port = address_of(daemon)
    command = ["curl", "-s", f"http://{host}:{port}/v1/completions", "-d", '{"prompt": "a", "max_tokens": 2}']
    done = subprocess.run(
        [*command, "-H", "Content-Type: application/json"], check=True, capture_output=True, timeout=30
    )
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 2
    refused = subprocess.run(command, check=True, capture_output=True, timeout=30)
    assert "Content-Type: application/json" in json.loads(refused.stdout)["error"]["message"]


def test_http_page_is_its_own_files_alone(daemon: Daemon) -> None:
    page = ask(daemon, "/")
    assert page.status == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for file in (ROOT / "edge" / "transports" / "http" / "page").iterdir():
        answer = ask(daemon, f"/page/{file.name}")
        assert answer.status == 200 and answer.body == file.read_bytes()
    head = ask(daemon, "/", method="HEAD")
    assert head.body == b"" and head.headers["content-length"] == str(len(page.body))
