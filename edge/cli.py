"""`edgelm`: the commands of the device under one name. Each is also available as `python -m edge…`."""

import importlib
import logging
import sys
from typing import Final

from shared.errors import ConfigError, run_main

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "serve": ("edge.daemon", "answer requests on a Unix socket and over MQTT"),
    "generate": ("edge.generate", "write a text, by the daemon or without one"),
    "bundle": ("edge.bundle", "install, list, roll back and verify bundles"),
    "fleet": ("edge.fleet.__main__", "see all devices of a broker, and give them a bundle"),
    "build": ("edge.build", "build the TensorRT engine of a bundle on this device"),
    "doctor": ("edge.doctor", "what this device has, what it lacks, and what to fix first"),
    "bench": ("edge.measure.bench", "measure a bundle on this device"),
    "demo": ("edge.demo", "start a daemon, watch it write a story, stop it"),
}
"""Sub-command → its module, imported only when called, and its help."""

USAGE: Final = """usage: edgelm [--debug] COMMAND ...
       edgelm --version

commands:
{commands}

  --debug    on an error, a traceback instead of one sentence

`edgelm COMMAND --help` explains a command. EDGELM_LOG sets the log level: debug, info, warning or error."""


def main(arguments: list[str]) -> int | None:
    """Run a sub-command. Raises ConfigError for an unknown one."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:10} {what}" for name, (_, what) in COMMANDS.items())))
        return 0
    if name == "--version":
        from edge.system.installed import version  # 30 ms that only this command needs

        print(f"edgelm {version()}")
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}")
    if name != "serve":  # the daemon configures its own log
        from edge.config import log_level

        logging.basicConfig(level=log_level(default="warning"), format="%(levelname)s %(message)s")
    sys.argv = [f"edgelm {name}", *rest]
    status: int | None = importlib.import_module(COMMANDS[name][0]).main()
    return status


def run() -> None:
    """The program `edgelm`."""
    debug, arguments = sys.argv[1:2] == ["--debug"], sys.argv[1:]
    run_main(lambda: main(arguments[debug:]), debug=debug)


if __name__ == "__main__":
    run()
