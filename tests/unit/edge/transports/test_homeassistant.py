"""The discovery message for Home Assistant, held against what its documentation lists.

Keys and bounds are those of www.home-assistant.io/integrations/: mqtt/#device-discovery-payload, mqtt/#discovery-topic,
sensor.mqtt, binary_sensor.mqtt, event.mqtt, text.mqtt and update.mqtt, compared with the schemas in the source of
release 2025.1.4. Home Assistant drops keys that it does not know without a word.
"""

import re
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from edge.config import Config, HomeAssistantConfig
from edge.transports.mqtt.homeassistant import ANNOUNCED, Discovery, message, object_id
from edge.transports.mqtt.topics import Topics

ROOT_KEYS: Final = {
    *("device", "origin", "components", "state_topic", "command_topic", "qos", "encoding"),
    *("availability", "availability_mode", "availability_topic", "availability_template"),
    *("payload_available", "payload_not_available"),
}
ROOT_REQUIRED: Final = {"device", "origin", "components"}
DEVICE_KEYS: Final = {
    *("configuration_url", "connections", "hw_version", "identifiers", "manufacturer", "model", "model_id", "name"),
    *("serial_number", "suggested_area", "sw_version", "via_device"),
}
ORIGIN_KEYS: Final = {"name", "sw_version", "support_url"}
ENTITY_KEYS: Final = {
    *("platform", "unique_id", "name", "icon", "enabled_by_default", "entity_category", "entity_picture", "qos"),
    *("encoding", "json_attributes_topic", "json_attributes_template", "state_topic", "value_template"),
    *("availability", "availability_mode", "availability_topic", "availability_template"),
    *("payload_available", "payload_not_available"),
}
PLATFORM_KEYS: Final[dict[str, set[str]]] = {
    "sensor": {
        *("device_class", "expire_after", "force_update", "last_reset_value_template", "options", "state_class"),
        *("suggested_display_precision", "unit_of_measurement"),
    },
    "binary_sensor": {"device_class", "expire_after", "force_update", "off_delay", "payload_on", "payload_off"},
    "event": {"device_class", "event_types"},
    "text": {"command_topic", "command_template", "max", "min", "mode", "pattern", "retain"},
    "update": {
        *("command_topic", "device_class", "display_precision", "latest_version_template", "latest_version_topic"),
        *("payload_install", "release_summary", "release_url", "retain", "title"),
    },
}
REQUIRED: Final[dict[str, set[str]]] = {
    "sensor": {"state_topic"},
    "binary_sensor": {"state_topic"},
    "event": {"state_topic", "event_types"},
    "text": {"command_topic"},
    "update": set(),
}
TOPIC: Final = re.compile(r"[A-Za-z0-9_-]+/device/[A-Za-z0-9_-]+/config")
MAX_TEXT: Final = 255
"""Of text.mqtt: `max` is at most 255, as any state."""
ENTITY_CATEGORIES: Final = {"config", "diagnostic"}
PUBLISHED: Final = {"state", "info", "metrics", "response/homeassistant"}
"""What entities may read, below BASE/DEVICE/."""


@pytest.fixture
def found() -> dict[str, Any]:
    return message(Topics("home/stories", "kitchen.1", ("home/stories/reply/",)))


def test_homeassistant_message_has_documented_keys_alone(found: dict[str, Any]) -> None:
    assert found.keys() <= ROOT_KEYS and found.keys() >= ROOT_REQUIRED
    assert found["device"].keys() <= DEVICE_KEYS and found["device"]["identifiers"]
    assert found["origin"].keys() <= ORIGIN_KEYS and found["origin"]["name"]
    for key, entity in found["components"].items():
        platform = entity["platform"]
        assert entity.keys() <= ENTITY_KEYS | PLATFORM_KEYS[platform], key
        assert entity.keys() >= REQUIRED[platform] | {"unique_id"}, key
        assert entity.get("entity_category", "diagnostic") in ENTITY_CATEGORIES


