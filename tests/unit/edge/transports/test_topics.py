"""Topics below a base of one level or several: whose they are, and where answers may go."""

import pytest

from edge.config import load_config
from edge.transports.mqtt.topics import Topics


def topics(base: str, *prefixes: str) -> Topics:
    return Topics(base, "dev", prefixes or (f"{base}/reply/",))


def test_topics_take_base_and_prefixes_from_the_settings() -> None:
    named = {"EDGELM_DEVICE": "dev", "EDGELM_MQTT_BASE_TOPIC": "home/stories"}
    assert Topics.of(load_config(environ=named)) == topics("home/stories")
    assert Topics.of(load_config(environ={"EDGELM_DEVICE": "dev"})).own("state") == "edgelm/dev/state"


@pytest.mark.parametrize("base", ["edgelm", "home/stories/upstairs"])
def test_topics_mean_the_same_below_any_base(base: str) -> None:
    found = topics(base)
    assert found.parse(f"{base}/dev/request/generate") == ("generate", None)
    assert found.parse(f"{base}/dev/request/cancel/alice") == ("cancel", "alice")
    for good in (f"{base}/dev/response", f"{base}/dev/response/1", f"{base}/reply/me", f"{base}/reply/me/2"):
        assert found.address(good, None, "1") == (good, None)
    for bad in (f"{base}/dev/response/alice/1", f"{base}/dev/state", f"{base}/other/response", "edgelm2/reply/me", "x"):
        address, error = found.address(bad, None, "1")
        assert address == f"{base}/dev/response/1" and error is not None and error.code == "bad_reply_topic"
    assert found.address(f"{base}/dev/response/alice/1", "alice", "1")[1] is None
    assert found.address(f"{base}/dev/response/bob/1", "alice", "1")[1] is not None


@pytest.mark.parametrize("base", ["edgelm", "home/stories/upstairs"])
def test_topics_of_a_pool_are_as_a_devices(base: str) -> None:
    found = topics(base).pool("kitchen")
    assert found.parse(f"{base}/pool/kitchen/request/generate/alice") == ("generate", "alice")
    assert found.address(None, "alice", "1") == (f"{base}/pool/kitchen/response/alice/1", None)
    assert found.address(f"{base}/pool/kitchen/claim", None, "1")[1] is not None
    assert (f"$share/kitchen/{base}/pool/kitchen/request/generate/+", 1) in found.subscriptions
    assert topics(base).pool_of(f"{base}/pool/kitchen/claim") == "kitchen"
    assert topics(base).pool_of(f"{base}/dev/request/generate") is None


@pytest.mark.parametrize("base", ["edgelm", "home/stories/upstairs"])
def test_topics_tell_senders_apart_by_where_their_answers_go(base: str) -> None:
    found = topics(base)
    assert found.sender(f"{base}/reply/alice/1") == found.sender(f"{base}/reply/alice/2") == f"{base}/reply/alice"
    assert found.sender(f"{base}/reply/bob/1") != found.sender(f"{base}/reply/alice/1")
    assert found.sender(f"{base}/dev/response/1") == f"{base}/dev/response"
