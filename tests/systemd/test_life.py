"""The installed service on a booted systemd, from installation to removal."""

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.manifest import sha256_of
from tests.systemd.conftest import INSTALL, OFFLINE
from tests.systemd.machine import NETWORK, PATH, Machine

pytestmark = [pytest.mark.xdist_group("systemd"), pytest.mark.timeout(300)]

PYTHON = "/opt/edgelm/current/bin/python"
SETTINGS = "/etc/edgelm/edgelm.toml"
STORY = {"prompt": "Once upon a time", "seed": 1}
BEFORE = "tinystories"
SSHD_USER = "sshd:x:105:65534::/run/sshd:/usr/sbin/nologin"


def ask(device: Machine, **fields: object) -> dict[str, Any]:
    """The answer to a short story."""
    line = device.line()
    try:
        return line.ask(STORY | {"steps": 8} | fields)
    finally:
        line.close()


def served(device: Machine) -> str:
    """The name of the bundle that answers."""
    answer = ask(device)
    assert answer["status"] == "ok"
    return str(answer["model"]).partition("@")[0]


def current(device: Machine) -> str:
    return (device.root / "opt/edgelm/bundles/current").readlink().name


def bundle_command(device: Machine, *arguments: str) -> tuple[int, str]:
    """Exit status and last line of `python -m edge.bundle`."""
    done = device.run(PYTHON, "-m", "edge.bundle", *arguments, check=False)
    return done.returncode, (done.stdout + done.stderr).splitlines()[-1]


@pytest.fixture
def settings(device: Machine) -> Iterator[Path]:
    """The settings file, put back at the end with a restart."""
    file = device.root / SETTINGS.lstrip("/")
    kept = file.read_text()
    yield file
    file.write_text(kept)
    device.run("systemctl", "restart", "edgelm.service")


@pytest.fixture
def on_mqtt(device: Machine, settings: Path) -> Path:
    """Served through the broker of this machine."""
    settings.write_text(settings.read_text().replace("# host = ", "host = ").replace("broker.local", "127.0.0.1"))
    device.run("systemctl", "restart", "edgelm.service")
    return settings


