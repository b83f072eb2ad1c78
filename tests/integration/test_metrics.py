"""What the daemon counts, told over MQTT and to Prometheus alike."""

from collections.abc import Callable

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from shared.metrics import Metrics
from tests.integration.harness import Broker, Daemon, Listener
from tests.integration.http_client import ask


def scraped(daemon: Daemon) -> dict[str, float]:
    """Name and label values of each sample that a scrape finds."""
    answer = ask(daemon, "/metrics")
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.body.decode())
    return {" ".join((s.name, *s.labels.values())): s.value for family in families for s in family.samples}


def test_metrics_over_mqtt_and_for_prometheus_say_the_same(
    start_daemon: Callable[..., Daemon], broker: Broker, listen: Callable[..., Listener]
) -> None:
    """Home Assistant's start has them sent at once."""
    listener = listen(broker, "#")
    daemon = start_daemon(
        *("--mqtt", broker.address, "--http", "127.0.0.1:0"), DEVICE="dev", HOMEASSISTANT_DISCOVERY="true"
    )
    listener.next("edgelm/dev/metrics")
    request = {"prompt": "Once", "steps": 4, "max_tokens": 4, "decode": "canvas"}
    for n in range(3):
        listener.publish("edgelm/dev/request/generate", request | {"id": str(n)})
        listener.next(f"edgelm/dev/response/{n}")
    listener.publish("edgelm/dev/request/generate", {"prompt": "Once", "colour": "blue"})
    listener.next("edgelm/dev/response")
    listener.publish("homeassistant/status", b"online")
    told = msgspec.json.decode(listener.next("edgelm/dev/metrics").payload, type=Metrics)
    found = scraped(daemon)

    assert told.answered == {"ok": 3, "bad_request": 1} and told.accepted == 3
    for code in ("ok", "bad_request", "internal"):
        assert found[f"edgelm_requests_ended_total {code}"] == told.answered.get(code, 0)
    assert told.decoded["canvas"].tokens == told.generated_tokens == found["edgelm_generated_tokens_total canvas"] == 12
    assert told.decoded["canvas"].passes == told.steps == found["edgelm_passes_total canvas"]
    assert sum(told.latency.counts) == found["edgelm_request_duration_seconds_count"] == 3
    assert abs(told.latency.sum_s - found["edgelm_request_duration_seconds_sum"]) < 1e-9
    assert sum(told.first_token.counts) == found["edgelm_first_token_seconds_count"] == 3
    assert found[f"edgelm_state {told.state}"] == 1 and told.state == "idle"
    assert told.tokens_per_s == 0.2 and told.resident_mb > 10


def test_metrics_count_replies_that_were_dropped_over_mqtt(
    start_daemon: Callable[..., Daemon], broker: Broker, listen: Callable[..., Listener]
) -> None:
    """On a topic whose client has an impossible name there is nobody to reply to."""
    listener = listen(broker, "edgelm/dev/#")
    daemon = start_daemon("--mqtt", broker.address, "--http", "127.0.0.1:0", DEVICE="dev")
    listener.next("edgelm/dev/metrics")
    listener.publish(f"edgelm/dev/request/generate/{'x' * 65}", b"Once")
    listener.publish("edgelm/dev/request/generate", {"id": "after", "prompt": "Once", "max_tokens": 2})
    listener.next("edgelm/dev/response/after")
    assert scraped(daemon)["edgelm_replies_dropped_total"] == 1
