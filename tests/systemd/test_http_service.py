"""HTTP as the installed service has it: `install.sh --http`, its socket unit, the token that systemd hands over."""

import json
from collections.abc import Iterator

import pytest

from tests.systemd.device import INSTALL, OFFLINE, ask
from tests.systemd.machine import Machine

TOKEN = "a-token-of-this-device"
CURL = ("curl", "-s", "-m", "20")


@pytest.fixture
def with_http(device: Machine) -> Iterator[Machine]:
    """The service with HTTP; without it again at the end."""
    device.run(INSTALL, "--http", environment=OFFLINE)
    yield device
    device.run("rm", "-f", "/etc/edgelm/http.token")
    device.run("systemctl", "disable", "--now", "edgelm-http.socket")
    device.run("rm", "/etc/systemd/system/edgelm-http.socket")
    device.run("systemctl", "daemon-reload")
    device.run(INSTALL, environment=OFFLINE)
    assert device.run(*CURL, "http://127.0.0.1:8080/health", check=False).returncode == 7  # nobody listens


def test_http_service_is_served_by_its_socket_beside_the_other(with_http: Machine) -> None:
    health = json.loads(with_http.run(*CURL, "http://127.0.0.1:8080/health").stdout)
    assert health["state"] == "idle"
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": 4, "seed": 1})
    head = ("-H", "Content-Type: application/json", "-d", body)
    assert json.loads(with_http.run(*CURL, "http://127.0.0.1:8080/v1/completions", *head).stdout)["choices"]
    assert ask(with_http)["status"] == "ok"
    assert with_http.run("systemctl", "is-enabled", "edgelm-http.socket").stdout == "enabled\n"
    with_http.run("systemctl", "restart", "edgelm.service")
    assert json.loads(with_http.run(*CURL, "http://127.0.0.1:8080/health").stdout)["state"] == "idle"
    assert "is installed and runs already" in with_http.run(INSTALL, environment=OFFLINE).stdout  # and keeps HTTP


def test_http_service_takes_the_token_of_systemd(with_http: Machine) -> None:
    with_http.write("/etc/edgelm/http.token", [TOKEN])
    with_http.run("chmod", "600", "/etc/edgelm/http.token")
    with_http.run("systemctl", "restart", "edgelm.service")
    refused = json.loads(with_http.run(*CURL, "http://127.0.0.1:8080/health").stdout)
    assert refused["error"]["code"] == "unauthorized"
    bearer = ("-H", f"Authorization: Bearer {TOKEN}")
    assert json.loads(with_http.run(*CURL, "http://127.0.0.1:8080/health", *bearer).stdout)["state"] == "idle"
