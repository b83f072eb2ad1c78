"""What the sandbox of the unit lets through, tried from inside."""

import json
from typing import Any

import pytest

from tests.systemd.device import (
    INSTALL,
    OFFLINE,
    PYTHON,
)
from tests.systemd.machine import NETWORK, Machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


PROBE = """
import ctypes, json, mmap, os, socket
def can(action):
    try:
        action()
    except OSError as error:
        return error.strerror or type(error).__name__
    return "can"
def reach(address):
    with socket.create_connection((address, 1883), timeout=3):
        pass
print(json.dumps({
    "read a home": can(lambda: open("/home/alice/diary").read()),
    "read root's home": can(lambda: os.listdir("/root")),
    "write the system": can(lambda: open("/usr/probe", "w")),
    "write settings": can(lambda: open("/etc/edgelm/probe", "w")),
    "write bundles": can(lambda: open("/opt/edgelm/bundles/probe", "w")),
    "write state": can(lambda: open("/var/lib/edgelm/probe", "w")),
    "write cache": can(lambda: open("/var/cache/edgelm/probe", "w")),
    "read settings": can(lambda: open("/etc/edgelm/edgelm.toml").read()),
    "reach this machine": can(lambda: reach("127.0.0.1")),
    "reach the network": can(lambda: reach("NETWORK")),
    "open a raw socket": can(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)),
    "open a packet socket": can(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)),
    "write code": can(lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)),
    "see init": can(lambda: os.stat("/proc/1")),
    "make a device": can(lambda: os.mknod("/tmp/probe", 0o20600, os.makedev(1, 3))),
    "become root": can(lambda: os.setuid(0)),
    "mount": can(lambda: os.chroot("/tmp")),
    "devices": sorted(os.listdir("/dev")),
}))
"""


def probe(device: Machine) -> dict[str, Any]:
    """What the daemon could do: the unit as it is installed, with another program in it."""
    device.write("/opt/edgelm/probe.py", PROBE.replace("NETWORK", NETWORK).splitlines())
    unit = device.run("systemctl", "cat", "edgelm.service").stdout
    lines = [
        line for line in unit.splitlines() if not line.startswith(("ExecStart=", "Type=", "Restart=", "Requires="))
    ]
    at = lines.index("[Service]") + 1
    lines[at:at] = ["Type=oneshot", f"ExecStart={PYTHON} /opt/edgelm/probe.py"]
    device.write("/etc/systemd/system/probe.service", lines)
    device.run("systemctl", "daemon-reload")
    device.run("systemctl", "start", "probe.service")
    said = device.run("journalctl", "-u", "probe.service", "-o", "cat", "--since=-60s").stdout.splitlines()
    found: dict[str, Any] = json.loads([line for line in said if line.startswith("{")][-1])
    return found


def test_sandbox_holds(device: Machine) -> None:
    found = probe(device)
    assert {what for what, verdict in found.items() if verdict == "can"} == {
        "write state",
        "write cache",
        "read settings",
        "reach this machine",
    }
    assert found["read a home"] in ("No such file or directory", "Permission denied")
    assert not {"kmsg", "sda", "vda", "mem"} & set(found["devices"])


def test_sandbox_opens_the_network_only_where_allowed(device: Machine) -> None:
    device.run("mosquitto_pub", "-h", NETWORK, "-t", "x", "-m", "y")  # outside of the sandbox it is there
    assert probe(device)["reach the network"] != "can"
    device.run(INSTALL, "--lan", environment=OFFLINE)
    assert probe(device)["reach the network"] == "can"
