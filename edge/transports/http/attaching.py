"""`PUT /v1/attachments/NAME`: a picture's file as it is, for requests of the same address that name it."""

from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

from msgspec import Struct

from edge.decoding.pictures import MAX_PICTURE_BYTES
from edge.transports.attachments import KEEP_S
from edge.transports.http.exchange import Request
from edge.transports.mqtt.topics import MAX_CLIENT, is_level
from shared.errors import RequestError
from shared.messages import MAX_MESSAGE_BYTES

PATH: Final = "/v1/attachments/"
MAX_UPLOADS: Final = 16
"""Pictures that may be coming in at once: three megabytes."""
MAX_UPLOADS_OF_UNIT: Final = 8  # of one address


@dataclass(frozen=True)
class Limit:
    """Of a body. what: it is, for the sentence."""

    what: str
    most_bytes: int

    def check(self, size: int, whole: bool) -> None:
        """Raise RequestError, `too_large`, for a body of that many bytes. whole: it has no more."""
        if size > self.most_bytes:
            has = f"this one has {size}" if whole else f"this one has {size} or more"
            raise RequestError("too_large", f"{self.what} may have {self.most_bytes} bytes; {has}")


MESSAGE: Final = Limit("a message", MAX_MESSAGE_BYTES)
PICTURE: Final = Limit("an attachment", MAX_PICTURE_BYTES)


class Attached(Struct, frozen=True, kw_only=True):
    """A file is here. image: what a request names it by in `images`. bytes: 0, it was taken away. keep_s: how long."""

    image: str
    bytes: int
    keep_s: float = KEEP_S


def is_upload(request: Request) -> bool:
    """Whether a request, of which the head has come, brings an attachment."""
    return request.method == "PUT" and request.path.startswith(PATH)


def owner_of(request: Request) -> str:
    """Whose attachments a request sets and names: those of its address. No client of MQTT's has a `#` in its name."""
    return f"#http:{request.unit}"


def name_of(request: Request) -> str:
    """The name in the path, percent-encoded there. Raises RequestError for one that MQTT could not have either."""
    given = request.path.removeprefix(PATH)
    try:
        name = unquote_to_bytes(given).decode()
    except UnicodeDecodeError:
        name = ""
    if not is_level(name):
        allowed = f"1 to {MAX_CLIENT} characters without `/`, `+`, `#` and control characters"
        raise RequestError("bad_request", f"an attachment's name is {allowed}, not {given!r}")
    return name
