"""The daemon as systemd starts it: told by environment variables, and telling by a socket."""

import grp
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.harness import ROOT, TIMEOUT_S, Line, clean_environment

SECRET = "zanzibar quokka"


BECOME = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.executable, [sys.executable, "-m", "edge", *sys.argv[2:]])
"""
"""The variable names a process, so that only the one that becomes the daemon can set it."""


class Service:
    """`python -m edge` below a service manager that this test plays."""

    def __init__(self, folder: Path, bundle: Path, *arguments: str, config: str = "", watchdog_us: int = 0) -> None:
        self.folder = folder
        self.file = folder / "edgelm.toml"
        self.link = folder / "current"
        self.link.symlink_to(bundle)
        self.configure(config)
        self.path = folder / "s"
        self.log = folder / "log"
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._manager.bind(str(folder / "notify"))
        self._manager.settimeout(TIMEOUT_S)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self.path.chmod(0o666)
        self._listener.listen()
        environment = clean_environment() | {"NOTIFY_SOCKET": str(folder / "notify")}
        if watchdog_us:
            environment["WATCHDOG_USEC"] = str(watchdog_us)
        with self.log.open("wb") as log:
            found = os.fstat(log.fileno())
            environment["JOURNAL_STREAM"] = f"{found.st_dev}:{found.st_ino}"
            self.process = subprocess.Popen(
                [sys.executable, "-c", BECOME, str(self._listener.fileno()), "--config", str(self.file), *arguments],
                cwd=ROOT,
                env=environment,
                pass_fds=(self._listener.fileno(),),
                stdout=log,
                stderr=log,
            )

    def configure(self, text: str) -> None:
        self.file.write_text(f'bundle = "current"\nbackend = "fake:10"\n{text}')

    def serve(self, bundle: Path) -> None:
        """Swap the link, as an upgrade does."""
        (self.folder / "next").symlink_to(bundle)
        (self.folder / "next").rename(self.link)

    def told(self, name: str) -> str:
        """The value of that name in the next message that has it; the messages before are passed over."""
        while True:
            lines = self._manager.recv(4096).decode().split("\n")
            for line in lines:
                if line.startswith(f"{name}="):
                    return line.partition("=")[2]

    def reload(self) -> str:
        """SIGHUP.  → the status when it is through"""
        self.process.send_signal(signal.SIGHUP)
        self.told("RELOADING")
        return self.told("STATUS")

    def ask(self, **fields: object) -> dict[str, object]:
        line = Line(self.path)
        try:
            return line.ask({"prompt": "Once", "steps": 2} | fields)
        finally:
            line.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._manager.close()
        self._listener.close()


@pytest.fixture
def services() -> Iterator[list[Service]]:
    """Those a test starts; all are killed at its end."""
    started: list[Service] = []
    yield started
    for service in started:
        service.close()


@pytest.fixture
def service(services: list[Service], tmp_path: Path, debug_bundle: Path) -> Service:
    """One that is ready."""
    services.append(Service(tmp_path, debug_bundle))
    assert services[0].told("READY") == "1"
    return services[0]


def renamed(bundle: Path, folder: Path) -> Path:
    """The same bundle under another name: a newer one, for all the daemon can tell."""
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"name": folder.name}))
    return folder


def test_service_serves_the_socket_of_systemd_and_leaves_it(service: Service) -> None:
    assert service.ask()["status"] == "ok"
    service.process.terminate()
    assert service.told("STOPPING") == "1"
    assert service.process.wait(TIMEOUT_S) == 0
    assert service.path.exists()
    Line(service.path).close()  # still accepts: whoever connects now waits for the next daemon


def test_service_stop_asks_for_its_whole_drain(services: list[Service], tmp_path: Path, debug_bundle: Path) -> None:
    services.append(Service(tmp_path, debug_bundle, config="drain_s = 100"))
    services[0].told("READY")
    services[0].process.terminate()
    assert int(services[0].told("EXTEND_TIMEOUT_USEC")) > 100e6


def test_service_reload_serves_the_bundle_that_the_link_points_to(service: Service, debug_bundle: Path) -> None:
    service.serve(renamed(debug_bundle, service.folder / "newer"))
    assert service.ask()["model"].startswith("debug@")  # type: ignore[attr-defined]
    assert service.reload().startswith("serving newer@")
    assert service.ask()["model"].startswith("newer@")  # type: ignore[attr-defined]


def test_service_reload_finishes_old_requests_with_the_old_bundle(service: Service, debug_bundle: Path) -> None:
    line = Line(service.path)
    assert line.ask({"prompt": "Once", "stream": True, "id": "old"})["type"] == "partial"
    service.serve(renamed(debug_bundle, service.folder / "newer"))
    service.reload()
    line.send({"prompt": "Once", "steps": 1, "id": "new"})
    answers: dict[str, str] = {}
    while len(answers) < 2:
        reply = line.read()
        assert reply is not None
        if reply["type"] == "response":
            answers[reply["id"]] = reply["model"].partition("@")[0]
    line.close()
    assert answers == {"old": "debug", "new": "newer"}


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda service: service.serve(service.folder), "manifest.json"),
        (lambda service: service.file.write_text("sokcet = 1"), "sokcet"),
        (lambda service: service.configure('drain_s = "long"'), "drain_s"),
        (lambda service: service.file.unlink(), "cannot be read"),
    ],
    ids=["no bundle", "unknown key", "wrong type", "no file"],
)
def test_service_failed_reload_changes_nothing_and_says_why_in_one_sentence(
    break_it: object, named: str, service: Service
) -> None:
    assert callable(break_it)
    break_it(service)
    assert named in service.reload()
    assert service.ask()["model"].startswith("debug@")  # type: ignore[attr-defined]
    (complaint,) = (line for line in service.log.read_text().splitlines() if line.startswith("<3>"))
    assert "the reload failed" in complaint and named in complaint


def test_service_reload_names_settings_that_need_a_restart(service: Service) -> None:
    service.configure("queue_size = 3\ndrain_s = 1\n[mqtt]\nport = 99")
    service.reload()
    assert "<4>changes of `queue_size`, `mqtt` take effect at the next start" in service.log.read_text()


def test_service_watchdog_is_fed_during_a_long_request(
    services: list[Service], tmp_path: Path, debug_bundle: Path
) -> None:
    services.append(Service(tmp_path, debug_bundle, watchdog_us=400_000))
    service = services[0]
    service.told("READY")
    line = Line(service.path)
    line.send({"prompt": "Once", "steps": 100, "id": "long"})
    fed_s = [time.monotonic()]
    while len(fed_s) < 8:
        assert service.told("WATCHDOG") == "1"
        fed_s.append(time.monotonic())
    line.close()


def test_service_watchdog_is_not_fed_while_a_step_hangs(
    services: list[Service], tmp_path: Path, debug_bundle: Path
) -> None:
    services.append(Service(tmp_path, debug_bundle, "--backend", "fake:3000", watchdog_us=400_000))
    service = services[0]
    service.told("READY")
    line = Line(service.path)
    line.send({"prompt": "Once", "steps": 2})
    service._manager.settimeout(1.0)
    with pytest.raises(TimeoutError):
        while True:
            service.told("WATCHDOG")
    line.close()


def test_service_log_holds_no_prompts_and_no_texts(service: Service) -> None:
    texts = [str(service.ask(prompt=SECRET)["text"])]
    service.ask(prompt=SECRET, steps=0)
    service.ask(prompt=SECRET, surprise=1)
    service.ask(segments=[SECRET])
    service.ask(prompt=SECRET * 2000)
    service.reload()
    service.process.terminate()
    service.process.wait(TIMEOUT_S)
    log = service.log.read_text()
    assert "ready in" in log and "zanzibar" not in log
    assert all(text not in log for text in texts)


def test_service_failed_start_is_an_error_in_the_journal(
    services: list[Service], tmp_path: Path, debug_bundle: Path
) -> None:
    services.append(Service(tmp_path, debug_bundle, "--backend", "abacus"))
    assert services[0].process.wait(TIMEOUT_S) == 78
    assert services[0].log.read_text().startswith("<3>unknown backend 'abacus'")


ASK_AS = """
import os, socket, sys
path, uid, gid, *groups = sys.argv[1:]
os.setgroups([int(group) for group in groups])
os.setgid(int(gid))
os.setuid(int(uid))
line = socket.socket(socket.AF_UNIX)
line.connect(path)
try:
    line.sendall(b'{"prompt": "", "steps": 1}\\n')
