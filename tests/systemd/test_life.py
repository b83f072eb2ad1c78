"""The installed service: answers, restarts, reloads and drains."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.support.certificates import make_authority, make_certificate
from tests.systemd.device import (
    PYTHON,
    SHIPPED_MODEL,
    STORY,
    ask,
    served,
)
from tests.systemd.machine import Machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_life_mosquitto_pub_is_answered(device: Machine, on_mqtt: Path) -> None:
    topics = ["-t", "edgelm/edge01/availability", "-t", "edgelm/edge01/response/#"]
    with device.popen("mosquitto_sub", "-C", "2", "-W", "60", "-v", *topics) as subscriber:
        assert subscriber.stdout is not None
        assert subscriber.stdout.readline() == "edgelm/edge01/availability online\n"
        request = json.dumps(STORY | {"id": "7", "steps": 8})
        device.run("mosquitto_pub", "-q", "1", "-t", "edgelm/edge01/request/generate", "-m", request)
        topic, _, payload = subscriber.stdout.readline().partition(" ")
    assert topic == "edgelm/edge01/response/7"
    assert json.loads(payload)["text"].startswith("Once upon a time")


def test_life_socket_serves_members_of_the_group_only(device: Machine) -> None:
    command = [PYTHON, "-m", "edge.generate", "--socket", "/run/edgelm.sock", "--steps", "4", "Once"]
    assert device.run(*command, user=1000).stdout.startswith("Once")
    refused = device.run(*command, user=1001, check=False)
    assert refused.returncode == 78 and "Permission denied" in refused.stderr


def test_life_group_is_checked_where_the_socket_is_open_to_all(device: Machine) -> None:
    command = [PYTHON, "-m", "edge.generate", "--socket", "/run/edgelm.sock", "--steps", "4", "Once"]
    device.run("chmod", "666", "/run/edgelm.sock")
    try:
        assert device.run(*command, user=1000).stdout.startswith("Once")
        refused = device.run(*command, user=1001, check=False)
    finally:
        device.run("chmod", "660", "/run/edgelm.sock")
    assert "members of its group" in refused.stderr


def test_life_watchdog_replaces_a_stopped_process(device: Machine, drop_in: Path) -> None:
    drop_in.write_text("[Service]\nWatchdogSec=5\nRestartSec=100ms\n")
    device.run("systemctl", "daemon-reload")
    device.run("systemctl", "restart", "edgelm.service")
    process = device.show("MainPID")
    time.sleep(6)  # longer than the watchdog: it is fed
    assert device.show("MainPID") == process

    device.kill(signal.SIGSTOP)
    states = ["sh", "-c", f"awk '/^State/ {{print $2}}' /proc/{process}/task/*/status"]
    device.until(  # until its last thread has stopped, one may still take the connection, and die with it
        lambda: set(device.run(*states, check=False).stdout.split()) == {"T"}, "every thread to stop"
    )
    began_s = time.monotonic()
    assert ask(device)["status"] == "ok"  # waits in systemd's socket, and is answered by the successor
    print(f"answered {time.monotonic() - began_s:.1f} s after SIGSTOP")
    assert device.show("MainPID") != process and int(device.show("NRestarts")) >= 1
    assert any("Watchdog timeout" in line for line in device.journal())


def test_life_client_starts_the_service_through_its_socket(device: Machine) -> None:
    device.run("systemctl", "stop", "edgelm.service")
    assert device.show("ActiveState") == "inactive"
    assert ask(device)["status"] == "ok"
    assert device.show("ActiveState") == "active"


def test_life_reload_reads_the_settings_again(device: Machine, settings: Path) -> None:
    process, text = device.show("MainPID"), ask(device)["text"]
    settings.write_text(settings.read_text().replace('# backend = "auto"', 'backend = "fake"'))
    device.run("systemctl", "reload", "edgelm.service")
    device.until(lambda: ask(device)["text"] != text, "another model to answer")
    assert device.show("MainPID") == process


def test_life_failed_reload_keeps_serving_and_is_reported_once(device: Machine, settings: Path) -> None:
    since = f"@{time.time():.6f}"
    settings.write_text(settings.read_text() + '\nsokcet = "/tmp/s"\n')
    device.run("systemctl", "reload", "edgelm.service")
    device.until(lambda: "the last reload failed" in device.show("StatusText"), "the reload to fail")
    assert served(device) == SHIPPED_MODEL
    errors = device.journal(f"--since={since}", "--priority=err")
    assert len(errors) == 1 and "unknown field `sokcet`" in errors[0]


def test_life_stop_finishes_accepted_requests(device: Machine) -> None:
    line = device.line()
    assert line.ask(STORY | {"steps": 100, "stream": True})["type"] == "partial"
    device.run("systemctl", "stop", "edgelm.service")  # returns when the daemon has left
    replies = []
    while (reply := line.read()) is not None:
        replies.append(reply)
    line.close()
    assert replies[-1]["type"] == "response" and replies[-1]["status"] == "ok"
    assert device.show("Result") == "success"
    device.run("systemctl", "start", "edgelm.service")


def test_life_certificate_reaches_the_daemon_as_a_credential(device: Machine, on_mqtt: Path) -> None:
    """To a broker that takes nobody without one; the doctor of root logs in with it, too."""
    tls, etc = device.root / "srv/tls", device.root / "etc/edgelm"
    tls.mkdir()
    make_authority(tls, "ca")
    make_certificate(tls, "broker", "localhost", authority="ca", names="DNS:localhost,IP:127.0.0.1")
    make_certificate(tls, "edge01", "edge01", authority="ca")
    files = [f"{key} /srv/tls/{file}" for key, file in (("cafile", "ca.pem"), ("certfile", "broker.pem"))]
    asking = ["require_certificate true", "use_identity_as_username true", "user root"]
    device.write("/srv/asking.conf", ["listener 1885 127.0.0.1", *files, "keyfile /srv/tls/broker.key", *asking])
    device.run("systemd-run", "--unit=asking", "mosquitto", "-c", "/srv/asking.conf")
    for file, name, mode in (
        ("ca.pem", "ca.pem", 0o644),
        ("edge01.pem", "mqtt.cert", 0o644),
        ("edge01.key", "mqtt.key", 0o600),
    ):
        shutil.copy(tls / file, etc / name)
        (etc / name).chmod(mode)
    on_mqtt.write_text(on_mqtt.read_text().replace("# port = 1883", 'port = 1885\nca_file = "/etc/edgelm/ca.pem"'))
    try:
        device.run("systemctl", "restart", "edgelm.service")
        device.until(lambda: any("connected to 127.0.0.1:1885" in line for line in device.journal()), "the login")
        assert "127.0.0.1:1885 accepts our login" in device.run("edgelm", "doctor", check=False).stdout
    finally:
        for name in ("ca.pem", "mqtt.cert", "mqtt.key"):
            (etc / name).unlink()
        device.run("systemctl", "stop", "asking")


def test_life_password_reaches_the_daemon_as_a_credential(device: Machine, on_mqtt: Path) -> None:
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
