"""The client's command line: what its flags ask for."""

import base64
import io
import os
import socket
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from edge import config as config_module
from edge import generate
from edge.config import Config, default_socket
from edge.generate import ask_daemon, build_request, command_line, find_daemon, parse_infill, unwrap
from shared.errors import ConfigError, DiffusionLLMError, RequestError
from shared.messages import ErrorInfo, Gap, GenerateRequest, Response, encode


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("Tom had a ___ and it was ___.", ["Tom had a ", {"gap": None}, " and it was ", {"gap": None}, "."]),
        ("___:6 said Tom", [{"gap": 6}, " said Tom"]),
        ("He said: ___:12", ["He said: ", {"gap": 12}]),
        ("___: yes", [{"gap": None}, ": yes"]),
        ("___ ___", [{"gap": None}, " ", {"gap": None}]),
        ("snake_case and __init__ ___", ["snake_case and __init__ ", {"gap": None}]),
    ],
)
def test_parse_infill_three_underscores_are_a_gap(text: str, segments: list[Any]) -> None:
    assert parse_infill(text) == segments


def test_parse_infill_refuses_a_text_without_a_gap() -> None:
    with pytest.raises(RequestError, match="___"):
        parse_infill("Tom had a ball")


def test_build_request_takes_flags_and_leaves_the_rest_open() -> None:
    flags = ["--seed", "7", "--steps", "8", "--temperature", "0", "--top-p", "0.5", "--top-k", "3", "--max-tokens", "9"]
    request = build_request(command_line().parse_args(["Once", *flags, "--selection", "margin", "--threshold", "0.9"]))
    sent = msgspec.to_builtins(request)
    assert sent == {
        "type": "generate",
        "prompt": "Once",
        "seed": 7,
        "steps": 8,
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 3,
        "max_tokens": 9,
        "selection": "margin",
        "threshold": 0.9,
    }
    assert msgspec.to_builtins(build_request(command_line().parse_args(["x"]))) == {"type": "generate", "prompt": "x"}


def test_build_request_turns_infill_into_segments() -> None:
    request = build_request(command_line().parse_args(["--infill", "a ___:2", "--stream"]))
    assert request.prompt is None and request.segments == ["a ", Gap(2)] and request.stream


def test_build_request_carries_words_and_the_files_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    flags = ["--word", "dragon", "--word", "ice cream", "--image", str(tmp_path / "a.png"), "--guidance", "2"]
    request = build_request(command_line().parse_args(["Once", *flags]))
    assert (request.words, request.guidance) == (["dragon", "ice cream"], 2)
    assert request.images == [base64.b64encode(b"\x89PNG").decode()]


@pytest.mark.parametrize(
    ("size", "sentence"), [(None, "cannot be read"), (60_000, "has 60000 bytes; a picture .* 48128")]
)
def test_build_request_refuses_a_picture_by_its_file(tmp_path: Path, size: int | None, sentence: str) -> None:
    file = tmp_path / "a.png"
    if size is not None:
        file.write_bytes(b"x" * size)
    with pytest.raises(RequestError, match=rf"--image .*a\.png .*{sentence}"):
        build_request(command_line().parse_args(["Once", "--image", str(file)]))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["x", "--top-p", "2"], "top_p"),
        (["x", "--steps", "0"], "steps"),
        (["x", "--temperature", "nan"], "temperature"),
        (["x", "--top-p", "inf"], "top_p"),
        (["x", "--threshold", "1", "--entropy-bound", "1"], "entropy_bound"),
        (["--infill", "a ___:0"], "gap"),
        (["x", "--word", ""], r"words\[0\]"),
        (["x", "--word", "dragon", "--guidance", "6"], "guidance"),
        (["x", "--word", "dragon", "--steps", "8"], "words"),
        (["--infill", "a ___:9999"], "gap"),
        (["\udcff"], "UTF-8"),
    ],
)
def test_build_request_refuses_by_name_what_no_daemon_takes(flags: list[str], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        build_request(command_line().parse_args(flags))


def test_unwrap_raises_the_error_of_an_answer() -> None:
    error = ErrorInfo("queue_full", "come again", retryable=True, retry_after_ms=5)
    with pytest.raises(RequestError, match="come again") as caught:
        unwrap(Response(status="error", error=error))
    assert caught.value.retry_after_ms == 5
    with pytest.raises(DiffusionLLMError, match="of a newer daemon"):
        unwrap(Response(status="error", error=ErrorInfo("unheard_of", "of a newer daemon")))
    assert unwrap(Response(status="ok", text="Once")) == "Once"


def test_unwrap_names_a_picture_by_its_file() -> None:
    refused = Response(status="error", error=ErrorInfo("bad_request", "`images[1]` is neither PNG nor JPEG"))
    with pytest.raises(RequestError, match=r"^--image b\.txt is neither PNG nor JPEG$"):
        unwrap(refused, [Path("a.png"), Path("b.txt")])


def test_find_daemon_takes_the_default_socket_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale, live = tmp_path / "stale", tmp_path / "live"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(stale))
    default = tmp_path / "edgelm-default.sock"
    monkeypatch.setattr(config_module, "socket_candidates", lambda: (default, live))
    monkeypatch.setattr(generate, "socket_candidates", lambda: (default, live))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(live))
        listener.listen()
        found = find_daemon(Config())
        assert found is not None
        found.close()
        with pytest.raises(ConfigError, match=r"no daemon listens at .*stale"):
            find_daemon(Config(socket=stale))  # a named socket stands for no other
        with pytest.raises(ConfigError, match=r"no daemon listens at .*edgelm-.*\.sock"):
            find_daemon(Config(socket=default), named=True)


def test_find_daemon_does_not_trust_a_strangers_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "edgelm.sock"
    monkeypatch.setattr(config_module, "socket_candidates", lambda: (path,))  # no other: a daemon may run here
    monkeypatch.setattr(generate, "socket_candidates", lambda: (path,))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        me = os.getuid()
        if me == 0:
            os.chown(path, 1, -1)
        else:
            monkeypatch.setattr(os, "getuid", lambda: me + 1)
        assert find_daemon(Config(socket=default_socket())) is None


def test_ask_daemon_when_interrupted_at_its_end_is_interrupted() -> None:
    """A signal's exception that meets the closing of the connection is not lost in a destructor."""

    class Interrupted(io.BytesIO):
        def close(self) -> None:
            super().close()
            raise KeyboardInterrupt

    class Connection:
        def sendall(self, data: bytes) -> None:
            pass

        def makefile(self, mode: str) -> io.BytesIO:
            return Interrupted(encode(Response(id="a", status="ok", text="Tom")) + b"\n")

    with pytest.raises(KeyboardInterrupt):
        ask_daemon(cast(socket.socket, Connection()), GenerateRequest(prompt="a"), lambda partial: None)