except BrokenPipeError:  # refused before it asked: the reason can be read all the same
    pass
print(line.recv(65536).decode())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become other users")
def test_service_with_a_group_serves_its_members_only(services: list[Service], debug_bundle: Path) -> None:
    with tempfile.TemporaryDirectory() as open_folder:  # pytest's own let nobody else in
        folder = Path(open_folder)
        folder.chmod(0o755)
        services.append(Service(folder, debug_bundle, config='socket_group = "games"'))
        services[0].told("READY")
        games, other, stranger = grp.getgrnam("games").gr_gid, 4711, 4712

        def status(uid: int, gid: int, *groups: int) -> object:
            command = [sys.executable, "-c", ASK_AS, str(services[0].path), *map(str, (uid, gid, *groups))]
            asked = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
            reply = json.loads(asked.stdout)
            return reply["error"]["code"] if reply["error"] else reply["status"]

        assert status(stranger, other) == "forbidden"
        assert status(stranger, other, 1, 2) == "forbidden"
        assert status(stranger, games) == "ok"
        assert status(stranger, other, 1, games) == "ok"
        assert status(0, 0) == "ok"


def test_service_refuses_a_group_that_does_not_exist(
    services: list[Service], tmp_path: Path, debug_bundle: Path
) -> None:
    services.append(Service(tmp_path, debug_bundle, config='socket_group = "no-such-group"'))
    assert services[0].process.wait(TIMEOUT_S) == 78
    assert "<3>socket_group 'no-such-group' does not exist" in services[0].log.read_text()
