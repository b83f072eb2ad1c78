"""Topics below BASE/DEVICE/: parsing, permitted reply topics, and the payload of requests."""

import re
from dataclasses import dataclass, replace
from typing import Final, Literal, cast

from edge.config import Config
from shared.errors import RequestError
from shared.messages import MAX_MESSAGE_BYTES, GenerateRequest, decode_request

MAX_TOPIC: Final = 256
MAX_LEVELS: Final = 16
MAX_CLIENT: Final = 64

_NONCHARACTERS: Final = "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
UNSENDABLE: Final = re.compile(f"[+#\x00-\x1f\x7f-\x9f\ufdd0-\ufdef{_NONCHARACTERS}]")
"""Wildcards, and characters at which a broker may drop the connection, which would interrupt every answer."""


def is_level(name: str) -> bool:
    """Whether a client, or an attachment, may be called so: it is one level of a topic."""
    return 0 < len(name) <= MAX_CLIENT and "/" not in name and not UNSENDABLE.search(name)


RequestKind = Literal["generate", "cancel", "health"]


@dataclass(frozen=True)
class Topics:
    """The topics of one device, or of a pool.

    A request on `request/KIND/CLIENT` belongs to CLIENT, and everything about it stays below CLIENT's topics: where the
    broker lets each user write only to its own request topics, clients are isolated. The plain `request/KIND` does not
    distinguish clients. base: one level or several. reply_prefixes: where answers may be sent, beside `response`.
    """

    base: str
    device: str
    reply_prefixes: tuple[str, ...]

    @classmethod
    def of(cls, config: Config) -> "Topics":
        """Those of the settings."""
        mqtt = config.mqtt
        return cls(mqtt.base_topic, config.device, mqtt.reply_prefixes or (f"{mqtt.base_topic}/reply/",))

    def pool(self, name: str) -> "Topics":
        """Those of a pool, BASE/pool/NAME/…, which are as a device's."""
        return replace(self, device=f"pool/{name}")

    @property
    def subscriptions(self) -> list[tuple[str, int]]:
        """What a device of a pool subscribes to, with the QoS; the shared group has the pool's name."""
        group = self.device.rpartition("/")[2]
        shared = [(f"$share/{group}/{self.own('request', 'generate')}{end}", 1) for end in ("", "/+")]
        return [(self.own("claim"), 1), *((self.own("request", "cancel") + end, 0) for end in ("", "/+")), *shared]

    def pool_of(self, topic: str) -> str | None:
        """The pool that a topic belongs to, if any."""
        root = f"{self.base}/pool/"
        return topic[len(root) :].partition("/")[0] if topic.startswith(root) else None

    def own(self, *levels: str | None) -> str:
        """BASE/DEVICE/LEVELS; levels that are None or not valid in a topic are left out."""
        return "/".join([self.base, self.device, *(v for v in levels if v is not None and not UNSENDABLE.search(v))])

    def sender(self, address: str) -> str:
        """Who asks on a plain topic, by where the answer goes: BASE and two more levels. With a `/`, so no client."""
        return "/".join(address.split("/")[: self.base.count("/") + 3])

    def parse(self, topic: str) -> tuple[RequestKind, str | None] | None:
        """The kind and client of a request's topic; None if the client's name is not valid."""
        kind, slash, client = topic.removeprefix(self.own("request") + "/").partition("/")
        if slash and (not client or len(client) > MAX_CLIENT or UNSENDABLE.search(client)):
            return None
        return cast(RequestKind, kind), client if slash else None

    def parse_attachment(self, topic: str) -> tuple[str | None, str] | None:
        """The client and the name of an attachment's topic; None for a topic of another kind, or names not valid."""
        kind, _, rest = topic.removeprefix(self.own("request") + "/").partition("/")
        *client, name = rest.split("/")
        valid = all(map(is_level, (*client, name)))
        return (client[0] if client else None, name) if kind == "attachment" and valid else None

    def may_answer_on(self, topic: str, client: str | None) -> bool:
        """Whether a client may have answers sent there: anywhere else it would publish with the daemon's rights."""
        levels = topic.split("/")
        if client is None:
            below = topic.removeprefix(self.own("response/"))
            own = topic == self.own("response") or (below != topic and "/" not in below)
            allowed = own or topic.startswith(self.reply_prefixes)
        else:
            roots = (self.own("response", client), *(f"{prefix}{client}" for prefix in self.reply_prefixes))
            allowed = any(topic == root or topic.startswith(f"{root}/") for root in roots)
        return allowed and len(topic) <= MAX_TOPIC and len(levels) <= MAX_LEVELS and UNSENDABLE.search(topic) is None

    def address(self, requested: str | None, client: str | None, id: str | None) -> tuple[str, RequestError | None]:
        """Where an answer goes, and what is wrong with the requested topic, if anything."""
        default = self.own("response", client, id)
        if requested is None:
            return default, None
        if self.may_answer_on(requested, client):
            return requested, None
        where = [f"{prefix}{client or ''}" for prefix in self.reply_prefixes]
        allowed = f"{', '.join(where)} and {self.own('response', client)}"
        return default, RequestError("bad_reply_topic", f"answers go to topics below {allowed}; not to {requested!r}")


def decode_generate(payload: bytes) -> GenerateRequest:
    """A JSON object, or plain text as the prompt. Raises RequestError."""
    if payload.lstrip().startswith(b"{"):
        return decode_request(payload)
    if len(payload) > MAX_MESSAGE_BYTES:
        raise RequestError("too_large", f"a message may have {MAX_MESSAGE_BYTES} bytes; this one has {len(payload)}")
    if not payload:
        raise RequestError("bad_request", 'an empty message asks for nothing; send {"prompt": ""} for a free story')
    try:
        return GenerateRequest(prompt=payload.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError("bad_request", f"the prompt is not UTF-8: {error.reason} at byte {error.start}") from None
