"""Runs in Home Assistant's own Python: its core with the MQTT integration, and what it makes of our discovery message.

Prints one JSON object a line. See home_assistant.py, which starts it.
"""

import asyncio
import json
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from homeassistant import bootstrap, config_entries, loader
from homeassistant.const import __version__
from homeassistant.core import HomeAssistant, State
from homeassistant.core_config import async_process_ha_core_config
from homeassistant.setup import async_setup_component

TIMEOUT_S = 60.0
ENTITIES = 7


async def main(folder: str, port: int, prompt: str) -> None:
    """Set up, wait for the entities, send a prompt, wait for its story, and for the entities to go."""
    hass = HomeAssistant(folder)
    loader.async_setup(hass)
    hass.config.skip_pip = True
    config = {"http": {"server_host": "127.0.0.1", "server_port": free_port()}}
    hass.config_entries = config_entries.ConfigEntries(hass, config)
    await loader.async_get_custom_components(hass)
    await bootstrap.async_load_base_functionality(hass)
    await async_process_ha_core_config(hass, {})
    assert await async_setup_component(hass, "homeassistant", config)
    assert await async_setup_component(hass, "http", config)
    await hass.async_start()
    flow: dict[str, Any] = await hass.config_entries.flow.async_init("mqtt", context={"source": "user"})
    if flow["type"] == "menu":
        flow = await hass.config_entries.flow.async_configure(flow["flow_id"], {"next_step_id": "broker"})
    flow = await hass.config_entries.flow.async_configure(flow["flow_id"], {"broker": "127.0.0.1", "port": port})
    tell("set up", homeassistant=__version__, flow=flow["type"])

    def ours() -> list[State]:
        return [state for state in hass.states.async_all() if "kitchen" in state.entity_id]

    def known() -> bool:
        late = ("unknown", "unavailable")
        found = {state.entity_id.split(".")[0]: state.state for state in ours() if state.state not in late}
        return len(ours()) == ENTITIES and found.keys() >= {"sensor", "binary_sensor", "update"}

    await until(known)
    await until(lambda: all(s.state != "unknown" for s in ours() if s.entity_id.startswith("sensor.")))
    for state in sorted(ours(), key=lambda state: state.entity_id):
        tell("entity", id=state.entity_id, state=state.state, attributes=shown(state))
    (text,) = (state for state in ours() if state.entity_id.startswith("text."))
    (event,) = (state for state in ours() if state.entity_id.startswith("event."))
    sent = {"entity_id": text.entity_id, "value": prompt}
    began_s = time.monotonic()
    await hass.services.async_call("text", "set_value", sent, blocking=True)
    await until(lambda: current(hass, event).state != event.state)
    tell("story", seconds=round(time.monotonic() - began_s, 2), attributes=shown(current(hass, event)))
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)  # the daemon is started without it
    await until(lambda: not ours())
    tell("gone", entities=len(ours()))
    await hass.async_stop(force=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def current(hass: HomeAssistant, state: State) -> State:
    found: State = hass.states.get(state.entity_id)
    return found


def shown(state: State) -> dict[str, Any]:
    """What our message is responsible for."""
    hidden = ("icon", "friendly_name", "entity_picture", "supported_features")
    return {key: value for key, value in state.attributes.items() if key not in hidden and value is not None}


async def until(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up_s, "waited in vain"
        await asyncio.sleep(0.05)


def tell(what: str, **fields: Any) -> None:
    print(json.dumps({"what": what} | fields, default=str), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
