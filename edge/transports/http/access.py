"""Who may ask: bearers of the token, or, where none is set, programs of this machine and pages that came from here.

A browser lets any page send requests to a local address, and a name that its owner points at 127.0.0.1 makes them look
like its own (DNS rebinding). Without a token, requests must therefore name this machine in Host, and a page that sends
one must have come from that Host (Origin; RFC 6454).
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping

from shared.errors import RequestError


class Access:
    """Checks the headers of requests. token: what they must bring; None on a loopback address alone."""

    def __init__(self, token: str | None) -> None:
        self._digest = None if token is None else _digest(token)

    def check(self, headers: Mapping[str, str]) -> None:
        """Raise RequestError, `unauthorized` or `forbidden`, unless a request may be served."""
        if self._digest is None:
            _check_local(headers.get("host", ""), headers.get("origin"), headers.get("sec-fetch-site", "none"))
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip()), self._digest):
            raise RequestError("unauthorized", "send the token of this device: `Authorization: Bearer TOKEN`")

    def check_page(self, headers: Mapping[str, str]) -> None:
        """The same for the page: it holds no secret, others may link to it, and it asks for the token itself."""
        if self._digest is None:
            _check_host(headers.get("host", ""))


def _digest(token: str) -> bytes:
    """Of equal length for all tokens, so that comparing them tells nothing of it."""
    return hashlib.sha256(token.encode()).digest()


def _check_local(host: str, origin: str | None, site: str) -> None:
    _check_host(host)
    if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
        raise RequestError("forbidden", f"a page of `Origin` {origin!r} may not use this device: its own page may")
    if site not in ("none", "same-origin"):
        raise RequestError("forbidden", f"`Sec-Fetch-Site` {site!r}: another site's page may not use this device")


def _check_host(host: str) -> None:
    if not _is_loopback(host):
        message = f"`Host` {host!r} is not this machine: use http://127.0.0.1, or set a token for other names"
        raise RequestError("forbidden", message)


def _is_loopback(host: str) -> bool:
    """Whether a Host header names a loopback address, on any port (a tunnel may listen on another one)."""
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdecimal():
        name = host
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