def newer(device: Machine, name: str, graph: bytes | None = None) -> str:
    """A copy of the shipped bundle under another name, perhaps with another CPU graph, all hashes right.  → its path"""
    folder = device.root / "srv" / name
    shutil.copytree(device.root / "srv/checkout/bundle/tinystories", folder)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"name": name}
    if graph is not None:
        entry = next(entry for entry in manifest["graphs"] if entry["target"] == "cpu")
        (folder / entry["file"]).write_bytes(graph)
        entry["sha256"] = sha256_of(folder / entry["file"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return f"/srv/{name}"


def test_it_installs_starts_and_answers(device: Machine) -> None:
    assert device.show("ActiveState") == "active"
    assert device.run("systemctl", "is-enabled", "edgelm.service", "edgelm.socket").stdout == "enabled\nenabled\n"
    assert ask(device)["status"] == "ok"
    assert device.show("StatusText").startswith("serving tinystories@")
    assert any(line.startswith("ready in ") for line in device.journal())


def test_systemd_itself_finds_nothing_wrong_and_little_exposed(device: Machine) -> None:
    assert device.run("systemd-analyze", "verify", "edgelm.service", "edgelm.socket").stderr == ""
    assert device.run("systemd-analyze", "security", "--threshold=10", "edgelm.service").returncode == 0


def test_installing_again_changes_nothing(device: Machine) -> None:
    process = device.show("MainPID")
    assert "runs already" in device.run(INSTALL, environment=OFFLINE).stdout
    assert device.show("MainPID") == process


def test_a_dry_run_changes_nothing(device: Machine) -> None:
    before = sorted(device.root.glob("opt/edgelm/**"))
    (device.root / "srv/checkout/edge/further.py").write_text("# another release\n")
    said = device.run(INSTALL, "--dry-run", "--lan").stdout
    (device.root / "srv/checkout/edge/further.py").unlink()
    assert "would run: systemctl restart edgelm.service" in said and "20-lan.conf" in said
    assert sorted(device.root.glob("opt/edgelm/**")) == before


def test_mosquitto_pub_is_answered(device: Machine, on_mqtt: Path) -> None:
    topics = ["-t", "edgelm/edge01/availability", "-t", "edgelm/edge01/response/#"]
    with device.popen("mosquitto_sub", "-C", "2", "-W", "60", "-v", *topics) as subscriber:
        assert subscriber.stdout is not None
        assert subscriber.stdout.readline() == "edgelm/edge01/availability online\n"
        request = json.dumps(STORY | {"id": "7", "steps": 8})
        device.run("mosquitto_pub", "-q", "1", "-t", "edgelm/edge01/request/generate", "-m", request)
        topic, _, payload = subscriber.stdout.readline().partition(" ")
    assert topic == "edgelm/edge01/response/7"
    assert json.loads(payload)["text"].startswith("Once upon a time")


def test_members_of_the_group_are_served_and_others_are_not(device: Machine) -> None:
    command = [PYTHON, "-m", "edge.generate", "--socket", "/run/edgelm.sock", "--steps", "4", "Once"]
    assert device.run(*command, user=1000).stdout.startswith("Once")
    refused = device.run(*command, user=1001, check=False)
    assert refused.returncode == 78 and "Permission denied" in refused.stderr


def test_the_group_is_checked_even_where_the_socket_is_open_to_all(device: Machine) -> None:
    command = [PYTHON, "-m", "edge.generate", "--socket", "/run/edgelm.sock", "--steps", "4", "Once"]
    device.run("chmod", "666", "/run/edgelm.sock")
    try:
        assert device.run(*command, user=1000).stdout.startswith("Once")
        refused = device.run(*command, user=1001, check=False)
    finally:
        device.run("chmod", "660", "/run/edgelm.sock")
    assert "members of its group" in refused.stderr


def test_a_stopped_process_is_replaced_by_the_watchdog(device: Machine, drop_in: Path) -> None:
    drop_in.write_text("[Service]\nWatchdogSec=2\nRestartSec=100ms\n")
    device.run("systemctl", "daemon-reload")
    device.run("systemctl", "restart", "edgelm.service")
    process = device.show("MainPID")
    time.sleep(3)  # longer than the watchdog: it is fed
    assert device.show("MainPID") == process

    device.kill(signal.SIGSTOP)
    began_s = time.monotonic()
    assert ask(device)["status"] == "ok"  # waits in systemd's socket, and is answered by the successor
    print(f"answered {time.monotonic() - began_s:.1f} s after SIGSTOP")
    assert device.show("MainPID") != process and device.show("NRestarts") == "1"
    assert any("Watchdog timeout" in line for line in device.journal())


def test_a_client_starts_the_service_through_its_socket(device: Machine) -> None:
    device.run("systemctl", "stop", "edgelm.service")
    assert device.show("ActiveState") == "inactive"
    assert ask(device)["status"] == "ok"
    assert device.show("ActiveState") == "active"


def test_a_reload_reads_the_settings_again(device: Machine, settings: Path) -> None:
    process, text = device.show("MainPID"), ask(device)["text"]
    settings.write_text(settings.read_text().replace('# backend = "ort"', 'backend = "fake"'))
    device.run("systemctl", "reload", "edgelm.service")
    device.until(lambda: ask(device)["text"] != text, "another model to answer")
    assert device.show("MainPID") == process


def test_a_reload_that_fails_serves_on_and_says_so_once(device: Machine, settings: Path) -> None:
    since = f"@{time.time():.6f}"
    settings.write_text(settings.read_text() + '\nsokcet = "/tmp/s"\n')
    device.run("systemctl", "reload", "edgelm.service")
    device.until(lambda: "the last reload failed" in device.show("StatusText"), "the reload to fail")
    assert served(device) == BEFORE
    errors = device.journal(f"--since={since}", "--priority=err")
    assert len(errors) == 1 and "unknown key `sokcet`" in errors[0]


def test_a_stop_finishes_what_was_accepted(device: Machine) -> None:
    line = device.line()
    assert line.ask(STORY | {"steps": 250, "stream": True})["type"] == "partial"
    device.run("systemctl", "stop", "edgelm.service")  # returns when the daemon has left
    replies = []
    while (reply := line.read()) is not None:
        replies.append(reply)
    line.close()
    assert replies[-1]["type"] == "response" and replies[-1]["status"] == "ok"
    assert device.show("Result") == "success"
    device.run("systemctl", "start", "edgelm.service")


def test_the_password_reaches_the_daemon_as_a_credential(device: Machine, on_mqtt: Path) -> None:
    secret = device.root / "etc/edgelm/mqtt.password"
    secret.write_text("s3cret\n")
    secret.chmod(0o600)
    device.run("mosquitto_passwd", "-b", "-c", "/srv/passwd", "edge01", "s3cret")
    locked = ["listener 1884 127.0.0.1", "allow_anonymous false", "password_file /srv/passwd", "user root"]
    device.write("/srv/locked.conf", locked)
    device.run("systemd-run", "--unit=locked", "mosquitto", "-c", "/srv/locked.conf")
    on_mqtt.write_text(on_mqtt.read_text().replace("# port = 1883", 'port = 1884\nusername = "edge01"'))
    try:
        device.run("systemctl", "restart", "edgelm.service")
        device.until(lambda: any("connected to 127.0.0.1:1884" in line for line in device.journal()), "the login")
    finally:
        secret.unlink()
        device.run("systemctl", "stop", "locked")


def test_a_bundle_is_upgraded_and_rolled_back(device: Machine) -> None:
    status, said = bundle_command(device, "install", newer(device, "newer"))
    assert (status, said) == (0, f"{current(device)} is served")
    assert served(device) == "newer"
    assert bundle_command(device, "rollback")[0] == 0
    assert served(device) == BEFORE
    assert bundle_command(device, "verify")[0] == 0


@pytest.mark.skipif(shutil.which("sshd", path=PATH) is None, reason="openssh-server is not installed")
def test_a_bundle_is_pushed_over_ssh(device: Machine) -> None:
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


def test_a_bundle_that_fails_its_self_test_is_never_served(device: Machine) -> None:
    process, before = device.show("MainPID"), current(device)
    status, said = bundle_command(device, "install", newer(device, "broken", graph=b"no graph at all"))
    assert status == 66 and "cannot be loaded by ONNX Runtime" in said
    assert (served(device), current(device), device.show("MainPID")) == (BEFORE, before, process)


def test_a_bundle_that_the_daemon_refuses_is_taken_back(device: Machine, settings: Path) -> None:
    before = current(device)
    device.write("/srv/works.toml", ['socket = "/run/edgelm.sock"'])  # for the test; the daemon reads its own
    settings.write_text("sokcet = 1\n" + settings.read_text())
    status, said = bundle_command(device, "install", newer(device, "refused"), "--config=/srv/works.toml")
    assert status == 66 and f"{before} serves again" in said and "unknown key `sokcet`" in said
    assert (served(device), current(device)) == (BEFORE, before)


def test_a_program_that_does_not_start_is_taken_back(device: Machine) -> None:
    before = (device.root / "opt/edgelm/current").readlink()
    daemon = device.root / "srv/checkout/edge/daemon.py"
    kept = daemon.read_text()
    daemon.write_text("import nothing_of_that_name\n" + kept)
    done = device.run(INSTALL, environment=OFFLINE, check=False)
    daemon.write_text(kept)
    assert done.returncode == 1 and f"{before.name} runs again" in done.stderr
    assert (device.root / "opt/edgelm/current").readlink() == before
    assert served(device) == BEFORE


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


def test_the_sandbox_holds(device: Machine) -> None:
    found = probe(device)
    assert {what for what, verdict in found.items() if verdict == "can"} == {
        "write state",
        "write cache",
        "read settings",
        "reach this machine",
    }
    assert found["read a home"] in ("No such file or directory", "Permission denied")
    assert not {"kmsg", "sda", "vda", "mem"} & set(found["devices"])


def test_the_network_is_reached_only_where_it_is_allowed(device: Machine) -> None:
    device.run("mosquitto_pub", "-h", NETWORK, "-t", "x", "-m", "y")  # outside of the sandbox it is there
    assert probe(device)["reach the network"] != "can"
    device.run(INSTALL, "--lan", environment=OFFLINE)
    assert probe(device)["reach the network"] == "can"


def test_a_jetson_gets_what_it_has_and_starts(device: Machine) -> None:
    device.write("/etc/nv_tegra_release", ["# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic"])
    said = device.run(INSTALL, environment=OFFLINE).stdout
    assert "Jetson with JetPack 6" in said
    drop_in = (device.root / "etc/systemd/system/edgelm.service.d/10-jetson.conf").read_text()
    assert "\nSupplementaryGroups=video\n" in drop_in  # `render` does not exist here, and would be the end of the start
    assert served(device) == BEFORE and device.show("PrivateDevices") == "no"


def test_a_jetson_too_old_is_refused(device: Machine) -> None:
    device.write("/etc/nv_tegra_release", ["# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref"])
    refused = device.run(INSTALL, environment=OFFLINE, check=False)
    (device.root / "etc/nv_tegra_release").unlink()
    assert refused.returncode == 1 and "L4T R35" in refused.stderr


def test_uninstalling_leaves_settings_and_nothing_else(device: Machine) -> None:
    device.run(INSTALL, "--uninstall")
    left = [path for name in ("opt", "etc", "run", "var/cache") for path in (device.root / name).rglob("edgelm*")]
    assert [str(path.relative_to(device.root)) for path in left] == ["etc/edgelm", "etc/edgelm/edgelm.toml"]
    assert device.show("LoadState") == "not-found"
    assert device.run("getent", "group", "edgelm", check=False).returncode == 2
    assert device.run("systemctl", "is-system-running", check=False).stdout.strip() in ("running", "degraded")
    device.run(INSTALL, "--uninstall")  # once more does no harm
