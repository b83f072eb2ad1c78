"""Attachments are kept for a while, bounded in number, bytes and age, each client's apart."""

import base64

import pytest

from edge.decoding.pictures import MAX_PICTURE_BYTES
from edge.transports import attachments
from edge.transports.attachments import MAX_ATTACHMENTS, MAX_BYTES, MAX_CLIENT_BYTES, MAX_OF_CLIENT, Attachments
from edge.transports.mqtt.topics import Topics
from shared.errors import RequestError
from shared.messages import GenerateRequest

TOPICS = Topics("edgelm", "dev", ("edgelm/reply/",))


def here(kept: Attachments, client: str | None, name: str) -> bytes | None:
    """What a client's request gets under that name; None if it is refused."""
    try:
        request = kept.attached(client, GenerateRequest(prompt="x", images=["YQ==", f"attachment:{name}"]))
    except RequestError as error:
        assert error.code == "bad_request" and f"`images[1]`: no attachment {name!r} is here" in str(error)
        return None
    assert request.images is not None and request.images[0] == "YQ=="
    return base64.b64decode(request.images[1])


def test_attachments_are_each_clients_own() -> None:
    kept = Attachments()
    kept.put("anna", "card", b"hers")
    kept.put(None, "card", b"everybody's")
    assert [here(kept, client, "card") for client in ("anna", None, "ben")] == [b"hers", b"everybody's", None]


def test_attachments_are_replaced_by_name_and_taken_away_by_nothing() -> None:
    kept = Attachments()
    kept.put("anna", "card", b"old")
    kept.put("anna", "card", b"new")
    assert here(kept, "anna", "card") == b"new"
    kept.put("anna", "card", b"")
    assert here(kept, "anna", "card") is None


def test_attachments_of_a_client_are_bounded_in_number() -> None:
    kept = Attachments()
    kept.put("ben", "card", b"his")
    for i in range(MAX_OF_CLIENT + 2):
        kept.put("anna", str(i), b"x")
    assert [here(kept, "anna", str(i)) is None for i in range(4)] == [True, True, False, False]
    assert here(kept, "ben", "card") == b"his"


def test_attachments_of_a_client_are_bounded_in_bytes() -> None:
    kept, most = Attachments(), MAX_CLIENT_BYTES // MAX_PICTURE_BYTES
    for i in range(most + 1):
        kept.put("anna", str(i), b"x" * MAX_PICTURE_BYTES)
    assert here(kept, "anna", "0") is None and here(kept, "anna", "1") is not None


def test_attachments_of_all_clients_are_bounded_in_bytes() -> None:
    kept, most = Attachments(), MAX_BYTES // MAX_PICTURE_BYTES
    for i in range(most + 1):
        kept.put(f"client {i}", "card", b"x" * MAX_PICTURE_BYTES)
    assert here(kept, "client 0", "card") is None and here(kept, "client 1", "card") is not None


def test_attachments_of_all_clients_are_bounded_in_number() -> None:
    kept = Attachments()
    for i in range(MAX_ATTACHMENTS + 1):
        kept.put(f"client {i}", "card", b"x")
    assert here(kept, "client 0", "card") is None and here(kept, "client 1", "card") == b"x"


def test_attachments_can_be_taken_away_where_none_are_taken_any_more() -> None:
    kept = Attachments()
    kept.put("anna", "card", b"x")
    kept.put("anna", "card", b"", takes=False)
    assert here(kept, "anna", "card") is None


def test_attachments_too_large_are_refused() -> None:
    with pytest.raises(RequestError, match=f"may have {MAX_PICTURE_BYTES} bytes; this one has {MAX_PICTURE_BYTES + 1}"):
        Attachments().put("anna", "card", b"x" * (MAX_PICTURE_BYTES + 1))


def test_attachments_go_with_age(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Attachments()
    kept.put("anna", "card", b"x")
    monkeypatch.setattr(attachments, "KEEP_S", -1.0)
    assert here(kept, "anna", "card") is None
    with kept._kept as left:
        assert not left


@pytest.mark.parametrize(
    ("topic", "parsed"),
    [
        ("request/attachment/card", (None, "card")),
        ("request/attachment/anna/card", ("anna", "card")),
        ("request/attachment/", None),
        ("request/attachment", None),
        ("request/attachment//card", None),
        ("request/attachment/anna/", None),
        ("request/attachment/" + "a" * 65, None),
        ("request/attachment/a\x7f", None),
        ("request/generate/anna", None),
    ],
)
def test_attachments_are_told_by_their_topic(topic: str, parsed: tuple[str | None, str] | None) -> None:
    assert TOPICS.parse_attachment(f"edgelm/dev/{topic}") == parsed
