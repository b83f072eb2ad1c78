"""Pictures that come in messages of their own: kept for a while, in memory, for the requests that name them."""

import base64
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from edge.decoding.pictures import MAX_PICTURE_BYTES
from edge.system.locked import Locked
from shared.errors import RequestError
from shared.messages import ATTACHMENT, GenerateRequest

KEEP_S: Final = 600.0
MAX_OF_CLIENT: Final = 8
MAX_CLIENT_BYTES: Final = 1 << 20
MAX_ATTACHMENTS: Final = 256
MAX_BYTES: Final = 8 << 20
"""Of all clients, whatever they come over."""


@dataclass(frozen=True)
class _Attachment:
    content: bytes
    came_s: float


class Attachments:
    """By client and name; the oldest go when a client, or all of them, have too many. Thread-safe."""

    def __init__(self) -> None:
        self._kept: Locked[OrderedDict[tuple[str, str], _Attachment]] = Locked(OrderedDict())

    def put(self, client: str | None, name: str, content: bytes, takes: bool = True) -> None:
        """Keep it, in place of an older one of that name; an empty one takes it away. Raises RequestError.

        takes: whether the bundle takes pictures.
        """
        if content and not takes:
            raise RequestError("bad_request", "this device takes no pictures with the bundle that it serves")
        if len(content) > MAX_PICTURE_BYTES:
            limit = f"an attachment may have {MAX_PICTURE_BYTES} bytes"
            raise RequestError("too_large", f"{limit}; this one has {len(content)}")
        owner = client or ""
        with self._kept as kept:
            kept.pop((owner, name), None)
            if content:
                kept[owner, name] = _Attachment(content, time.monotonic())
            _forget_old(kept)
            own = [key for key in kept if key[0] == owner]
            while len(own) > MAX_OF_CLIENT or sum(len(kept[key].content) for key in own) > MAX_CLIENT_BYTES:
                del kept[own.pop(0)]
            while len(kept) > MAX_ATTACHMENTS or sum(len(one.content) for one in kept.values()) > MAX_BYTES:
                kept.popitem(last=False)

    def attached(self, client: str | None, request: GenerateRequest) -> GenerateRequest:
        """A request with the attachments that it names in their place. Raises RequestError when one is not here."""
        if request.images is None:
            return request
        return replace(request, images=[self._image(client, i, image) for i, image in enumerate(request.images)])

    def _image(self, client: str | None, number: int, image: str) -> str:
        if not image.startswith(ATTACHMENT):
            return image
        name = image.removeprefix(ATTACHMENT)
        with self._kept as kept:
            _forget_old(kept)
            found = kept.get((client or "", name))
        if found is None:
            why = f"each is kept for {KEEP_S:.0f} s at most, and may have {MAX_PICTURE_BYTES} bytes"
            raise RequestError("bad_request", f"`images[{number}]`: no attachment {name!r} is here; {why}")
        return base64.b64encode(found.content).decode()


def _forget_old(kept: OrderedDict[tuple[str, str], _Attachment]) -> None:
    """They lie in the order in which they came."""
    while kept and next(iter(kept.values())).came_s < time.monotonic() - KEEP_S:
        kept.popitem(last=False)
