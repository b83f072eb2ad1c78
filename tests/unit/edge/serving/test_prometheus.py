"""The text for Prometheus, read by Prometheus' own parser."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from msgspec.structs import replace
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.prometheus import prometheus_text
from edge.serving.scheduler import Scheduler
from shared.errors import ERROR_CODES
from shared.manifest import Decoder
from shared.messages import State
from shared.metrics import Histogram, Metrics
from tests.support.mailbox import submit


@pytest.fixture(scope="module")
def metrics(blocks_bundle: Path) -> Iterator[Metrics]:
    """Of a scheduler that has written two texts and refused one request."""
    scheduler = Scheduler(LoadedBundle.load(blocks_bundle, "fake"), queue_size=4)
    scheduler.start()
    submit(scheduler, prompt="abc", max_tokens=41, decode="blocks").response()
    submit(scheduler, prompt="abc", max_tokens=8, decode="canvas", steps=4).response()
    submit(scheduler, prompt="time " * 5000).response()
    yield scheduler.metrics()
    scheduler.stop()


def parsed(metrics: Metrics, device: str = "kitchen") -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(prometheus_text(metrics, device=device))}


def values(family: Metric) -> dict[str, float]:
    """Samples by the value of their one label, or by their own name without one."""
    return {next(iter(sample.labels.values()), sample.name): sample.value for sample in family.samples}


def test_prometheus_text_tells_what_was_done(metrics: Metrics) -> None:
    found = parsed(metrics)
    ended = values(found["edgelm_requests_ended"])
    assert ended == dict.fromkeys(("ok", *ERROR_CODES), 0.0) | {"ok": 2.0, "too_large": 1.0}
    assert values(found["edgelm_generated_tokens"]) == {"blocks": 41.0, "canvas": 8.0}
    assert values(found["edgelm_passes"]) == {"blocks": 11.0, "canvas": 4.0}
    assert values(found["edgelm_drafts"]) == values(found["edgelm_drafts_kept"])  # the fake's drafts all hold
    assert values(found["edgelm_drafts"])["1"] > 0
    assert values(found["edgelm_tokens_per_second"])["edgelm_tokens_per_second"] == round(49 / 60, 3)
    assert values(found["edgelm_resident_memory_bytes"])["edgelm_resident_memory_bytes"] > 10e6


def test_prometheus_text_says_what_runs(metrics: Metrics) -> None:
    found = parsed(metrics)
    (info,) = found["edgelm_info"].samples
    assert info.labels.pop("bundle").startswith("blocks@") and info.labels.pop("version")
    assert info.labels == {"device": "kitchen", "backend": "fake"} and info.value == 1
    states = values(found["edgelm_state"])
    assert list(states) == list(get_args(State)) and states["idle"] == 1 == sum(states.values())


def test_prometheus_text_has_cumulative_histograms(metrics: Metrics) -> None:
    times = Histogram((0.1, 1.0), (3, 0, 2), 12.5)
    for name, field in (("request_duration", "latency"), ("first_token", "first_token")):
        family = parsed(replace(metrics, **{field: times}))[f"edgelm_{name}_seconds"]
        assert family.type == "histogram"
        samples = {sample.name + sample.labels.get("le", ""): sample.value for sample in family.samples}
        base = f"edgelm_{name}_seconds"
        buckets = {f"{base}_bucket0.1": 3, f"{base}_bucket1": 3, f"{base}_bucket+Inf": 5}
        assert samples == buckets | {f"{base}_sum": 12.5, f"{base}_count": 5}


def test_prometheus_text_leaves_out_what_nobody_measured(metrics: Metrics) -> None:
    bare = replace(metrics, watts={}, celsius={}, drafts=[], available_mb=None)
    text = prometheus_text(bare, device="kitchen")
    for name in ("power", "temperature", "drafts", "available"):
        assert f"edgelm_{name}" not in text
    board = replace(metrics, watts={"VDD_IN": 5.25}, celsius={"cpu-thermal": 48.5})
    assert values(parsed(board)["edgelm_power_watts"]) == {"VDD_IN": 5.25}
    assert values(parsed(board)["edgelm_temperature_celsius"]) == {"cpu-thermal": 48.5}


@pytest.mark.parametrize("name", ['a "quoted" rail', "back\\slash", "two\nlines", "λ", "a\\n", '\\"', ""])
def test_prometheus_text_escapes_labels(metrics: Metrics, name: str) -> None:
    assert values(parsed(replace(metrics, watts={name: 1.0}))["edgelm_power_watts"]) == {name: 1.0}


def test_prometheus_names_follow_the_conventions(metrics: Metrics) -> None:
    """prometheus.io/docs/practices/naming: a prefix, base units, `_total` at counters alone; help for each."""
    board = replace(metrics, watts={"a": 1.0}, celsius={"b": 2.0})
    text = prometheus_text(board, device="kitchen")
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    helps = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE))
    assert kinds.keys() == helps.keys() and len(kinds) > 20 and text.endswith("\n")
    for name, kind in kinds.items():
        assert re.fullmatch(r"edgelm_[a-z_]+", name)
        assert name.endswith("_total") == (kind == "counter"), name
        assert not re.search(r"_(ms|mb|milliseconds|megabytes)(_|$)", name)
    assert set(get_args(Decoder)) == set(values(parsed(board)["edgelm_passes"]))
