"""Errors in OpenAI's shape, with the codes of all transports."""

import math
import re
from typing import Final

import msgspec
from msgspec import Struct

from shared.errors import RequestError

TYPES: Final[dict[str, str]] = {
    "unauthorized": "authentication_error",
    "forbidden": "permission_error",
    "queue_full": "rate_limit_error",
    "internal": "server_error",
    "broker_lost": "server_error",
    "draining": "server_error",
    "timeout": "server_error",
    "storage_full": "server_error",
}
"""Code → OpenAI's type of error; all others are `invalid_request_error`."""
FIELD: Final = re.compile(r"`([a-z_]+)(?:[.\[][^`]*)?`|unknown field `([^`]+)`")
"""The field that a sentence names first; of a place within one, as in `images[0]`, the field."""


class ErrorDetail(Struct, frozen=True, kw_only=True):
    """What went wrong. code: as on the other transports. param: the field that is wrong, where one is."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(Struct, frozen=True, kw_only=True):
    """An answer that is an error."""

    error: ErrorDetail


class MethodError(RequestError):
    """A path that has no such method. takes: the one that it has."""

    def __init__(self, path: str, method: str, *, takes: str) -> None:
        super().__init__("method_not_allowed", f"{path} takes {takes}, not {method}")
        self.takes = takes


def error_body(error: RequestError) -> bytes:
    """The error as JSON."""
    kind = TYPES.get(error.code, "invalid_request_error")
    named = FIELD.search(str(error)) if error.code in ("bad_request", "too_large") else None
    param = None if named is None else named[1] or named[2]
    detail = ErrorDetail(message=str(error), type=kind, param=param, code=error.code)
    return msgspec.json.encode(ErrorBody(error=detail))


def error_headers(error: RequestError) -> list[tuple[str, str]]:
    """When to come again, and whether to: OpenAI's clients heed all three headers."""
    headers = [("x-should-retry", str(error.retryable).lower())]
    if error.code == "unauthorized":
        headers.append(("www-authenticate", "Bearer"))
    if isinstance(error, MethodError):
        headers.append(("allow", error.takes))
    if error.retryable:
        after_ms = error.retry_after_ms or 1000
        headers += [("retry-after", str(math.ceil(after_ms / 1e3))), ("retry-after-ms", str(after_ms))]
    return headers
