"""Pictures as attachments over HTTP: put by name, named by requests, bounded, and kept in the journal by their hash."""

import hashlib
import json
import signal
import socket
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest

from edge.decoding.pictures import MAX_PICTURE_BYTES
from edge.transports.attachments import MAX_OF_CLIENT
from tests.integration.harness import ROOT, Broker, Daemon, Listener
from tests.integration.http_client import Answer, address_of, ask, complete, connect
from tests.support.picture_files import picture, picture_file

FOLDER: Final = ROOT / "bundle" / "tinystories-conditions"
ASKED: Final = {"prompt": "Once upon", "seed": 3, "max_tokens": 24}
LARGE: Final = f"an attachment may have {MAX_PICTURE_BYTES} bytes; this one has {MAX_PICTURE_BYTES + 1}"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("daemon"), FOLDER, "--backend", "ort", "--http", "127.0.0.1:0")
    yield daemon
    daemon.close()


def put(daemon: Daemon, name: str, file: bytes) -> Answer:
    return ask(daemon, f"/v1/attachments/{name}", file, method="PUT", headers={"Content-Type": "image/png"})


def text_of(answer: Answer) -> str:
    assert answer.status == 200, answer
    text: str = answer.object["choices"][0]["text"]
    return text


def test_http_attachment_is_the_picture_itself(daemon: Daemon) -> None:
    first = put(daemon, "my%20card", picture_file(1))
    attached = {"image": "attachment:my card", "bytes": len(picture_file(1)), "keep_s": 600.0}
    assert (first.status, first.object) == (201, attached)
    inline = text_of(complete(daemon, **ASKED, images=[picture(1), picture(2)]))
    named = {"images": ["attachment:my card", picture(2)]}
    assert text_of(complete(daemon, **ASKED, **named)) == inline != text_of(complete(daemon, **ASKED))
    chat = {key: value for key, value in ASKED.items() if key != "prompt"} | named
    asked = ask(daemon, "/v1/chat/completions", chat | {"messages": [{"role": "user", "content": ASKED["prompt"]}]})
    assert asked.status == 200 and asked.object["choices"][0]["message"]["content"] == inline
    streamed = complete(daemon, **ASKED, **named, stream=True)
    assert streamed.status == 200 and streamed.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("image", "code"), [(picture(1, kind="GIF"), "bad_request"), (picture(1, size=(2000, 1100)), "too_large")]
)
def test_http_unfit_picture_is_told_of_its_field(daemon: Daemon, image: str, code: str) -> None:
    error = complete(daemon, **ASKED, images=[picture(2), image]).error
    assert (error["code"], error["param"]) == (code, "images") and "`images[1]`" in error["message"]


def test_http_attachment_may_be_larger_than_a_message(daemon: Daemon) -> None:
    """As many bytes as may be: what a PNG has after its end is not read."""
    assert put(daemon, "large", picture_file(1).ljust(MAX_PICTURE_BYTES, b"\0")).status == 201
    assert text_of(complete(daemon, **ASKED, images=["attachment:large"])) == text_of(
        complete(daemon, **ASKED, images=[picture(1)])
    )


def test_http_attachment_that_is_too_large_is_refused_before_it_has_come(daemon: Daemon) -> None:
    host, port = address_of(daemon)
    head = f"PUT /v1/attachments/large HTTP/1.1\r\nHost: {host}\r\n"
    declared, chunked = f"Content-Length: {MAX_PICTURE_BYTES + 1}", "Transfer-Encoding: chunked"
    body = f"\r\n{MAX_PICTURE_BYTES + 1:x}\r\n".encode() + b"x" * (MAX_PICTURE_BYTES + 1)  # its last chunk never comes
    for fields, rest in ((declared, b"\r\n"), (f"{declared}\r\nExpect: 100-continue", b"\r\n"), (chunked, body)):
        with socket.create_connection((host, port), timeout=20) as client:
            client.sendall(f"{head}{fields}\r\n".encode() + rest)
            answer = client.makefile("rb").read().decode()
        assert answer.startswith("HTTP/1.1 413 ") and LARGE in answer and '"too_large"' in answer
    body = b"x" * 70_000  # what is no attachment keeps the limit of messages
    assert ask(daemon, "/v1/completions", body).error["message"].startswith("a message may have 65536 bytes")
    assert ask(daemon, "/v1/attachments/card", body).error["code"] == "too_large"


@pytest.mark.parametrize("name", ["", "a/b", "a%2Fb", "a%2B", "a%23", "a%0a", "%ff", "a" * 65])
def test_http_attachment_of_an_unfit_name_is_refused(daemon: Daemon, name: str) -> None:
    answer = put(daemon, name, picture_file(1))
    assert (answer.status, answer.error["code"]) == (400, "bad_request")
    assert "an attachment's name is 1 to 64 characters" in answer.error["message"]


def test_http_attachments_are_the_addresss_own_and_the_newest_eight(daemon: Daemon) -> None:
    for i in range(MAX_OF_CLIENT + 1):
        assert put(daemon, f"card%20{i}", picture_file(1)).status == 201
    gone = complete(daemon, **ASKED, images=["attachment:card 0"])
    assert (gone.status, gone.error["code"]) == (400, "bad_request")
    assert "`images[0]`: no attachment 'card 0' is here; each is kept for 600 s" in gone.error["message"]
    assert complete(daemon, **ASKED, images=["attachment:card 1"]).status == 200
    other = connect(daemon, "127.0.0.2")
    other.request(
        "POST",
        "/v1/completions",
        b'{"prompt":"a","images":["attachment:card 1"]}',
        {"Content-Type": "application/json"},
    )
    assert b"no attachment 'card 1' is here" in other.getresponse().read()
    other.close()
    over_socket = daemon.line().ask({"prompt": "a", "images": ["attachment:card 1"]})["error"]["message"]
    assert over_socket == "`images[0]` names an attachment, and those come over MQTT and HTTP: send base64"


