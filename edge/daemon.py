"""The daemon: an engine, its scheduler, and the transports that feed it, from start to drain."""

import argparse
import logging
import os
import select
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from edge.config import Config, load_config, parse_broker
from edge.engine import Engine
from edge.scheduler import Scheduler
from edge.unix_socket import SocketServer

if TYPE_CHECKING:
    from edge.mqtt import MqttTransport

log = logging.getLogger("edgelm")

EPILOG = """examples:
  python -m edge                                   the shipped bundle on the default socket
  python -m edge --mqtt broker.local               also through a broker
  python -m edge --config /etc/edgelm/edgelm.toml  everything else is set there; deploy/edgelm.toml explains it

Environment variables such as EDGELM_BUNDLE override the file, flags override both."""


class StopSignals:
    """SIGTERM and Ctrl-C as something to wait for, which no lock of the interrupted code can deadlock with."""

    def __init__(self) -> None:
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether a signal came before the time was up."""
        came = bool(select.select([self._reader], [], [], timeout_s)[0])
        if came:
            os.read(self._reader, 1)
        return came


def seconds_since_start() -> float:
    """Age of this process, imports and all. The kernel counts in hundredths."""
    started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def serve(config: Config) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what was accepted; a second signal cuts that short.

    Raises ConfigError or BundleError when it cannot start.
    """
    with ExitStack() as stack:
        engine = Engine.load(config.bundle, config.backend, config.threads)
        stack.callback(engine.close)
        worker = Scheduler(engine, config.queue_size)
        signals = StopSignals()
        mqtt = _make_mqtt(config, worker)
        socket = SocketServer(config.socket, worker)
        socket.start()
        stack.callback(socket.close)
        if mqtt is not None:
            mqtt.start()
            stack.callback(mqtt.close)
        worker.start()
        stack.callback(worker.stop)
        print(_ready_line(config, worker, mqtt), flush=True)
        signals.wait()
        _drain(config, worker, signals)


def _make_mqtt(config: Config, worker: Scheduler) -> "MqttTransport | None":
    if config.mqtt.host is None:
        return None
    from edge.mqtt import MqttTransport  # 60 ms and 12 MB that a daemon without a broker saves

    return MqttTransport(config, worker)


def _ready_line(config: Config, worker: Scheduler, mqtt: "MqttTransport | None") -> str:
    broker = "off" if mqtt is None else f"connecting to {mqtt.broker}"
    return f"ready in {seconds_since_start():.2f} s: socket {config.socket}, mqtt {broker}, bundle {worker.model}"


def _drain(config: Config, worker: Scheduler, signals: StopSignals) -> None:
    log.info("stopping: finishing what was accepted, for at most %g s", config.drain_s)
    worker.refuse_new()
    give_up_s = time.monotonic() + config.drain_s
    while worker.busy and time.monotonic() < give_up_s and not signals.wait(0.02):
        pass


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and serve. Returns 0 after a drain."""
    parser = argparse.ArgumentParser(
        prog="python -m edge",
        description="Serve a bundle on a Unix socket and, if a broker is configured, over MQTT.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file (default: none, or $EDGELM_CONFIG)")
    parser.add_argument("--bundle", metavar="DIR", help="bundle to serve (default: the shipped one)")
    parser.add_argument("--socket", metavar="PATH", help="Unix socket to listen on")
    parser.add_argument("--backend", metavar="NAME", help="what runs the model (default: ort)")
    parser.add_argument("--mqtt", metavar="HOST[:PORT]", help="broker to serve as well (default: none)")
    args = parser.parse_args(argv)
    given = {key: value for key in ("bundle", "socket", "backend") if (value := getattr(args, key)) is not None}
    broker = {} if args.mqtt is None else parse_broker(args.mqtt)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(message)s")
    serve(load_config(args.config, given | broker))
    return 0