def test_homeassistant_message_has_every_kind_of_entity(found: dict[str, Any]) -> None:
    kinds = {key: entity["platform"] for key, entity in found["components"].items()}
    assert kinds == {
        **dict.fromkeys(("state", "queue", "speed"), "sensor"),
        "problem": "binary_sensor",
        "bundle": "update",
        "prompt": "text",
        "story": "event",
    }
    ids = [entity["unique_id"] for entity in found["components"].values()]
    assert len(set(ids)) == len(ids) and all(one.startswith("edgelm_kitchen_1_") for one in ids)


def test_homeassistant_message_keeps_the_limits(found: dict[str, Any]) -> None:
    text = found["components"]["prompt"]
    assert 0 <= text["min"] <= text["max"] <= MAX_TEXT
    state = found["components"]["state"]
    assert state["device_class"] == "enum" and "state_class" not in state and "unit_of_measurement" not in state
    assert len(msgspec.json.encode(found)) < 8192


def test_homeassistant_entities_read_what_is_published(found: dict[str, Any]) -> None:
    base = "home/stories/kitchen.1/"
    assert found["availability_topic"] == f"{base}availability"
    for entity in found["components"].values():
        for key in ("state_topic", "json_attributes_topic"):
            assert entity.get(key, f"{base}state").removeprefix(base) in PUBLISHED
    assert found["components"]["prompt"]["command_topic"] == f"{base}request/generate/homeassistant"


@pytest.mark.parametrize(("device", "name"), [("kitchen", "edgelm_kitchen"), ("a.b-c_9", "edgelm_a_b-c_9")])
def test_homeassistant_object_id_is_valid_in_its_topic(device: str, name: str) -> None:
    assert object_id(device) == name and TOPIC.fullmatch(f"homeassistant/device/{name}/config")


class Retained(dict[str, bytes]):
    """A broker's retained messages. away: it cannot be reached."""

    away = False

    def publish(self, topic: str, payload: bytes) -> bool:
        if not self.away:
            self[topic] = payload
            if not payload:
                del self[topic]
        return not self.away


def discovery(retained: Retained, state: Path, **changed: Any) -> Discovery:
    device = changed.pop("device", "one")
    config = Config(device=device, state=state, homeassistant=HomeAssistantConfig(**({"discovery": True} | changed)))
    return Discovery(config, Topics.of(config), retained.publish)


def test_homeassistant_is_not_told_unless_it_is_wanted(tmp_path: Path) -> None:
    retained = Retained()
    off = discovery(retained, tmp_path, discovery=False)
    off.announce()
    assert not retained and not list(tmp_path.iterdir())
    assert off.subscriptions == [] and not off.is_birth("homeassistant/status")


def test_homeassistant_message_is_removed_with_the_option(tmp_path: Path) -> None:
    retained = Retained()
    on = discovery(retained, tmp_path)
    on.announce()
    assert on.subscriptions == [("homeassistant/status", 0)] and on.is_birth("homeassistant/status")
    assert list(retained) == ["homeassistant/device/edgelm_one/config"]
    discovery(retained, tmp_path, discovery=False).announce()
    assert not retained and not list(tmp_path.iterdir())


def test_homeassistant_message_of_another_name_is_removed(tmp_path: Path) -> None:
    retained = Retained()
    discovery(retained, tmp_path).announce()
    discovery(retained, tmp_path, device="two").announce()
    assert list(retained) == ["homeassistant/device/edgelm_two/config"]
    discovery(retained, tmp_path, device="two", prefix="ha").announce()
    assert list(retained) == ["ha/device/edgelm_two/config"]


def test_homeassistant_message_is_removed_once_the_broker_is_there(tmp_path: Path) -> None:
    retained = Retained()
    discovery(retained, tmp_path).announce()
    off = discovery(retained, tmp_path, discovery=False)
    retained.away = True
    off.announce()
    assert retained and (tmp_path / ANNOUNCED).exists()
    retained.away = False
    off.announce()
    assert not retained and not (tmp_path / ANNOUNCED).exists()


def test_homeassistant_is_not_told_what_cannot_be_remembered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    retained = Retained()
    discovery(retained, tmp_path / "gone").announce()
    assert not retained and "Home Assistant" in caplog.text
