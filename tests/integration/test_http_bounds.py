"""HTTP against a daemon of its own: who may reach it, a thousand idle clients, and what is off."""

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import ROOT, Daemon, clean_environment
from tests.integration.http_client import address_of, ask, complete
from tests.stress.soak import resources

TOKEN = "a-token-of-this-device"


def refused(folder: Path, bundle: Path, *args: str, **settings: str) -> str:
    """What a daemon says that does not start for its settings."""
    command = [
        sys.executable,
        "-m",
        "edge",
        "--bundle",
        str(bundle),
        "--backend",
        "fake",
        "--socket",
        str(folder / "s"),
    ]
    environment = clean_environment(STATE=str(folder), **settings)
    done = subprocess.run([*command, *args], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 78, done
    return done.stderr


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
def test_http_beyond_this_machine_needs_a_token(tmp_path: Path, debug_bundle: Path, listen: str) -> None:
    said = refused(tmp_path, debug_bundle, "--http", listen)
    assert "others can reach this address" in said and "`http.token_file`" in said


@pytest.mark.parametrize(
    ("listen", "said"),
    [
        ("8080", "`http.listen` must be HOST:PORT"),
        ("127.0.0.1:99999", "a port is at most 65535"),
        ("192.0.2.1:0", "http.listen 192.0.2.1:0 cannot be opened"),
        ("no.such.host.invalid:80", "http.listen no.such.host.invalid:80 cannot be opened"),
    ],
)
def test_http_unfit_address_is_named(tmp_path: Path, debug_bundle: Path, listen: str, said: str) -> None:
    assert said in refused(tmp_path, debug_bundle, "--http", listen)


@pytest.mark.parametrize(
    ("token", "said"), [("", "is empty"), ("short", "16 to 512"), (f"{TOKEN} {TOKEN}", "16 to 512")]
)
def test_http_unfit_token_is_named(tmp_path: Path, debug_bundle: Path, token: str, said: str) -> None:
    (tmp_path / "token").write_text(token + "\n")
    assert said in refused(tmp_path, debug_bundle, "--http", "127.0.0.1:0", HTTP_TOKEN_FILE=str(tmp_path / "token"))


def test_http_token_opens_all_but_the_page(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    daemon = start_daemon("--http", "0.0.0.0:0", HTTP_TOKEN_FILE=str(tmp_path / "token"))
    bearer = {"Authorization": f"Bearer {TOKEN}", "Host": "device.example"}
    for path in ("/health", "/metrics", "/v1/models", "/openapi.json"):
        answer = ask(daemon, path)
        assert (answer.status, answer.error["code"], answer.headers["www-authenticate"]) == (
            401,
            "unauthorized",
            "Bearer",
        )
        assert ask(daemon, path, headers=bearer).status == 200
    assert complete(daemon, prompt="a").status == 401
    assert ask(daemon, "/v1/completions", {"prompt": "a", "max_tokens": 1}, headers=bearer).status == 200
    assert ask(daemon, "/").status == 200
    assert TOKEN not in daemon.log.read_text()


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://evil.example"}, {"Host": "evil.example"}, {"Sec-Fetch-Site": "cross-site"}]
)
def test_http_without_a_token_serves_no_other_page(
    start_daemon: Callable[..., Daemon], headers: dict[str, str]
) -> None:
    daemon = start_daemon("--http", "127.0.0.1:0")
    answer = ask(daemon, "/v1/completions", {"prompt": "a", "max_tokens": 1}, headers=headers)
    assert (answer.status, answer.error["code"]) == (403, "forbidden")
    assert "access-control-allow-origin" not in answer.headers


def test_http_queue_full_says_when_to_come_again(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("--http", "127.0.0.1:0", backend="fake:200", QUEUE_SIZE="1")
    long: dict[str, Any] = {"prompt": "a", "decode": "canvas", "steps": 100}
    for line in (daemon.line(), daemon.line()):  # both under way for 20 s, unless they hang up
        assert line.ask(long | {"stream": True})["type"] == "partial"
    answer = complete(daemon, **long)
    assert answer.status == 429
    assert answer.error["type"] == "rate_limit_error"
    assert int(answer.headers["retry-after"]) >= 1 and int(answer.headers["retry-after-ms"]) >= 1
    assert answer.headers["x-should-retry"] == "true"


@pytest.mark.slow
def test_http_a_thousand_idle_clients_take_their_share_alone(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("--http", "127.0.0.1:0")
    assert complete(daemon, prompt="a", max_tokens=1).status == 200
    before = resources(daemon.process.pid)
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(address_of(daemon), 20)) for _ in range(1000)]
        assert complete(daemon, prompt="a", max_tokens=1).status == 200
        after = resources(daemon.process.pid)
        assert after.descriptors - before.descriptors <= 64
        assert after.resident_kb - before.resident_kb < 8 * 1024
        assert clients[0].recv(1) == b""
        clients[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert clients[-1].recv(15) == b"HTTP/1.1 200 \r\n"
    daemon.signal(signal.SIGTERM)
    assert daemon.exit_code() == 0
    assert "Traceback" not in daemon.log.read_text()


def test_http_is_off_unless_it_is_set(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    assert "http://" not in daemon.ready
    inodes = set()
    for link in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
        inodes.add(str(link.readlink()))
    tables = [Path(f"/proc/{daemon.process.pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [row.split() for table in tables for row in table.splitlines()[1:]]
    assert [row for row in rows if f"socket:[{row[9]}]" in inodes] == []
    maps = Path(f"/proc/{daemon.process.pid}/maps").read_text()
    assert "_asyncio" not in maps
