"""deploy/grafana: every query names metrics and labels that exist, and returns something in a real Prometheus."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.prometheus import prometheus_text
from edge.serving.scheduler import Scheduler
from tests.integration.harness import ROOT, Daemon, until
from tests.integration.http_client import address_of
from tests.support.mailbox import submit

DEPLOY: Final = ROOT / "deploy" / "grafana"
DASHBOARD: Final = json.loads((DEPLOY / "edgelm.json").read_text("utf-8"))
QUERIES: Final = [(p["title"], target["expr"]) for p in DASHBOARD["panels"] for target in p["targets"]]
RULES: Final = re.findall(r"^ +expr: (.+)$", (DEPLOY / "edgelm.rules.yml").read_text("utf-8"), re.MULTILINE)
BOARDS: Final = ("edgelm_power_watts", "edgelm_temperature_celsius")
"""What only some boards tell."""


@pytest.fixture(scope="module")
def series(blocks_bundle: Path) -> dict[str, set[str]]:
    """The labels of each sample that a daemon serves, on a board that tells everything."""
    scheduler = Scheduler(LoadedBundle.load(blocks_bundle, "fake"), queue_size=4)
    scheduler.start()
    submit(scheduler, prompt="abc", max_tokens=41).response()
    metrics = replace(scheduler.metrics(), watts={"VDD_IN": 5.0}, celsius={"cpu-thermal": 50.0})
    scheduler.stop()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(prometheus_text(metrics, device="kitchen")):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def faults(query: str, series: dict[str, set[str]]) -> list[str]:
    """Metrics and labels of a query that no daemon serves; `instance` and `job` are Prometheus' own."""
    names = re.findall(r"\bedgelm_\w+", query)
    known = set().union(*(series.get(name, set()) for name in names)) | {"instance", "job", "le"}
    labels = {label for group in re.findall(r"by \((.*?)\)", query) for label in group.split(", ")}
    labels |= set(re.findall(r"[{,](\w+)=~?\"", query))
    return [*(name for name in names if name not in series), *(labels - known)]


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[f"{title} {n}" for n, (title, _) in enumerate(QUERIES)])
def test_dashboard_queries_name_what_is_served(title: str, query: str, series: dict[str, set[str]]) -> None:
    assert "edgelm_" in query and faults(query, series) == []


def test_dashboard_legends_name_labels_of_their_query(series: dict[str, set[str]]) -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            grouped = re.findall(r"by \((.*?)\)", target["expr"])
            (name, *_) = re.findall(r"\bedgelm_\w+", target["expr"])
            labels = set(grouped[0].split(", ")) if grouped else series[name] | {"instance"}
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels, panel["title"]


def test_dashboard_shows_every_metric(series: dict[str, set[str]]) -> None:
    """What is left out is told by another one on the same page."""
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for _, q in QUERIES for name in re.findall(r"edgelm_\w+", q)}
    all_of_them = {re.sub(r"_(bucket|sum|count)$", "", name) for name in series}
    assert all_of_them - shown == {"edgelm_steps_total", "edgelm_tokens_per_second", "edgelm_prompt_tokens_total"}


def test_dashboard_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@pytest.mark.parametrize("rule", RULES)
def test_alerts_name_what_is_served(rule: str, series: dict[str, set[str]]) -> None:
    assert faults(rule, series) == []


def test_queries_with_a_fault_are_found(series: dict[str, set[str]]) -> None:
    assert faults('sum by (code) (rate(edgelm_requests_total{instance=~"x"}[5m]))', series) != []
    assert faults('sum by (kode) (rate(edgelm_requests_ended_total{instance=~"x"}[5m]))', series) == ["kode"]
    assert faults('edgelm_state{stat=~"error"}', series) == ["stat"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def prometheus(tmp_path: Path, daemon: Daemon) -> Iterator[int]:
    """The port of a real Prometheus with our configuration, which scrapes the daemon every second."""
    shutil.copy(DEPLOY / "edgelm.rules.yml", tmp_path)
    text = (DEPLOY / "prometheus.yml").read_text("utf-8")
    host, served = address_of(daemon)
    for shipped, here in {"127.0.0.1:8080": f"{host}:{served}", "15s": "1s"}.items():
        assert shipped in text
        text = text.replace(shipped, here)
    (tmp_path / "prometheus.yml").write_text(text)
    port = free_port()
    places = ["--config.file", str(tmp_path / "prometheus.yml"), "--storage.tsdb.path", str(tmp_path / "tsdb")]
    with (tmp_path / "prometheus.log").open("wb") as log:
        command = ["prometheus", *places, "--web.listen-address", f"127.0.0.1:{port}"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    yield port
    process.terminate()
    process.wait(20)


@pytest.fixture
def daemon(start_daemon: Callable[..., Daemon], blocks_bundle: Path) -> Daemon:
    return start_daemon("--bundle", str(blocks_bundle), "--http", "127.0.0.1:0")


def ask(port: int, path: str, **query: str) -> Any:
    """The data of Prometheus' HTTP API."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(query)}") as answer:
        return json.load(answer)["data"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_dashboard_queries_return_series_in_a_real_prometheus(daemon: Daemon, prometheus: int) -> None:
    def found(query: str) -> list[dict[str, Any]]:
        plain = query.replace("$__rate_interval", "10s").replace("$instance", ".*")
        result: list[dict[str, Any]] = ask(prometheus, "query", query=plain)["result"]
        return result

    def up() -> bool:
        try:
            return bool(found("edgelm_info"))
        except OSError:  # it does not listen yet
            return False

    until(up, "the first scrape")
    line = daemon.line()
    for n in range(5):
        assert line.ask({"prompt": "abc", "max_tokens": 41, "decode": ("blocks", "canvas")[n % 2]})["status"] == "ok"
        time.sleep(1)
    unmeasured = {query for _, query in QUERIES if any(name in query for name in BOARDS) and not found(query)}
    assert len(unmeasured) <= 2
    for _, query in QUERIES:
        if query not in unmeasured:
            until(lambda query=query: bool(found(query)), query)  # type: ignore[misc]

    def rules() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = ask(prometheus, "rules")["groups"][0]["rules"]
        return found

    until(lambda: {rule["health"] for rule in rules()} == {"ok"}, "an evaluation of the alerts")
    assert len(rules()) == len(RULES) and {rule["state"] for rule in rules()} == {"inactive"}
