"""`edgelm fleet push` over a real sshd, to daemons on a real broker.

A device is a daemon, a store, and a key of its own at the sshd, whose forced command gives what runs there that
device's `edgelm`: the real one with the device's store and key, and SIGHUP behind it where systemd would reload.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.backends.trt import engine_cache
from edge.backends.trt.find_tensorrt import is_gpu_device
from edge.fleet import push
from tests.integration.harness import ROOT, TIMEOUT_S, Broker, Daemon, clean_environment, until
from tests.integration.test_bundle_command import bundle_command, needs_minisign, variant
from tests.integration.test_fleet import devices
from tests.support.https_server import HttpsServer

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    needs_minisign,
    pytest.mark.skipif(SSHD is None, reason="openssh-server is not installed"),
    pytest.mark.skipif(os.getuid() != 0, reason="only root lets root in by ssh, as a device does"),
]
NAMES = ("attic", "kitchen", "shed")


def shell(command: str) -> None:
    subprocess.run(["bash", "-euc", command], check=True, capture_output=True)


class Site:
    """Three devices, an sshd that leads to them, and a key that signs bundles."""

    def __init__(self, folder: Path, broker: Broker, bundle: Path) -> None:
        self.folder, self.broker, self.bundle = folder, broker, bundle
        self.daemons: dict[str, Daemon] = {}
        self.key = self.make_key("owner")
        (folder / "config").write_text("")
        (folder / "authorized").write_text("")
        for name in NAMES:
            self.add(name)
        shell(f"ssh-keygen -q -t ed25519 -N '' -f {folder}/host")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        (folder / "known").write_text(f"[127.0.0.1]:{self.port} {(folder / 'host.pub').read_text()}")
        options = {
            "HostKey": folder / "host",
            "AuthorizedKeysFile": folder / "authorized",
            "ListenAddress": f"127.0.0.1:{self.port}",
            "UsePAM": "no",
            "StrictModes": "no",
            "PidFile": "none",
        }
        given = " ".join(f"-o {name}={value}" for name, value in options.items())
        # /run/sshd, where sshd locks itself in, lies in a mount namespace of its own
        start = f"mount -t tmpfs none /run && mkdir -m 755 /run/sshd && exec {SSHD} -D -e -f /dev/null {given}"
        self.log = (folder / "sshd.log").open("w")
        self.sshd = subprocess.Popen(["unshare", "-m", "sh", "-c", start], stdout=self.log, stderr=self.log)
        until(self._listens, "sshd")
        until(lambda: sum(d["bundle"] is not None for d in devices(broker).values()) == len(NAMES), "all devices")

    def add(self, name: str, backend: str = "ort") -> None:
        """A device of that name, which serves the bundle, and has a cache of engines of its own."""
        home = self.folder / name
        store = home / "store"
        (home / "bin").mkdir(parents=True)
        done = bundle_command(store, "install", self.bundle)
        assert done.returncode == 0, done.stderr
        arguments = ["--backend", backend, "--mqtt", self.broker.address]
        own = {"CACHE_DIRECTORY": str(home / "cache")}
        self.daemons[name] = Daemon(home, store / "current", *arguments, environment=own, DEVICE=name, THREADS="2")
        shutil.copy(self.folder / "owner.pub", home / "minisign.pub")
        variables = " ".join(f"{key}={shlex.quote(value)}" for key, value in clean_environment().items())
        program = f'{sys.executable} -m edge.bundle install "$3" --store {store} --key {home}/minisign.pub'
        reload = f"kill -HUP {self.daemons[name].process.pid}"
        (home / "bin" / "edgelm").write_text(f"#!/bin/sh\ncd {ROOT}\nenv -i {variables} {program} && {reload}\n")
        (home / "bin" / "edgelm").chmod(0o755)
        (home / "login").write_text(f'#!/bin/sh\nPATH={home}/bin:$PATH\nexec sh -c "$SSH_ORIGINAL_COMMAND"\n')
        (home / "login").chmod(0o755)
        shell(f"ssh-keygen -q -t ed25519 -N '' -f {home}/key")
        with (self.folder / "authorized").open("a") as file:
            file.write(f'command="{home}/login" {(home / "key.pub").read_text()}')

    def make_key(self, name: str) -> Path:
        """A key pair of minisign; the secret half."""
        pair = self.folder / f"{name}.pub", self.folder / f"{name}.key"
        shell(f"minisign -G -W -p {pair[0]} -s {pair[1]}")
        return pair[1]

    def signed(self, name: str) -> Path:
        """A bundle of that name."""
        folder = variant(self.bundle, self.folder / "bundles", name)
        shell(f"minisign -S -s {self.key} -m {folder}/manifest.json")
        return folder

    def push(self, source: object, *more: str, confirm_s: float = push.CONFIRM_S) -> "subprocess.CompletedProcess[str]":
        """By ssh, to 127.0.0.1 as root, with each device's key. confirm_s: how long it waits to hear of success."""
        lines = ["User root", "HostName 127.0.0.1", f"Port {self.port}", f"UserKnownHostsFile {self.folder}/known"]
        lines += ["IdentitiesOnly yes", f"IdentityFile {self.folder}/%n/key", "HostKeyAlgorithms ssh-ed25519"]
        (self.folder / "config").write_text("\n".join(["Host *", *lines, ""]))
        command = ["push", str(source), "--mqtt", self.broker.address, *more, "--", "-F", str(self.folder / "config")]
        environment = clean_environment() | {"TMPDIR": str(self.folder)}
        program = [sys.executable, "-m", "tests.support.impatient_fleet", str(confirm_s)]
        return subprocess.run(
            [*program, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
        )

    def bundles(self) -> dict[str, str]:
        """Who serves what, as the broker is told."""
        return {name: device["bundle"].partition("@")[0] for name, device in devices(self.broker).items()}

    def close(self) -> None:
        self.sshd.terminate()
        self.sshd.wait(TIMEOUT_S)
        self.log.close()
        for daemon in self.daemons.values():
            daemon.close()

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@pytest.fixture
def site(tmp_path: Path, broker: Broker, debug_bundle: Path) -> Iterator[Site]:
    made = Site(tmp_path, broker, debug_bundle)
    yield made
    made.close()


def test_fleet_push_gives_a_folder_to_all_in_waves_and_stops_at_a_failure(site: Site) -> None:
    done = site.push(site.signed("second"), "--wave", "2")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "wave 1 of 2: attic, kitchen" and lines[3] == "wave 2 of 2: shed"
    assert [line.split("@")[0] for line in lines[1:3]] == ["attic: serves second", "kitchen: serves second"]
    assert lines[-1].startswith("3 of 3 devices serve second@")
    assert site.bundles() == dict.fromkeys(NAMES, "second")

    again = site.push(site.folder / "bundles" / "second")
    assert again.returncode == 0 and "wave" not in again.stdout, "nobody is given what it has"

    shutil.copy(site.make_key("stranger").with_suffix(".pub"), site.folder / "kitchen" / "minisign.pub")
    third = site.signed("third")
    done = site.push(third)
    assert done.returncode == 69
    assert done.stderr.startswith("error: stopped at wave 2 of 3: kitchen failed: ")
    assert "is not signed by" in done.stderr and done.stderr.count("\n") == 1
    assert "2 of 3 devices" not in done.stdout and "1 of 3 devices serve third@" in done.stdout
    assert site.bundles() == {"attic": "third", "kitchen": "second", "shed": "second"}
    rows = {line.split()[0]: line.split()[2] for line in done.stdout.splitlines() if line.split()[0] in NAMES}
    assert {name: model.partition("@")[0] for name, model in rows.items()} == site.bundles(), "who runs what"

    site.daemons["shed"].signal(signal.SIGSTOP)  # it takes the bundle, but never serves it
    try:
        given = site.push(third, "--device", "shed", "--device", "attic", confirm_s=1)
    finally:
        site.daemons["shed"].signal(signal.SIGCONT)
    assert given.returncode == 69 and "shed failed: installed, but it serves second@" in given.stderr
    left = [path.name for path in site.folder.iterdir() if path.name.startswith(("edgelm-push-", "tmp."))]
    assert left == []


@pytest.mark.skipif(is_gpu_device(), reason="this machine has a GPU")
def test_fleet_push_to_a_device_that_comes_up_degraded_says_why(site: Site) -> None:
    """It serves, from its CPU as before: an engine was built meanwhile, and no GPU is there to run it."""
    site.add("cellar", "auto")
    until(lambda: devices(site.broker).get("cellar", {}).get("bundle") is not None, "the fourth device")
    place = site.folder / "cellar" / "cache" / "key"
    place.mkdir(parents=True)
    (place / engine_cache.ENGINE).write_bytes(b"")
    done = site.push(site.signed("second"), "--device", "cellar")
    assert (done.returncode, done.stderr) == (0, "")
    line = next(line for line in done.stdout.splitlines() if line.startswith("cellar: serves second@"))
    assert ", degraded: " in line and ("cuda-python is not installed" in line or "no NVIDIA driver" in line)


def test_fleet_push_has_devices_download_what_is_signed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    signed = site.signed("second")
    certificates = site.folder / "certificates"
    certificates.mkdir()
    server = HttpsServer(signed.parent, certificates)
    try:
        monkeypatch.setenv("SSL_CERT_FILE", str(server.ca))
        for name in NAMES:  # and on the devices
            program = site.folder / name / "bin" / "edgelm"
            given = program.read_text().replace(sys.executable, f"SSL_CERT_FILE={server.ca} {sys.executable}")
            program.write_text(given)
        done = site.push(f"{server.url}/second", "--wave", "3")
        assert (done.returncode, done.stderr) == (0, "")
        assert site.bundles() == dict.fromkeys(NAMES, "second")
        assert server.asked.count("/second/manifest.json") == 4 and server.asked.count("/second/tokenizer.json") == 3
    finally:
        server.close()


def test_fleet_push_that_cannot_begin_changes_nothing(site: Site) -> None:
    second = site.signed("second")
    for arguments, code, sentence in (
        (
            (second, "--device", "cellar"),
            78,
            "--device cellar: no such device is there; there are attic, kitchen, shed",
        ),
        ((second, "--ssh", "root@127.0.0.1"), 78, "leads to one host for all devices"),
        ((site.folder, "--wave", "2"), 66, "is not a bundle"),
        (("http://127.0.0.1/second",), 66, "are downloaded from https://HOST/FOLDER alone"),
        ((second, "--wave", "0"), 2, "--wave"),
        (
            (second, "--device", "shed", "--ssh", "nobody@{device}"),
            69,
            "shed failed: nobody@127.0.0.1: Permission denied",
        ),
    ):
        done = site.push(*arguments)
        assert (done.returncode, sentence in done.stderr) == (code, True), done.stderr
    assert site.bundles() == dict.fromkeys(NAMES, "debug")
