"""`edgelm fleet`: all devices of a broker, live; `edgelm fleet push`: the same bundle for all of them."""

import argparse
import sys
import time
from pathlib import Path
from typing import Final

import msgspec

from edge.config import CONFIG, Config, load_config, parse_broker, settings_file
from edge.fleet.table import table
from edge.terminal_view import Redrawn
from edge.transports.mqtt.fleet import FleetWatch
from shared.errors import ConfigError, command_name, run_main

REFRESH_S: Final = 1.0
EPILOG: Final = """examples:
  python -m edge.fleet --mqtt broker.local            a table, every second anew, until Ctrl-C
  python -m edge.fleet --mqtt broker.local --json     once, for programs; without a terminal the table comes once, too

Broker, user, TLS and base topic are those of the daemon's settings: --config, EDGELM_MQTT_HOST, EDGELM_MQTT_USERNAME,
EDGELM_MQTT_PASSWORD_FILE, EDGELM_MQTT_CA_FILE, … A device that the broker lost is `vanished`, one that was shut down
`stopped`. Tokens/s and watts are told every minute."""


def show(config: Config, *, as_json: bool) -> None:
    """The devices, once, or on a terminal until Ctrl-C. Raises DeviceError when the broker cannot be used."""
    with FleetWatch(config.mqtt) as watch:
        devices = watch.settle()
        screen = Redrawn(sys.stdout)
        if as_json:
            print(msgspec.json.encode({"broker": watch.broker, "devices": devices}).decode())
            return
        if not screen.live:
            print("\n".join(table(devices, left_out=watch.left_out)))
            return
        with screen:
            while True:
                devices = watch.devices()
                there = sum(device.online for device in devices)
                lost = "" if watch.connected else "; the broker is lost, trying again"
                lines = table(devices, left_out=watch.left_out)
                screen.draw(lines, f"{there} of {len(devices)} devices of {watch.broker} are there{lost}")
                time.sleep(REFRESH_S)


def broker_settings(args: argparse.Namespace) -> Config:
    """The settings, with a broker. Raises ConfigError."""
    given = {} if args.mqtt is None else parse_broker(args.mqtt)
    config = load_config(settings_file(args.config), given)
    if config.mqtt.host is None:
        raise ConfigError(
            "no broker is set: name one by --mqtt HOST, `mqtt.host` in --config FILE, or EDGELM_MQTT_HOST"
        )
    return config


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run the command."""
    shared = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    shared.add_argument(
        "--config", type=Path, metavar="FILE", help=f"the daemon's settings (default: {CONFIG}, if it exists)"
    )
    shared.add_argument("--mqtt", metavar="HOST[:PORT]", help="the broker (default: that of the settings)")
    parser = argparse.ArgumentParser(
        prog=command_name("edge.fleet"),
        description="All devices of a broker.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[shared],
    )
    parser.set_defaults(config=None, mqtt=None)
    parser.add_argument("--json", action="store_true", help="one object with a list of them")
    args = parser.parse_args(argv)
    show(broker_settings(args), as_json=args.json)
    return 0


if __name__ == "__main__":
    run_main(main)
