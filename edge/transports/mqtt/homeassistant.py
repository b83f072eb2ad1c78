"""Announces the device to Home Assistant by one retained MQTT discovery message, which lists its entities.

The entities read what is published anyway: `state`, `info`, `metrics`, `availability`. Home Assistant asks as client
`homeassistant`: prompts of its text entity go to request/generate/homeassistant, and its event entity reads the answers
on response/homeassistant. What was announced is remembered in the state folder, so that it can be withdrawn once the
option is off, or the name is another. The format: home-assistant.io/integrations/mqtt/#device-discovery-payload.
"""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, get_args

import msgspec

from edge.config import Config
from edge.system.installed import version
from edge.transports.mqtt.topics import Topics
from shared.messages import State

log = logging.getLogger(__name__)

CLIENT: Final = "homeassistant"
ANNOUNCED: Final = "homeassistant"
"""File of the state folder: the topics of retained messages, a line each."""
MAX_TEXT: Final = 255
"""Characters of any state in Home Assistant, so also of a text entity."""

Entity = dict[str, Any]


class Discovery:
    """Says `announce` to Home Assistant, or takes back what was announced before.

    publish: retains a message, and tells whether the broker has it.
    """

    def __init__(self, config: Config, topics: Topics, publish: Callable[[str, bytes], bool]) -> None:
        prefix, name = config.homeassistant.prefix, object_id(config.device)
        self._wanted = {f"{prefix}/device/{name}/config"} if config.homeassistant.discovery else set()
        self._birth = f"{prefix}/status" if config.homeassistant.discovery else None
        self._topics = topics
        self._publish = publish
        self._file = config.state / ANNOUNCED

    @property
    def subscriptions(self) -> list[tuple[str, int]]:
        """Where Home Assistant says that it has started, with the QoS; nothing while the option is off."""
        return [] if self._birth is None else [(self._birth, 0)]

    def is_birth(self, topic: str) -> bool:
        """Whether a message there is Home Assistant's own status."""
        return topic == self._birth

    def announce(self) -> None:
        """Publish the message, and remove those of other names or of an option that is off now."""
        try:
            known = _lines(self._file)
            if not self._wanted <= known:
                _remember(self._file, known | self._wanted)
            for topic in self._wanted:
                self._publish(topic, msgspec.json.encode(message(self._topics)))
            removed = {topic for topic in known - self._wanted if self._publish(topic, b"")}
            if removed:
                _remember(self._file, (known | self._wanted) - removed)
        except OSError as error:
            log.warning("the announcement to Home Assistant cannot be recorded, so none is sent: %s", error)


def object_id(device: str) -> str:
    """The device's name in discovery, which takes letters, digits, `_` and `-` alone."""
    return f"edgelm_{re.sub(r'[^A-Za-z0-9_-]', '_', device)}"


def message(topics: Topics) -> dict[str, Any]:
    """The discovery message of a device."""
    name = object_id(topics.device)
    maker = {"manufacturer": "diffusion-llm", "model": "Diffusion language model", "sw_version": version()}
    return {
        "device": {"identifiers": [name], "name": topics.device, **maker},
        "origin": {"name": "edgelm", "sw_version": version()},
        "availability_topic": topics.own("availability"),
        "components": {key: entity | {"unique_id": f"{name}_{key}"} for key, entity in entities(topics).items()},
    }


def entities(topics: Topics) -> dict[str, Entity]:
    """What Home Assistant shows of a device."""
    state, info, metrics = (topics.own(kind) for kind in ("state", "info", "metrics"))
    failing = "'ON' if value_json.state in ('error', 'degraded') else 'OFF'"
    bundle = "{'installed_version': value_json.model, 'latest_version': value_json.model}"
    answer = (
        "{'event_type': 'story' if value_json.status == 'ok' else value_json.status, 'text': value_json.text,"
        " 'seed': value_json.seed, 'bundle': value_json.model,"
        " 'error': value_json.error.message if value_json.error else none}"
    )
    return {
        "state": {
            "platform": "sensor",
            "name": "State",
            "device_class": "enum",
            "options": list(get_args(State)),
            "state_topic": state,
            "value_template": _template("value_json.state"),
        },
        "queue": {
            "platform": "sensor",
            "name": "Queue",
            "icon": "mdi:tray-full",
            "state_class": "measurement",
            "unit_of_measurement": "requests",
            "state_topic": state,
            "value_template": _template("value_json.queued"),
        },
        "speed": {
            "platform": "sensor",
            "name": "Tokens per second",
            "icon": "mdi:speedometer",
            "state_class": "measurement",
            "unit_of_measurement": "tokens/s",
            "suggested_display_precision": 1,
            "state_topic": metrics,
            "value_template": _template("value_json.tokens_per_s"),
        },
        "problem": {
            "platform": "binary_sensor",
            "name": "Problem",
            "device_class": "problem",
            "state_topic": state,
            "value_template": _template(failing),
            "json_attributes_topic": state,
            "json_attributes_template": _template("{'failure': value_json.failure} | to_json"),
        },
        "bundle": {
            "platform": "update",
            "name": "Bundle",
            "title": "Bundle",
            "entity_category": "diagnostic",
            "state_topic": info,
            "value_template": _template(f"{bundle} | to_json"),
        },
        "prompt": {
            "platform": "text",
            "name": "Prompt",
            "icon": "mdi:fountain-pen-tip",
            "min": 1,
            "max": MAX_TEXT,
            "qos": 1,
            "command_topic": topics.own("request", "generate", CLIENT),
            "command_template": _template("{'prompt': value} | to_json"),
        },
        "story": {
            "platform": "event",
            "name": "Story",
            "icon": "mdi:book-open-page-variant",
            "event_types": ["story", "error", "cancelled"],
            "qos": 1,
            "state_topic": topics.own("response", CLIENT),
            "value_template": _template(f"{answer} | to_json"),
        },
    }


def _template(expression: str) -> str:
    return "{{ " + expression + " }}"


def _lines(file: Path) -> set[str]:
    try:
        return set(file.read_text("utf-8").split("\n")) - {""}
    except FileNotFoundError:
        return set()


def _remember(file: Path, topics: set[str]) -> None:
    """Replace the file in one step; none when there is nothing to remember."""
    if not topics:
        file.unlink(missing_ok=True)
        return
    fresh = file.with_name(f"{file.name}.new")
    fresh.write_text("".join(f"{topic}\n" for topic in sorted(topics)), "utf-8")
    fresh.replace(file)
