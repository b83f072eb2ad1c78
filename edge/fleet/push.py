"""Gives a bundle to many devices over ssh, in waves: the next one begins when every device of this one serves it.

By ssh, because it already says who may change a device. The device decides for itself: it checks hashes, signature and
self-test as `edgelm bundle install` always does, and keeps what it has when one of them fails. The broker only reports
how it went: whoever may publish there can make a push stop, but cannot have anything installed.
"""

import os
import re
import shlex
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge.system.bundle_download import RemoteBundle
from edge.system.bundle_store import SIGNATURE, check_files
from edge.transports.mqtt.fleet import Device
from edge.transports.mqtt.fleet_watch import FleetWatch
from shared.errors import ConfigError, DeviceError, one_line
from shared.manifest import MANIFEST, TOKENIZER, model_name

INSTALL_S: Final = 3600.0
"""For one device: the bundle's way there, its self-test, on a Jetson its engines."""
CONFIRM_S: Final = 60.0
POLL_S: Final = 0.2
HEALTHY: Final = ("idle", "busy")
SSH: Final = ("-oBatchMode=yes", "-oConnectTimeout=15", "-oServerAliveInterval=15", "-oServerAliveCountMax=4")
INSTALL: Final = """edgelm=/opt/edgelm/current/bin/edgelm
[ -x "$edgelm" ] || edgelm=edgelm
sudo=; [ "$(id -u)" = 0 ] || sudo="sudo -n"
$sudo "$edgelm" bundle install """
UNPACK: Final = """folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
tar -C "$folder" -xf -
"""


@dataclass(frozen=True)
class Parcel:
    """A bundle on its way. model: NAME@DIGEST. script: for a device's shell; archive: what that reads, if anything."""

    model: str
    script: str
    archive: Path | None


@contextmanager
def packed(source: str) -> Iterator[Parcel]:
    """A folder's bundle as an archive, or one at an https address, which devices download. Raises BundleError."""
    with tempfile.TemporaryDirectory(prefix="edgelm-push-") as name:
        folder = Path(name)
        if "://" in source:
            remote = RemoteBundle(source, None)
            remote.fetch_manifest(folder)
            yield Parcel(model_name(folder), INSTALL + shlex.quote(remote.address), None)
            return
        bundle, archive = Path(source), folder / "bundle.tar"
        manifest = check_files(bundle)
        files = [MANIFEST, TOKENIZER, *(graph.file for graph in manifest.graphs)]
        with tarfile.open(archive, "w") as tar:
            for file in [*files, *([SIGNATURE] if (bundle / SIGNATURE).exists() else [])]:
                tar.add(bundle / file, file)
        yield Parcel(model_name(bundle), f'{UNPACK}{INSTALL}"$folder"', archive)


@dataclass(frozen=True)
class Route:
    """How to reach a device: `destination` with its name in it, and further arguments of ssh."""

    destination: str
    arguments: Sequence[str] = ()

    def command(self, device: str, script: str) -> list[str]:
        """Of ssh; `{host}` is the device's name without the four digits that it has by default."""
        host = re.sub(r"-[0-9a-f]{4}$", "", device)
        destination = self.destination.replace("{device}", device).replace("{host}", host)
        return ["ssh", *self.arguments, *SSH, "--", destination, f"set -eu\n{script}"]


def chosen(devices: Sequence[Device], names: Sequence[str] | None, model: str) -> list[Device]:
    """The devices to change: those named or all that are there, but for those that serve it. Raises ConfigError."""
    there = {device.device: device for device in devices if device.online}
    for name in names or ():
        if name not in there:
            known = ", ".join(there) or "none"
            raise ConfigError(f"--device {name}: no such device is there; there are {known}")
    return [device for name, device in there.items() if name in (names or there) and device.bundle != model]


def push(
    parcel: Parcel, watch: FleetWatch, *, devices: Sequence[Device], wave: int, route: Route, say: Callable[[str], None]
) -> None:
    """Install on `wave` devices at a time. Raises DeviceError after the first wave in which one failed.

    A device that serves the bundle on what computed before has not failed, though it be degraded.
    """
    waves = [devices[start : start + wave] for start in range(0, len(devices), wave)]
    with ThreadPoolExecutor(max_workers=wave) as pool:
        for number, members in enumerate(waves, 1):
            say(f"wave {number} of {len(waves)}: {', '.join(device.device for device in members)}")
            failures = []
            for device, (served, told) in zip(
                members, pool.map(lambda d: _give(parcel, watch, d, route), members), strict=True
            ):
                say(f"{device.device}: {told}")
                failures += [] if served else [f"{device.device} failed: {told}"]
            if failures:
                raise DeviceError(f"stopped at wave {number} of {len(waves)}: {'; '.join(failures)}")


def serves(now: Device, before: Device) -> bool:
    """Whether a device that has a new bundle is well: as it was, or degraded on the backend that it had."""
    return now.state in HEALTHY or now.state == before.state or (now.online and now.backend == before.backend)


def _give(parcel: Parcel, watch: FleetWatch, device: Device, route: Route) -> tuple[bool, str]:
    """Install on one device, and wait until it says on the broker that it serves.  → whether it does; how, or why"""
    command = route.command(device.device, parcel.script)
    try:
        with (parcel.archive or Path(os.devnull)).open("rb") as archive:
            done = subprocess.run(
                command, stdin=archive, capture_output=True, text=True, errors="replace", timeout=INSTALL_S
            )
    except subprocess.TimeoutExpired:
        return False, f"not installed within {INSTALL_S:g} s"
    except FileNotFoundError:
        return False, "ssh is not installed here"
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"ssh ends with {done.returncode}"]
        return False, one_line(lines[-1].removeprefix("error: "))
    give_up_s = time.monotonic() + CONFIRM_S
    while True:
        now = next((d for d in watch.view().devices if d.device == device.device), device)
        if now.bundle == parcel.model and serves(now, device):
            why = "" if now.state in HEALTHY else f", {now.state}: {now.failure or 'it does not say why'}"
            return True, f"serves {parcel.model}{why}"
        if time.monotonic() > give_up_s:
            return False, f"installed, but it serves {now.bundle} and is {now.state}, {CONFIRM_S:g} s later"
        time.sleep(POLL_S)
