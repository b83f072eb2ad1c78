"""Requests on their way: one of an identity at a time, and who sent it again is acknowledged with it."""

from edge.delivery.open_requests import OpenRequest, OpenRequests


def opened(id: str | None = "a", digest: bytes = b"1", client: str = "anna") -> OpenRequest:
    return OpenRequest(client, "edgelm/reply/anna", id, None, digest)


def nothing() -> None:
    """An acknowledgement that does not count."""


def test_open_requests_sent_again_while_they_arrive_are_acknowledged_with_the_first() -> None:
    requests, calls = OpenRequests(), list[str]()
    first = opened()
    assert requests.arrive(first, nothing) is None
    assert requests.arrive(opened(), lambda: calls.append("again")) is first
    assert requests.arrive(opened(digest=b"2"), lambda: calls.append("other")) is first
    for acknowledge in requests.add(7, first):
        acknowledge()
    assert calls == ["again"] and requests.get(7) is first
    assert requests.arrive(opened(), nothing) is None  # the journal knows it from here on


def test_open_requests_refused_make_room_for_another() -> None:
    requests, first = OpenRequests(), opened()
    requests.arrive(first, nothing)
    requests.arrive(opened(), nothing)
    assert requests.leave(first) == [nothing]
    assert requests.arrive(opened(), nothing) is None


def test_open_requests_without_an_id_or_of_others_are_never_the_same() -> None:
    requests = OpenRequests()
    for one in (opened(None), opened(None), opened(), opened(client="ben"), opened("b")):
        assert requests.arrive(one, nothing) is None


def test_open_requests_are_cancelled_while_they_arrive() -> None:
    requests, arriving, accepted = OpenRequests(), opened(), opened("b")
    requests.arrive(arriving, nothing)
    requests.add(1, accepted)
    requests.cancel("anna", None, "a")
    assert (arriving.cancelled, accepted.cancelled) == (True, False)
