"""Who is served: without a token this machine and its own page, with one whoever has it."""

import pytest

from edge.transports.http.access import Access
from edge.transports.http.places import unit
from shared.errors import RequestError

LOCAL = {"host": "127.0.0.1:8080"}
TOKEN = "correct-horse-battery"


def refused(access: Access, headers: dict[str, str]) -> str | None:
    """The code of the refusal, if it is one."""
    try:
        access.check(headers)
    except RequestError as error:
        return error.code
    return None


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost", "LOCALHOST:1", "127.8.9.1", "[::1]", "[::1]:8080"])
def test_access_without_a_token_is_for_this_machine(host: str) -> None:
    assert refused(Access(None), {"host": host}) is None


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "192.168.1.9:8080",
        "0.0.0.0",
        "[::]",
        "[fe80::1]",
        "localhost:80:80",
        "127.0.0.1@evil.example",
        "localhost ",
        "2130706433",
    ],
)
def test_access_without_a_token_refuses_other_names(host: str) -> None:
    assert refused(Access(None), {"host": host}) == "forbidden"
    with pytest.raises(RequestError):
        Access(None).check_page({"host": host})


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},  # another program's page
        {"origin": "http://localhost:8080"},
        {"origin": ""},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_access_without_a_token_refuses_other_pages(headers: dict[str, str]) -> None:
    assert refused(Access(None), LOCAL | headers) == "forbidden"


@pytest.mark.parametrize("headers", [{}, {"origin": "http://127.0.0.1:8080"}, {"sec-fetch-site": "same-origin"}])
def test_access_without_a_token_serves_programs_and_its_page(headers: dict[str, str]) -> None:
    assert refused(Access(None), LOCAL | headers) is None


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_access_with_a_token_serves_its_bearer_under_any_name(scheme: str) -> None:
    assert refused(Access(TOKEN), {"host": "device.example", "authorization": f"{scheme} {TOKEN}"}) is None


@pytest.mark.parametrize(
    "given", ["", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer", "Bearer ÿ"]
)
def test_access_with_a_token_refuses_all_others(given: str) -> None:
    assert refused(Access(TOKEN), LOCAL | {"authorization": given}) == "unauthorized"


def test_access_with_a_token_shows_the_page_that_asks_for_it() -> None:
    Access(TOKEN).check_page({"host": "device.example"})


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("::1", "::1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_unit_is_an_address_or_a_network_of_64_bits(address: str, counted: str) -> None:
    assert unit(address) == counted
