"""Words and pictures over the real daemon: what a text is to tell of, what is refused, and what a restart keeps."""

import base64
import json
import signal
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest

from edge.decoding.pictures import MAX_PICTURE_BYTES
from tests.integration.harness import Broker, Daemon, Listener, run_module, until
from tests.support.picture_files import picture, picture_file

REQUEST: Final = "edgelm/dev/request/generate"
ASKED: Final = {"prompt": "a", "seed": 3, "max_tokens": 40}
CONDITIONS: Final[dict[str, dict[str, Any]]] = {
    "a word": {"words": ["dragon"]},
    "three words": {"words": ["dragon", "cake", "red"]},
    "a picture": {"images": [picture(1)]},
    "three pictures": {"images": [picture(1), picture(2), picture(3, kind="JPEG", size=(200, 90))]},
    "both, guided": {"words": ["dragon"], "images": [picture(1)], "guidance": 2},
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, conditioned_bundle: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("daemon"), conditioned_bundle, "--backend", "ort")
    yield daemon
    daemon.close()


def maps(daemon: Daemon) -> str:
    return Path(f"/proc/{daemon.process.pid}/maps").read_text()


def test_conditions_cost_a_daemon_nothing_before_the_first(tmp_path: Path, conditioned_bundle: Path) -> None:
    daemon = Daemon(tmp_path, conditioned_bundle, "--backend", "ort")
    try:
        line = daemon.line()
        assert line.ask(ASKED)["status"] == "ok" and line.ask(ASKED | {"words": ["dragon"]})["status"] == "ok"
        assert "PIL" not in maps(daemon)
        assert line.ask(ASKED | {"images": [picture(1)]})["status"] == "ok"
        assert "PIL" in maps(daemon)
    finally:
        daemon.close()


def test_conditions_change_the_text_and_windows_and_streaming_do_not(daemon: Daemon) -> None:
    line, texts = daemon.line(), {line_ask(daemon, ASKED)["text"]}
    for condition in CONDITIONS.values():
        whole = line.ask(ASKED | condition)
        assert whole["status"] == "ok", whole
        texts.add(whole["text"])
        for window in (0, 1):
            assert line.ask(ASKED | condition | {"window": window})["text"] == whole["text"]
        line.send(ASKED | condition | {"stream": True})
        grown = ASKED["prompt"]
        while (reply := line.read()) is not None and reply["type"] == "partial":
            grown += reply["appended"]
        assert reply is not None and reply["text"] == whole["text"] and whole["text"].startswith(str(grown))
    assert len(texts) == 1 + len(CONDITIONS)


def line_ask(daemon: Daemon, request: dict[str, Any]) -> dict[str, Any]:
    return daemon.line().ask(request)


def test_conditions_of_requests_side_by_side_are_each_their_own(daemon: Daemon) -> None:
    requests = [ASKED | condition | {"seed": seed} for seed in (3, 4) for condition in ({}, *CONDITIONS.values())]
    alone = [line_ask(daemon, request)["text"] for request in requests]
    lines = [daemon.line() for _ in requests]
    for line, request in zip(lines, requests, strict=True):
        line.send(request)
    assert [(line.read() or {})["text"] for line in lines] == alone


def test_conditions_hold_around_gaps_too(daemon: Daemon) -> None:
    gaps = {"segments": ["abc ", {"gap": 6}, " de ", {"gap": None}, "."], "seed": 3}
    texts = [line_ask(daemon, gaps | condition)["text"] for condition in ({}, *CONDITIONS.values())]
    assert len(set(texts)) > 2 and all("abc " in text and " de " in text for text in texts)


def png_of_size(width: int, height: int) -> str:
    """A whole PNG but for what its header says."""
    whole = picture_file(1)
    header = whole[12:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + whole[24:29]
    return base64.b64encode(whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:]).decode()


