"""Bundles on the installed service: upgraded, pushed, rolled back, and refused without harm."""

import shutil
from pathlib import Path

import pytest

from tests.systemd.device import SHIPPED_MODEL, bundle_command, current, newer, served
from tests.systemd.machine import PATH, Machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


SSHD_USER = "sshd:x:105:65534::/run/sshd:/usr/sbin/nologin"


def test_bundles_are_upgraded_and_rolled_back(device: Machine) -> None:
    status, said = bundle_command(device, "install", newer(device, "newer"))
    assert (status, said) == (0, f"{current(device)} is served")
    assert served(device) == "newer"
    assert bundle_command(device, "rollback")[0] == 0
    assert served(device) == SHIPPED_MODEL
    assert bundle_command(device, "verify")[0] == 0


@pytest.mark.skipif(shutil.which("sshd", path=PATH) is None, reason="openssh-server is not installed")
def test_bundles_are_pushed_over_ssh(device: Machine) -> None:
    device.write("/etc/passwd", [*(device.root / "etc/passwd").read_text().splitlines(), SSHD_USER])
    device.run("mkdir", "-p", "/root/.ssh", "/run/sshd", "/etc/ssh")
    for key in ("/root/.ssh/id_ed25519", "/etc/ssh/host"):
        device.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    device.run("cp", "/root/.ssh/id_ed25519.pub", "/root/.ssh/authorized_keys")
    device.run("chmod", "-R", "go=", "/root/.ssh")
    options = ["-f", "/dev/null", "-h", "/etc/ssh/host", "-o", "UsePAM=no", "-o", "ListenAddress=127.0.0.1:2222"]
    device.run("systemd-run", "--unit=ssh-of-test", "/usr/sbin/sshd", "-D", *options)
    device.until(lambda: device.run("bash", "-c", "< /dev/tcp/127.0.0.1/2222", check=False).returncode == 0, "sshd")
    push = ["/srv/checkout/deploy/push_bundle.sh", newer(device, "pushed"), "root@127.0.0.1"]
    pushed = device.run(*push, "-p", "2222", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null")
    device.run("systemctl", "stop", "ssh-of-test")
    assert pushed.stdout == f"{current(device)} is served\n"
    assert served(device) == "pushed"
    assert not [path for path in (device.root / "tmp").iterdir() if path.name.startswith("tmp.")]
    assert bundle_command(device, "rollback")[0] == 0


def test_bundles_that_fail_their_self_test_are_never_served(device: Machine) -> None:
    process, before = device.show("MainPID"), current(device)
    status, said = bundle_command(device, "install", newer(device, "broken", graph=b"no graph at all"))
    assert status == 66 and "cannot be loaded by ONNX Runtime" in said
    assert (served(device), current(device), device.show("MainPID")) == (SHIPPED_MODEL, before, process)


def test_bundles_that_the_daemon_refuses_are_taken_back(device: Machine, settings: Path) -> None:
    before = current(device)
    device.write("/srv/works.toml", ['socket = "/run/edgelm.sock"'])  # for the test; the daemon reads its own
    settings.write_text("sokcet = 1\n" + settings.read_text())
    status, said = bundle_command(device, "install", newer(device, "refused"), "--config=/srv/works.toml")
    assert status == 66 and f"{before} serves again" in said and "unknown field `sokcet`" in said
    assert (served(device), current(device)) == (SHIPPED_MODEL, before)


def test_bundles_installation_restarts_a_service_that_gave_up(device: Machine, drop_in: Path) -> None:
    drop_in.write_text("[Unit]\nStartLimitBurst=2\n")
    device.run("systemctl", "daemon-reload")
    (device.root / "opt/edgelm/bundles/current/tokenizer.json").write_text("{}")
    device.run("systemctl", "restart", "edgelm.service", check=False)
    device.until(lambda: device.show("ActiveState") == "failed", "systemd to give up")
    status, said = bundle_command(device, "install", "/srv/checkout/bundle/tinystories")
    assert (status, said) == (0, f"{current(device)} is served")
    assert served(device) == SHIPPED_MODEL
