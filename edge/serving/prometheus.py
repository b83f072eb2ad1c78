"""Renders metrics in Prometheus' text format 0.0.4, one family after another.

Names follow prometheus.io/docs/practices/naming: a prefix, base units, `_total` for counters. Every error code and
decoder has its series from the start, so that a rate sees the first increase.
"""

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Final, Literal, get_args

from shared.errors import ERROR_CODES
from shared.manifest import Decoder
from shared.messages import State
from shared.metrics import Histogram, Metrics

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

Labels = Mapping[str, str]
Sample = tuple[Labels, float]


def prometheus_text(metrics: Metrics, *, device: str) -> str:
    """The whole page that a scrape gets. device: its name, a label of `edgelm_info`."""
    m = metrics
    none: Labels = {}
    decoders: tuple[Decoder, ...] = get_args(Decoder)
    by_decoder = {d: m.decoded.get(d) for d in decoders}
    codes = dict.fromkeys(("ok", *ERROR_CODES), 0) | m.answered
    info = {"device": device, "version": m.version, "bundle": m.model, "backend": m.backend}
    families = [
        _family("info", "gauge", "What runs here; always 1.", [(info, 1)]),
        _family(
            "state",
            "gauge",
            "1 for the state that the daemon is in.",
            [({"state": name}, name == m.state) for name in get_args(State)],
        ),
        _family("uptime_seconds", "gauge", "Since the daemon started.", [(none, m.uptime_s)]),
        _family("requests_accepted_total", "counter", "Requests that were accepted.", [(none, m.accepted)]),
        _family(
            "requests_ended_total",
            "counter",
            "Requests that ended, by error code or ok; refusals included.",
            [({"code": code}, count) for code, count in codes.items()],
        ),
        _family("requests_active", "gauge", "Requests that are being computed.", [(none, m.active)]),
        _family("requests_queued", "gauge", "Accepted requests that wait.", [(none, m.queued)]),
        _histogram("request_duration_seconds", "From acceptance to the whole text.", m.latency),
        _histogram("first_token_seconds", "From acceptance to the first tokens.", m.first_token),
        _family("prompt_tokens_total", "counter", "Given tokens of answered requests.", [(none, m.prompt_tokens)]),
        _family(
            "generated_tokens_total",
            "counter",
            "Tokens of answers, by decoder.",
            [({"decoder": d}, decoded.tokens if decoded else 0) for d, decoded in by_decoder.items()],
        ),
        _family(
            "passes_total",
            "counter",
            "Evaluations of the network for answers, by decoder.",
            [({"decoder": d}, decoded.passes if decoded else 0) for d, decoded in by_decoder.items()],
        ),
        _family("steps_total", "counter", "Runs of the network; a batch counts once.", [(none, m.steps)]),
        _family("tokens_per_second", "gauge", "Tokens of answers, over the last minute.", [(none, m.tokens_per_s)]),
        _family(
            "drafts_total",
            "counter",
            "Drafts in passes of blocks, by depth.",
            [({"depth": str(d.depth)}, d.drafted) for d in m.drafts],
        ),
        _family(
            "drafts_kept_total",
            "counter",
            "Drafts that the law drew too, by depth.",
            [({"depth": str(d.depth)}, d.kept) for d in m.drafts],
        ),
        _family("replies_dropped_total", "counter", "MQTT replies beyond the limits.", [(none, m.dropped)]),
        _family(
            "answers_undeliverable_total", "counter", "Answers that the broker refused.", [(none, m.undeliverable)]
        ),
        _family("resident_memory_bytes", "gauge", "Memory of the daemon.", [(none, _bytes(m.resident_mb))]),
        _family(
            "available_memory_bytes",
            "gauge",
            "Memory that programs on this device can still take.",
            [] if m.available_mb is None else [(none, _bytes(m.available_mb))],
        ),
        _family("power_watts", "gauge", "By rail of the board.", [({"rail": k}, v) for k, v in m.watts.items()]),
        _family("temperature_celsius", "gauge", "By thermal zone.", [({"zone": k}, v) for k, v in m.celsius.items()]),
    ]
    return "".join(families)


def _family(name: str, kind: Literal["counter", "gauge"], explanation: str, samples: Iterable[Sample]) -> str:
    """A metric with its samples; nothing where there are none."""
    lines = [f"edgelm_{name}{_labels(labels)} {_number(value)}\n" for labels, value in samples]
    return "".join([_head(name, kind, explanation), *lines]) if lines else ""


def _histogram(name: str, explanation: str, histogram: Histogram) -> str:
    """Cumulative buckets, sum and count."""
    bounds = [*map(_number, histogram.bounds_s), "+Inf"]
    *_, total = cumulative = list(accumulate(histogram.counts))
    lines = [f'edgelm_{name}_bucket{{le="{le}"}} {n}\n' for le, n in zip(bounds, cumulative, strict=True)]
    ends = [f"edgelm_{name}_sum {_number(histogram.sum_s)}\n", f"edgelm_{name}_count {total}\n"]
    return "".join([_head(name, "histogram", explanation), *lines, *ends])


def _head(name: str, kind: str, explanation: str) -> str:
    return f"# HELP edgelm_{name} {explanation}\n# TYPE edgelm_{name} {kind}\n"


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    pairs = (f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return "{" + ",".join(pairs) + "}"


def _escaped(value: str) -> str:
    """A label's value: backslash, quote and line feed are written with a backslash."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    """In the shortest form that reads back as the same number."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _bytes(megabytes: float) -> float:
    return round(megabytes * 1e6)
