"""The daemon: a loaded bundle, its scheduler, and the transports that feed it, from start to drain."""

import argparse
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from edge.backends import may_use_gpu
from edge.config import Config, load_config, log_level, parse_broker
from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.scheduler import Scheduler
from edge.system import systemd
from edge.system.gpu_deaths import GpuDeaths
from edge.system.heartbeat import Sign
from edge.system.memory import give_back_freed
from edge.system.systemd import JournalFormatter
from edge.transports.unix_socket import SocketServer
from shared.errors import ConfigError, DeviceError, DiffusionLLMError, command_name

if TYPE_CHECKING:
    from edge.transports.http.server import HttpServer
    from edge.transports.mqtt.client import MqttTransport

log = logging.getLogger(__name__)

RELOADED: Final = ("bundle", "backend", "threads", "drain_s")
"""Settings that SIGHUP changes. The others belong to open sockets and connections."""
CLOSE_S: Final = 15.0
"""Time for a stop beyond the drain: a last step, the transports' last answers."""

EPILOG = """examples:
  python -m edge                                   the shipped bundle on the default socket
  python -m edge --mqtt broker.local               also through a broker
  python -m edge --http 127.0.0.1:8080             also over HTTP, with a page at that address
  python -m edge --config /etc/edgelm/edgelm.toml  everything else is set there; deploy/edgelm.toml explains it

Environment variables such as EDGELM_BUNDLE override the file, flags override both.
SIGHUP reads the file and the bundle again. When its terminal closes, the daemon finishes accepted requests and ends,
unless it was started with nohup."""


class Signals:
    """SIGTERM, Ctrl-C and SIGHUP through a pipe: handlers run no code that could deadlock with the interrupted one."""

    def __init__(self) -> None:
        self._in_terminal = has_terminal() and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN  # ignored: nohup
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)

    def wake(self) -> None:
        """End a wait from another thread, as signal 0."""
        with suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._writer, b"\0")

    def wait(self, timeout_s: float | None = None) -> int | None:
        """The number of the next signal; None after the timeout."""
        came = bool(select.select([self._reader], [], [], timeout_s)[0])
        return os.read(self._reader, 1)[0] if came else None

    def wait_for_reload(self) -> bool:
        """Whether the next signal requests a reload. SIGHUP from a closing terminal requests an end."""
        return self.wait() == signal.SIGHUP and not (self._in_terminal and not has_terminal())


def has_terminal() -> bool:
    """Whether this process has a controlling terminal that is still there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def seconds_since_start() -> float:
    """Age of this process, imports and all. The kernel counts in hundredths."""
    started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def serve(read_config: Callable[[], Config]) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish accepted requests; a second signal cuts that short.

    SIGHUP reloads configuration and bundle, unless it comes from a closing terminal. Raises ConfigError, BundleError or
    DeviceError when it cannot start, and DeviceError when the device fails later: systemd then starts a new process,
    which may be able to use the device.
    """
    config = read_config()
    give_back_freed()
    inherited = systemd.activated_sockets()
    path = config.socket if inherited.unix is None else Path(inherited.unix.getsockname())
    with ExitStack() as stack:
        worker = Scheduler(_load(config), config.queue_size)
        stack.callback(lambda: worker.loaded.close())
        signals = Signals()
        worker.on_failure = signals.wake
        mqtt = _make_mqtt(config, worker)
        http = _make_http(config, worker, mqtt, inherited.http)
        server = SocketServer(path, worker, inherited.unix, config.socket_group)
        server.start()
        stack.callback(server.close)
        if mqtt is not None:
            mqtt.start()
            stack.callback(mqtt.close)
        if http is not None:
            http.start()
            stack.callback(http.close)
        worker.start()
        stack.callback(worker.stop)
        signs: dict[str, Sign] = {"scheduler": worker.sign, "socket": server.heartbeat}
        signs |= {} if mqtt is None else mqtt.signs
        signs |= {} if http is None else http.signs
        watchdog = systemd.Watchdog(signs)
        watchdog.start()
        stack.callback(watchdog.stop)
        print(_ready_line(path, worker, mqtt=mqtt, http=http), flush=True)
        systemd.ready(f"serving {worker.model}")
        while signals.wait_for_reload():
            config = _reload(config, read_config, worker)
        if worker.failure is not None:
            systemd.stopping(CLOSE_S, f"the device has failed: {worker.failure}")
            raise DeviceError(f"the device has failed, and only a new start can use it again: {worker.failure}")
        _drain(config, worker, signals)
    GpuDeaths(config.state).end()


def _load(config: Config) -> LoadedBundle:
    """The bundle on its backend; on the CPU, degraded, once the daemon has died twice on the GPU."""
    # The link is resolved once: files of two bundles must not mix when it is replaced meanwhile.
    folder = config.bundle.resolve()
    if not may_use_gpu(config.backend):
        return LoadedBundle.load(folder, config.backend, config.threads)
    deaths = GpuDeaths(config.state)
    if (why := deaths.too_many()) is not None:
        log.warning("the CPU serves: %s", why)
        loaded = LoadedBundle.load(folder, "ort", config.threads)
        loaded.degraded = why
        return loaded
    deaths.begin()
    loaded = LoadedBundle.load(folder, config.backend, config.threads)
    if loaded.backend_name != "trt":
        deaths.cancel()
    return loaded