BAD: Final[dict[str, tuple[dict[str, Any], str, str]]] = {
    "no words": ({"words": []}, "bad_request", "`words` must be a list of at least 1"),
    "no pictures": ({"images": []}, "bad_request", "`images` must be a list of at least 1"),
    "4 pictures": ({"images": [picture(1)] * 4}, "bad_request", "`images` has 4 pictures; this bundle takes 3"),
    "4 words": ({"words": ["a"] * 4}, "bad_request", "`words` has 4 words; this bundle takes 3"),
    "no word": ({"words": ["dragon", "\x00"]}, "bad_request", "`words[1]` must be a word"),
    "empty word": ({"words": [""]}, "bad_request", "`words[0]` must be a word"),
    "long word": ({"words": ["xq" * 16]}, "bad_request", "tokens; this bundle takes 8 a word"),
    "text": ({"images": [base64.b64encode(b"card.png").decode()]}, "bad_request", "`images[0]` is neither"),
    "GIF": ({"images": [picture(1), picture(1, kind="GIF")]}, "bad_request", "`images[1]` is neither PNG nor JPEG"),
    "bomb": ({"images": [png_of_size(60_000, 60_000)]}, "too_large", "`images[0]` has 60000 × 60000 pixels"),
    "a pixel": ({"images": [picture(1, size=(1, 1))]}, "bad_request", "`images[0]` has 1 × 1 pixels; each side must"),
    "no base64": ({"images": ["ä"]}, "bad_request", "`images[0]` is not base64"),
    "hash": ({"images": ["sha256:00"]}, "bad_request", "`images[0]` is not base64"),
    "attachment": ({"images": ["attachment:x"]}, "bad_request", "`images[0]` names an attachment"),
    "canvas": ({"words": ["dragon"], "decode": "canvas"}, "bad_request", "`words` is of decoding by blocks"),
    "steps": ({"images": [picture(1)], "steps": 4}, "bad_request", "`steps` is of decoding by canvas"),
    "guidance alone": ({"guidance": 1}, "bad_request", "`guidance` goes with `words` or `images`"),
    "guidance": ({"words": ["dragon"], "guidance": 9}, "bad_request", "`guidance` must be a number"),
}


@pytest.mark.parametrize(("fields", "code", "sentence"), BAD.values(), ids=BAD)
def test_conditions_that_are_none_are_refused_in_a_sentence(
    daemon: Daemon, fields: dict[str, Any], code: str, sentence: str
) -> None:
    error = line_ask(daemon, ASKED | fields | {"id": "x"})["error"]
    assert error["code"] == code and sentence in error["message"] and "\n" not in error["message"]


def test_conditions_of_a_bundle_without_encoders_are_refused(
    start_daemon: Callable[..., Daemon], blocks_bundle: Path
) -> None:
    daemon = start_daemon("--bundle", str(blocks_bundle))
    for name, value in (("words", "dragon"), ("images", picture(1))):
        error = line_ask(daemon, ASKED | {name: [value]})["error"]
        assert error["code"] == "bad_request"
        assert error["message"] == f"`{name}`: this bundle takes neither words nor pictures"


@pytest.mark.slow
def test_conditions_from_the_command_line(conditioned_bundle: Path, tmp_path: Path, daemon: Daemon) -> None:
    (tmp_path / "card.png").write_bytes(picture_file(1))
    flags = ["a", "--seed", "3", "--max-tokens", "40", "--word", "dragon", "--guidance", "2"]
    flags += ["--image", str(tmp_path / "card.png"), "--json", "--bundle", str(conditioned_bundle)]
    done = run_module("edge.generate", *flags)
    assert done.returncode == 0, done.stderr
    asked = ASKED | {"words": ["dragon"], "images": [picture(1)], "guidance": 2}
    assert json.loads(done.stdout)["text"] == line_ask(daemon, asked)["text"]


@pytest.mark.slow
def test_conditions_from_the_command_line_need_no_prompt(tmp_path: Path, daemon: Daemon) -> None:
    (tmp_path / "card.png").write_bytes(picture_file(1))
    asked = {"--word": ("dragon", {"words": ["dragon"]}), "--image": ("card.png", {"images": [picture(1)]})}
    for flag, (value, fields) in asked.items():
        value = str(tmp_path / value) if flag == "--image" else value
        done = run_module("edge.generate", flag, value, "--seed", "3", "--json", "--socket", str(daemon.socket))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["text"] == line_ask(daemon, {"prompt": "", "seed": 3} | fields)["text"]
    refused = run_module("edge.generate", "--seed", "3", "--socket", str(daemon.socket))
    assert refused.returncode == 2 and "with --word or --image the prompt may be left out" in refused.stderr


@pytest.fixture
def start_site(
    start_daemon: Callable[..., Daemon], conditioned_bundle: Path, broker: Broker
) -> Callable[[str], Daemon]:
    """Start a daemon on the broker, and wait until it is subscribed: the broker drops what comes before."""
    started = 0

    def start(backend: str) -> Daemon:
        nonlocal started
        started += 1
        flags = ("--mqtt", broker.address, "--bundle", str(conditioned_bundle))
        daemon = start_daemon(*flags, backend=backend, DEVICE="dev")
        until(lambda: daemon.log.read_text().count("mqtt connected") == started, "the daemon to connect")
        return daemon

    return start


def body(listener: Listener, *topics: str) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(listener.next(*topics).payload)
    return decoded


def pictures_of(journal: Path) -> int:
    with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as db:
        count: int = db.execute("SELECT count(*) FROM picture").fetchone()[0]
    return count


