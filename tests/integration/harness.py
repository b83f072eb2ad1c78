"""Real processes to test against: the daemon as its users start it, mosquitto, and clients of both."""

import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

ROOT = Path(__file__).resolve().parents[2]
EDGE = ("-m", "edge")
TIMEOUT_S = 20.0  # for what takes a fraction of a second unless the machine is busy


def clean_environment(**settings: str) -> dict[str, str]:
    """This environment with the daemon's settings replaced, and the packages found from any folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDGELM_")}
    return kept | {"PYTHONPATH": str(ROOT)} | {f"EDGELM_{name}": value for name, value in settings.items()}


def run_module(
    module: str, *args: str, temporary: Path | None = None, **settings: str
) -> subprocess.CompletedProcess[str]:
    """`python -m module args` until it ends. temporary: where it puts temporary files."""
    command = [sys.executable, "-m", module, *args]
    environment = clean_environment(**settings) | ({} if temporary is None else {"TMPDIR": str(temporary)})
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that is bound to happen."""
    give_up_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up_s, f"waited in vain: {what}"
        time.sleep(0.01)


class Line:
    """One connection to the Unix socket: objects in, objects out."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.connect(str(path))
        except OSError:
            self.sock.close()
            raise
        self.sock.settimeout(TIMEOUT_S)
        self._file = self.sock.makefile("rb")

    def send(self, *messages: dict[str, Any] | bytes) -> None:
        for message in messages:
            self.sock.sendall((message if isinstance(message, bytes) else json.dumps(message).encode()) + b"\n")

    def read(self) -> dict[str, Any] | None:
        """The next reply; None when the daemon hung up."""
        line = self._file.readline()
        reply: dict[str, Any] | None = json.loads(line) if line else None
        return reply

    def ask(self, message: dict[str, Any] | bytes) -> dict[str, Any]:
        """Send one message; its next reply."""
        self.send(message)
        reply = self.read()
        assert reply is not None
        return reply

    def close(self) -> None:
        self._file.close()
        self.sock.close()


class Daemon:
    """`python -m edge` as a process. program: stands for `-m edge`. environment: more variables for it; settings: its
    own, without EDGELM_.
    """

    def __init__(
        self,
        folder: Path,
        bundle: Path,
        *args: str,
        program: tuple[str, ...] = EDGE,
        environment: Mapping[str, str] = MappingProxyType({}),
        **settings: str,
    ) -> None:
        self.socket = folder / "s"
        self.log = folder / "log"
        self._lines: list[Line] = []
        command = [sys.executable, *program, "--bundle", str(bundle), "--socket", str(self.socket), *args]
        variables = clean_environment(**({"STATE": str(folder)} | settings)) | dict(environment)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        self.ready = self.process.stdout.readline()
        if not self.ready.startswith("ready in "):
            self.close()
            raise AssertionError(self.log.read_text())

    def line(self) -> Line:
        self._lines.append(Line(self.socket))
        return self._lines[-1]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def exit_code(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def close(self) -> None:
        for line in self._lines:
            line.close()
        self.process.terminate()
        try:
            self.process.wait(TIMEOUT_S)
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()


class Broker:
    """A mosquitto on a port of its own."""

    def __init__(self, folder: Path, *settings: str) -> None:
        if shutil.which("mosquitto_pub") is None and "CI" not in os.environ:
            pytest.skip("mosquitto is not installed: apt-get install mosquitto mosquitto-clients")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._config = folder / "mosquitto.conf"
        # Started by root it would become another user, who may not read a test's folder.
        user = ["user root"] if os.getuid() == 0 else []
        lines = [f"listener {self.port} 127.0.0.1", "allow_anonymous true", *user, *settings, ""]
        self._config.write_text("\n".join(lines))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> "Broker":
        program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
        assert program is not None
        self._process = subprocess.Popen([program, "-c", str(self._config)], stderr=subprocess.DEVNULL)
        until(self._listens, f"mosquitto on {self.address}")
        return self

    def tool(self, name: str, *args: str) -> str:
        """Run one of mosquitto's clients on it; its output."""
        command = [name, "-h", "127.0.0.1", "-p", str(self.port), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S).stdout

    def reload(self) -> None:
        """Have it read its configuration again, with the files that this names."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class Listener:
    """An MQTT 5 client that keeps what it hears below a topic, and can publish."""

    def __init__(self, port: int, topic: str = "edgelm/#") -> None:
        self.heard: queue.Queue[MQTTMessage] = queue.Queue()
        subscribed: queue.Queue[None] = queue.Queue()
        self.client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self.client.on_message = lambda client, userdata, message: self.heard.put(message)
        self.client.on_subscribe = lambda *_: subscribed.put(None)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        self.client.subscribe(topic, qos=1)
        subscribed.get(timeout=TIMEOUT_S)

    def publish(self, topic: str, payload: bytes | dict[str, Any], retain: bool = False, **properties: Any) -> None:
        """Publish bytes or an object, with MQTT 5 properties."""
        carried = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        for name, value in properties.items():
            setattr(carried, name, value)
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.client.publish(topic, body, qos=1, retain=retain, properties=carried).wait_for_publish(TIMEOUT_S)

    def next(self, *topics: str) -> MQTTMessage:
        """The next message on one of these topics; those on others are passed over."""
        while True:
            message = self.heard.get(timeout=TIMEOUT_S)
            if message.topic in topics:
                return message

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()
