"""One machine for all tests of a process, with the service installed; the tests leave it as they found it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.systemd.device import INSTALL, OFFLINE
from tests.systemd.machine import Machine, fetch_wheels, why_not


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """Booted, and nothing installed."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    machine = Machine()
    try:
        try:
            fetch_wheels(machine.root / "srv/wheels")
        except subprocess.CalledProcessError:
            if "CI" in os.environ:
                raise
            pytest.skip("the package index cannot be reached for the wheels that the installation needs")
        machine.boot()
        print(f"booted in {machine.boot_s:.1f} s")
        yield machine
    finally:
        machine.close()


@pytest.fixture(scope="session")
def device(machine: Machine) -> Machine:
    """With the service installed and running, and a broker beside it."""
    machine.run(INSTALL, environment=OFFLINE)
    listeners = ["listener 1883 127.0.0.1", "listener 1883 10.20.30.40"]
    machine.write("/srv/mosquitto.conf", [*listeners, "allow_anonymous true", "user root"])
    machine.run("systemd-run", "--unit=broker", "mosquitto", "-c", "/srv/mosquitto.conf")
    machine.run("usermod", "--append", "--groups=edgelm", "alice")
    return machine


@pytest.fixture(autouse=True)
def starts_counted_anew(request: pytest.FixtureRequest) -> None:
    """All tests restart one service, which may start ten times in five minutes."""
    if "device" in request.fixturenames:
        device: Machine = request.getfixturevalue("device")
        device.run("systemctl", "reset-failed", "edgelm.service", check=False)


@pytest.fixture
def drop_in(device: Machine) -> Iterator[Path]:
    """The file of a drop-in for one test, gone at its end; the test reloads systemd and restarts."""
    file = device.root / "etc/systemd/system/edgelm.service.d/99-test.conf"
    file.parent.mkdir(exist_ok=True)
    yield file
    file.unlink(missing_ok=True)
    device.run("systemctl", "daemon-reload")
    device.run("systemctl", "restart", "edgelm.service")


@pytest.fixture
def settings(device: Machine) -> Iterator[Path]:
    """The settings file, put back at the end with a restart."""
    file = device.root / "etc/edgelm/edgelm.toml"
    kept = file.read_text()
    yield file
    file.write_text(kept)
    device.run("systemctl", "restart", "edgelm.service")


@pytest.fixture
def on_mqtt(device: Machine, settings: Path) -> Path:
    """Served through the broker of this machine."""
    text = settings.read_text().replace("# host = ", "host = ").replace("broker.local", "127.0.0.1")
    settings.write_text(text.replace("# device = ", "device = "))
    device.run("systemctl", "restart", "edgelm.service")
    return settings