def test_http_attachment_is_taken_away_by_an_empty_body(daemon: Daemon) -> None:
    assert put(daemon, "card", b"no picture").status == 201
    assert "`images[0]` is neither PNG" in complete(daemon, **ASKED, images=["attachment:card"]).error["message"]
    assert (put(daemon, "card", b"").status, put(daemon, "card", b"").object["bytes"]) == (200, 0)
    assert "no attachment" in complete(daemon, **ASKED, images=["attachment:card"]).error["message"]


def test_http_attachments_path_takes_put_alone(daemon: Daemon) -> None:
    answer = ask(daemon, "/v1/attachments/card")
    assert (answer.status, answer.headers["allow"]) == (405, "PUT")
    assert ask(daemon, "/v1/attachments", b"x", method="PUT").status == 404
    foreign = ask(daemon, "/v1/attachments/card", b"x", method="PUT", headers={"Origin": "http://other.example"})
    assert (foreign.status, foreign.error["code"]) == (403, "forbidden")


def test_http_attachment_for_a_bundle_without_encoders_is_refused(start_daemon: Callable[..., Daemon]) -> None:
    answer = put(start_daemon("--http", "127.0.0.1:0"), "card", picture_file(1))
    assert answer.error["message"] == "this device takes no pictures with the bundle that it serves"


def test_http_attachment_of_a_stranger_is_refused_unread(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-token-of-this-device\n")
    daemon = start_daemon("--http", "127.0.0.1:0", HTTP_TOKEN_FILE=str(tmp_path / "token"))
    with socket.create_connection(address_of(daemon), timeout=20) as client:
        client.sendall(b"PUT /v1/attachments/card HTTP/1.1\r\nHost: a\r\nContent-Length: 90000\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 401 ")


def streamed(answer: Answer) -> str:
    """The text of a stream."""
    pieces = [json.loads(line[6:]) for line in answer.body.split(b"\n") if line.startswith(b"data: {")]
    return "".join(piece["choices"][0]["text"] for piece in pieces)


def stored(journal: Path) -> set[bytes]:
    """The hashes of the pictures in a journal."""
    with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as db:
        return {row[0] for row in db.execute("SELECT sha256 FROM picture")}


@pytest.mark.slow
def test_http_attachments_of_requests_with_an_id_are_kept_by_their_hash(
    start_daemon: Callable[..., Daemon], conditioned_bundle: Path, tmp_path: Path
) -> None:
    def start(backend: str) -> Daemon:
        return start_daemon("--bundle", str(conditioned_bundle), "--http", "127.0.0.1:0", backend=backend)

    def keyed(daemon: Daemon, **fields: Any) -> Answer:
        return ask(daemon, "/v1/completions", request | fields, headers={"Idempotency-Key": "1"})

    request = {"prompt": "a", "seed": 3, "max_tokens": 60, "window": 0, "stream": True, "images": ["attachment:card"]}
    daemon = start("fake:200")
    unknown = keyed(daemon)
    assert (unknown.status, unknown.error["code"]) == (400, "bad_request")
    assert put(daemon, "card", picture_file(1)).status == 201
    leaving = connect(daemon)
    head = {"Content-Type": "application/json", "Idempotency-Key": "1"}
    leaving.request("POST", "/v1/completions", json.dumps(request), head)
    first_piece = leaving.getresponse()
    assert first_piece.readline().startswith(b"data: ")  # so it is being computed
    first_piece.close()
    leaving.close()
    daemon.signal(signal.SIGKILL)
    daemon.exit_code()
    assert stored(tmp_path / "journal.sqlite") == {hashlib.sha256(picture_file(1)).digest()}
    daemon = start("fake")
    first = keyed(daemon)  # its picture is in the journal: the attachment, which the restart forgot, is not needed
    assert streamed(first) == streamed(complete(daemon, **request | {"images": [picture(1)]}))
    assert streamed(first) != streamed(complete(daemon, **request | {"images": [picture(2)]}))
    assert streamed(keyed(daemon)) == streamed(first)  # in fewer pieces
    assert keyed(daemon, images=["attachment:other"]).error["code"] == "conflict"
    daemon.signal(signal.SIGTERM)
    daemon.exit_code()
    assert stored(tmp_path / "journal.sqlite") == set()


@pytest.mark.slow
def test_http_attachments_are_apart_from_those_of_mqtt(
    start_daemon: Callable[..., Daemon], conditioned_bundle: Path, broker: Broker, listen: Callable[..., Listener]
) -> None:
    listener = listen(broker)
    flags = ("--mqtt", broker.address, "--bundle", str(conditioned_bundle), "--http", "127.0.0.1:0")
    daemon = start_daemon(*flags, DEVICE="dev")
    listener.next("edgelm/dev/info")
    assert put(daemon, "card", picture_file(1)).status == 201
    listener.publish("edgelm/dev/request/generate", {"prompt": "a", "images": ["attachment:card"], "id": "1"})
    assert b"no attachment 'card' is here" in listener.next("edgelm/dev/response/1").payload
    listener.publish("edgelm/dev/request/attachment/other", picture_file(1))
    listener.publish("edgelm/dev/request/generate", {"prompt": "a", "images": ["attachment:other"], "id": "2"})
    assert b'"status":"ok"' in listener.next("edgelm/dev/response/2").payload
    assert "no attachment 'other'" in complete(daemon, prompt="a", images=["attachment:other"]).error["message"]