@pytest.mark.slow
def test_conditions_over_mqtt_come_as_attachments_too(
    start_site: Callable[[str], Daemon], broker: Broker, listen: Callable[..., Listener]
) -> None:
    listener, daemon = listen(broker), start_site("ort")
    info = body(listener, "edgelm/dev/info")
    limits = {name: info["limits"][name] for name in ("words", "images", "image_bytes", "guidance")}
    assert limits == {"words": 3, "images": 3, "image_bytes": MAX_PICTURE_BYTES, "guidance": 0}
    attachment, named = "edgelm/dev/request/attachment", {"images": ["attachment:card"]}
    inline = line_ask(daemon, ASKED | {"images": [picture(1)]})["text"]
    listener.publish(f"{attachment}/card", picture_file(1))
    listener.publish(f"{attachment}/anna/card", picture_file(2))
    listener.publish(REQUEST, ASKED | named | {"id": "1"})
    first = listener.next("edgelm/dev/response/1").payload
    assert json.loads(first)["text"] == inline
    listener.publish(f"{REQUEST}/anna", ASKED | named | {"id": "1"})
    hers = line_ask(daemon, ASKED | {"images": [picture(2)]})["text"]
    assert body(listener, "edgelm/dev/response/anna/1")["text"] == hers
    listener.publish(f"{REQUEST}/ben", ASKED | named | {"id": "1"})
    error = body(listener, "edgelm/dev/response/ben/1")["error"]
    assert error["code"] == "bad_request" and "`images[0]`: no attachment 'card' is here" in error["message"]
    listener.publish(f"{attachment}/large", b"x" * (MAX_PICTURE_BYTES + 1))
    assert body(listener, "edgelm/dev/response/large")["error"]["code"] == "too_large"
    listener.publish(f"{attachment}/card", b"no picture")
    listener.publish(REQUEST, ASKED | named | {"id": "2"})
    assert "`images[0]` is neither PNG nor JPEG" in body(listener, "edgelm/dev/response/2")["error"]["message"]
    listener.publish(f"{attachment}/card", b"")
    listener.publish(REQUEST, ASKED | named | {"id": "1"})  # its answer is stored: the attachment is not needed
    assert listener.next("edgelm/dev/response/1").payload == first
    listener.publish(REQUEST, ASKED | {"images": ["attachment:other"], "id": "1"})
    assert body(listener, "edgelm/dev/response/1")["error"]["code"] == "conflict"


@pytest.mark.slow
def test_conditions_sent_twice_at_once_are_answered_once(
    start_site: Callable[[str], Daemon], broker: Broker, listen: Callable[..., Listener]
) -> None:
    listener, daemon = listen(broker), start_site("fake")
    request = ASKED | {"images": [picture(1, size=(1000, 1000))] * 3, "id": "1"}
    for _ in range(5):
        listener.client.publish(REQUEST, json.dumps(request).encode(), qos=1)
    answer = body(listener, "edgelm/dev/response/1")
    assert answer["status"] == "ok" and answer["text"] == line_ask(daemon, request)["text"]
    until(lambda: "request 1 of" in daemon.log.read_text(), "its line in the log")
    assert "Traceback" not in daemon.log.read_text()


@pytest.mark.slow
def test_conditions_survive_a_kill_and_leave_the_journal_with_the_answer(
    start_site: Callable[[str], Daemon], broker: Broker, listen: Callable[..., Listener], tmp_path: Path
) -> None:
    listener, killed = listen(broker), start_site("fake:200")
    request = {"prompt": "a", "words": ["dragon"], "window": 0, "max_tokens": 60}
    listener.publish("edgelm/dev/request/attachment/card", picture_file(1))
    shown = request | {"images": ["attachment:card", picture(2), picture(2)]}
    for id in ("a", "b"):
        listener.publish(REQUEST, shown | {"id": id, "stream": True})
    listener.next("edgelm/dev/stream/b")
    killed.signal(signal.SIGKILL)
    killed.exit_code()
    assert pictures_of(tmp_path / "journal.sqlite") == 2  # of two requests, three each
    daemon = start_site("fake")
    answers = [body(listener, "edgelm/dev/response/a", "edgelm/dev/response/b") for _ in range(2)]
    assert sorted(answer["id"] for answer in answers) == ["a", "b"]
    for answer in answers:
        assert answer["status"] == "ok"
        again = line_ask(daemon, request | {"images": [picture(1), picture(2), picture(2)], "seed": answer["seed"]})
        assert again["text"] == answer["text"]
    daemon.signal(signal.SIGTERM)
    daemon.exit_code()
    assert pictures_of(tmp_path / "journal.sqlite") == 0
