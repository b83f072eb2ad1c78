"""`edgelm fleet`: all devices of a broker, live; `edgelm fleet push`: one bundle for all of them."""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from edge.config import CONFIG, Config, load_config, parse_broker, settings_file
from edge.fleet.push import Route, chosen, packed, push
from edge.fleet.table import table
from edge.terminal_view import Redrawn
from edge.transports.mqtt.fleet_watch import FleetWatch
from shared.errors import ConfigError, command_name, run_main

REFRESH_S: Final = 1.0
EPILOG: Final = """examples:
  python -m edge.fleet --mqtt broker.local            a table, updated every second, until Ctrl-C
  python -m edge.fleet --mqtt broker.local --json     once, for programs; without a terminal the table is printed once
  python -m edge.fleet push --help                    the same bundle for all of them

Broker, user, TLS and base topic are those of the daemon's settings: --config, EDGELM_MQTT_HOST, EDGELM_MQTT_USERNAME,
EDGELM_MQTT_PASSWORD_FILE, EDGELM_MQTT_CA_FILE, … A device that the broker lost is `vanished`, one that was shut down
`stopped`. Tokens/s and watts are reported every minute."""

PUSH_EPILOG: Final = """examples:
  python -m edge.fleet push bundles/NAME --wave 2 --ssh admin@{host}.local
  python -m edge.fleet push https://files.example/bundles/NAME --wave 2 -- -F ssh_config -i key

A folder is copied through ssh; from an https address each device downloads for itself, and requires a signature. On
the device the user must be root, or allowed to run sudo without a password. ssh asks nothing: keys and host keys must
be known."""


def show(config: Config, *, as_json: bool) -> None:
    """The devices, once, or on a terminal until Ctrl-C. Raises DeviceError when the broker cannot be used."""
    with FleetWatch(config.mqtt) as watch:
        fleet = watch.settle()
        screen = Redrawn(sys.stdout)
        if as_json or not screen.live:
            print(msgspec.json.encode(fleet).decode() if as_json else "\n".join(table(fleet)))
            return
        with screen:
            while True:
                fleet = watch.view()
                there = sum(device.online for device in fleet.devices)
                lost = "" if fleet.connected else "; the broker is lost, trying again"
                screen.draw(table(fleet), f"{there} of {len(fleet.devices)} devices of {fleet.broker} are there{lost}")
                time.sleep(REFRESH_S)


def give(config: Config, args: argparse.Namespace, ssh_arguments: Sequence[str]) -> None:
    """Push a bundle, and say who runs what. Raises BundleError, ConfigError, and DeviceError where it stopped."""
    route = Route(args.ssh, ssh_arguments)
    with packed(args.bundle) as parcel, FleetWatch(config.mqtt) as watch:
        members = chosen(watch.settle().devices, args.device, parcel.model)
        if len(members) > 1 and route.command("a", "") == route.command("b", ""):
            raise ConfigError(
                f"--ssh {args.ssh} leads to one host for all devices: it must have {{device}} or {{host}}"
            )
        try:
            push(parcel, watch, devices=members, wave=args.wave, route=route, say=partial(print, flush=True))
        finally:
            fleet = watch.view()
            print("\n".join(table(fleet)))
            serving = sum(device.online and device.bundle == parcel.model for device in fleet.devices)
            print(f"{serving} of {len(fleet.devices)} devices serve {parcel.model}", flush=True)


def positive(text: str) -> int:
    """A number of devices, for argparse."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


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
    command = parser.add_subparsers(dest="command").add_parser(
        "push",
        help="install a bundle on all of them, in waves",
        description="Install a bundle on all devices that are there, a wave at a time; the first failure ends it.",
        epilog=PUSH_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[shared],
    )
    command.add_argument("bundle", metavar="DIR|URL", help="a bundle's folder, or the https address of one")
    command.add_argument("--wave", type=positive, default=1, metavar="N", help="devices at a time (default: 1)")
    command.add_argument(
        "--device", action="append", metavar="NAME", help="only this one; may be repeated (default: all)"
    )
    command.add_argument(
        "--ssh",
        default="{device}",
        metavar="DEST",
        help="where ssh goes: {device} is a device's name, {host} that without its four digits (default: {device})",
    )
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    if args.command == "push":
        give(broker_settings(args), args, argv[end + 1 :])
    else:
        show(broker_settings(args), as_json=args.json)
    return 0


if __name__ == "__main__":
    run_main(main)