def _reload(config: Config, read_config: Callable[[], Config], worker: Scheduler) -> Config:
    """Serve the current configuration; on failure go on as before and log why in one sentence."""
    systemd.reloading()
    try:
        fresh = read_config()
        worker.replace_bundle(_load(fresh))
    except DiffusionLLMError as error:
        log.error("the reload failed, %s is still served: %s", worker.model, error)
        systemd.ready(f"serving {worker.model}; the last reload failed: {error}")
        return config
    except Exception:  # a backend may raise anything; the running one goes on
        log.exception("the reload failed, %s is still served", worker.model)
        systemd.ready(f"serving {worker.model}; the last reload failed: the log has the details")
        return config
    merged = msgspec.structs.replace(config, **{key: getattr(fresh, key) for key in RELOADED})
    later = [key for key in Config.__struct_fields__ if getattr(fresh, key) != getattr(merged, key)]
    if later:
        log.warning("changes of %s take effect at the next start", ", ".join(f"`{key}`" for key in later))
    log.info("reloaded: serving %s", worker.model)
    systemd.ready(f"serving {worker.model}")
    return merged


def _make_mqtt(config: Config, worker: Scheduler) -> "MqttTransport | None":
    if config.mqtt.host is None:
        if config.homeassistant.discovery:
            raise ConfigError("homeassistant.discovery needs mqtt.host: Home Assistant finds devices through a broker")
        return None
    from edge.transports.mqtt.client import MqttTransport  # saves 60 ms and 12 MB without a broker

    return MqttTransport(config, worker)


def _make_http(
    config: Config, worker: Scheduler, mqtt: "MqttTransport | None", inherited: tuple[socket.socket, ...]
) -> "HttpServer | None":
    if config.http.listen is None and not inherited:
        return None
    try:
        from edge.transports.http.server import HttpServer  # an event loop and a parser that others need not load
    except ModuleNotFoundError as error:
        missing = f"HTTP needs the package {error.name}: pip install 'diffusion-llm[web]'"
        raise ConfigError(missing) from None
    if mqtt is None:
        return HttpServer(config, worker, inherited=inherited)
    from edge.transports.mqtt.fleet_on_demand import FleetOnDemand

    return HttpServer(
        config,
        worker,
        outbox=mqtt.outbox,
        attachments=mqtt.attachments,
        inherited=inherited,
        fleet=FleetOnDemand(config.mqtt),
    )


def _ready_line(path: Path, worker: Scheduler, *, mqtt: "MqttTransport | None", http: "HttpServer | None") -> str:
    broker = "off" if mqtt is None else f"connecting to {mqtt.broker}"
    page = "" if http is None else f", {http.url}"
    line = f"ready in {seconds_since_start():.2f} s: socket {path}, mqtt {broker}{page}, bundle {worker.model}"
    return line if mqtt is None else f"{line}\nask it over MQTT: {mqtt.example}"


def _drain(config: Config, worker: Scheduler, signals: Signals) -> None:
    systemd.stopping(config.drain_s + CLOSE_S)
    log.info("stopping: finishing accepted requests, for at most %g s", config.drain_s)
    worker.refuse_new()
    give_up_s = time.monotonic() + config.drain_s
    while worker.busy and time.monotonic() < give_up_s:
        if signals.wait(0.02) in (signal.SIGTERM, signal.SIGINT):
            return


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and serve. Returns 0 after a drain."""
    parser = argparse.ArgumentParser(
        prog=command_name("edge"),
        description="Serve a bundle on a Unix socket and, where configured, over MQTT and HTTP.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file (default: none, or $EDGELM_CONFIG)")
    parser.add_argument("--bundle", metavar="DIR", help="bundle to serve (default: the shipped one)")
    parser.add_argument("--socket", metavar="PATH", help="Unix socket to listen on")
    parser.add_argument("--backend", metavar="NAME", help="what runs the model (default: auto)")
    parser.add_argument("--mqtt", metavar="HOST[:PORT]", help="broker to serve as well (default: none)")
    parser.add_argument("--http", metavar="HOST:PORT", help="address to serve HTTP on as well (default: none)")
    args = parser.parse_args(argv)
    given = {key: value for key in ("bundle", "socket", "backend") if (value := getattr(args, key)) is not None}
    given |= {} if args.mqtt is None else parse_broker(args.mqtt)
    given |= {} if args.http is None else {"http.listen": args.http}
    handler = logging.StreamHandler(sys.stderr)
    to_journal = systemd.on_journal()
    in_terminal = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JournalFormatter() if to_journal else in_terminal)
    logging.basicConfig(level=log_level(default="info"), handlers=[handler])
    try:
        serve(lambda: load_config(args.config, given))
    except DiffusionLLMError as error:
        if not to_journal:
            raise
        log.error("%s", error)
        return error.exit_code
    return 0
