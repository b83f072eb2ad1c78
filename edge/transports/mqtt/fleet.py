"""The devices of a broker, by what each publishes for everybody: `availability`, `state` and `metrics`.

Whoever may publish on those topics can say what they like: names, sizes and numbers are bounded, and a message that no
device would send is passed over.
"""

import time
from typing import Annotated, Final, get_args

import msgspec
from msgspec import Meta, Struct

from edge.config import Device as Name
from shared.messages import MAX_MESSAGE_BYTES, State

KINDS: Final = ("availability", "state", "metrics")
MAX_DEVICES: Final = 1000
_Short = Annotated[str, Meta(max_length=128)]
_Number = Annotated[float, Meta(ge=0, le=1e12)]


class _State(Struct, tag="health"):
    """What is read of a Health, by this release or another one."""

    state: _Short
    queued: Annotated[int, Meta(ge=0, le=1_000_000)]
    model: _Short
    backend: _Short
    version: _Short
    failure: Annotated[str, Meta(max_length=1100)] | None = None


class _Metrics(Struct, tag="metrics"):
    """What is read of Metrics."""

    tokens_per_s: _Number
    watts: dict[_Short, _Number] = {}
    read_s: _Number | None = None


class Device(Struct, frozen=True, kw_only=True):
    """One device, as far as it was heard. None: not reported yet.

    state: that of Health; "stopped" behind an orderly end, "vanished" where the broker lost it. watts: of the board's
    largest rail, which is its input where it has a sensor there. seen_s_ago: seconds since it spoke; if that was before
    we listened, by its own clock.
    """

    device: str
    state: str | None = None
    failure: str | None = None
    bundle: str | None = None
    version: str | None = None
    backend: str | None = None
    queued: int | None = None
    tokens_per_s: float | None = None
    watts: float | None = None
    seen_s_ago: float | None = None

    @property
    def online(self) -> bool:
        """Whether it is there and answers requests, on whatever backend."""
        return self.state in ("idle", "busy", "degraded")


class FleetView(Struct, frozen=True, kw_only=True):
    """All devices of a broker. left_out: there are more than MAX_DEVICES.

    connected: whether the broker is heard; if not, the devices are those heard last.
    """

    broker: str
    connected: bool
    left_out: bool
    devices: list[Device]


class Fleet:
    """What was heard. base: what topics begin with."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._devices: dict[str, Device] = {}
        self._offline: set[str] = set()
        self._seen_s: dict[str, float] = {}  # since 1970
        self.left_out = False

    def hear(self, topic: str, payload: bytes, *, retained: bool) -> None:
        """Take a message in. retained: it was published before we listened, who knows when."""
        name, _, kind = topic.removeprefix(f"{self._base}/").partition("/")
        if kind not in KINDS or len(payload) > MAX_MESSAGE_BYTES:
            return
        known = self._devices.get(name, Device(device=name))
        if kind == "availability" and not payload:  # somebody cleared it away
            self._devices.pop(name, None)
            return
        seen_s = None if retained else time.time()
        try:
            msgspec.convert(name, Name)
            if kind == "state":
                s = msgspec.json.decode(payload, type=_State)
                known = msgspec.structs.replace(
                    known,
                    state=s.state,
                    failure=s.failure,
                    bundle=s.model,
                    version=s.version,
                    backend=s.backend,
                    queued=s.queued,
                )
            elif kind == "metrics":
                m = msgspec.json.decode(payload, type=_Metrics)
                known = msgspec.structs.replace(
                    known, tokens_per_s=m.tokens_per_s, watts=max(m.watts.values(), default=None)
                )
                seen_s = m.read_s if retained else seen_s
            elif payload == b"offline":
                seen_s = None  # its will, or its last word
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        if name not in self._devices and len(self._devices) >= MAX_DEVICES:
            self.left_out = True
            return
        if kind == "availability":
            (self._offline.add if payload == b"offline" else self._offline.discard)(name)
        self._devices[name] = known
        if seen_s is not None:
            self._seen_s[name] = max(seen_s, self._seen_s.get(name, 0.0))

    def devices(self) -> list[Device]:
        """Those heard so far, by name."""
        return [self._now(device) for _, device in sorted(self._devices.items())]

    def _now(self, device: Device) -> Device:
        seen_s, state = self._seen_s.get(device.device), device.state
        if device.device in self._offline:
            state = "stopped" if state == "draining" else "vanished"
        elif state not in (None, *get_args(State)):
            state = "unknown"
        ago = None if seen_s is None else round(max(0.0, time.time() - seen_s), 1)
        return msgspec.structs.replace(device, state=state, seen_s_ago=ago)
