"""What a daemon has done and how it is: the message on MQTT's `metrics`, and what `/metrics` is rendered from."""

from typing import Annotated

from msgspec import Meta, Struct

from shared.manifest import Decoder
from shared.messages import PROTOCOL_VERSION, State

Count = Annotated[int, Meta(ge=0)]


class Histogram(Struct, frozen=True, forbid_unknown_fields=True):
    """How long things took. counts: of values up to each bound and above the one before; the last: above all bounds."""

    bounds_s: tuple[float, ...]
    counts: tuple[Count, ...]
    sum_s: float


class Decoded(Struct, frozen=True, forbid_unknown_fields=True):
    """What one decoder wrote in answers. passes: evaluations of the network; tokens_per_pass: None without any."""

    tokens: Count
    passes: Count
    tokens_per_pass: float | None


class Drafts(Struct, frozen=True, forbid_unknown_fields=True):
    """Of blocks, the drafts at one depth, 1 being the next token but one: how many, and how many the law drew too."""

    depth: Count
    drafted: Count
    kept: Count


class Metrics(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="metrics"):
    """Counters since the daemon started, and what is now.

    accepted: requests. answered: by "ok" or error code, refusals included. generated_tokens, decoded, drafts,
    latency and first_token: of "ok" answers; both times since acceptance. steps: runs of the network, a batch once.
    tokens_per_s: of the last minute. active: requests that are being computed, queued: accepted ones that wait.
    resident_mb, available_mb: memory of the daemon, and free for programs; megabytes, 10^6 bytes each. watts,
    celsius: by the board's own names; empty where it tells none. state, backend and failure: as in Health. read_s: when
    all this was read, seconds since 1970 by the device's clock.
    Over MQTT, dropped: replies not sent, because of the limits on their number and rate; undeliverable: answers given
    up because the broker refused them.
    """

    v: int = PROTOCOL_VERSION
    version: str
    model: str
    backend: str
    state: State
    failure: str | None = None
    uptime_s: float
    accepted: Count
    answered: dict[str, Count]
    active: Count
    queued: Count
    latency: Histogram
    first_token: Histogram
    prompt_tokens: Count
    generated_tokens: Count
    tokens_per_s: float
    steps: Count
    decoded: dict[Decoder, Decoded]
    drafts: list[Drafts]
    dropped: Count = 0
    undeliverable: Count = 0
    resident_mb: float
    available_mb: float | None
    watts: dict[str, float]
    celsius: dict[str, float]
    read_s: float
