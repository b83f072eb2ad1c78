"""A machine with a real systemd, booted in a second: systemd-nspawn on a bare root that borrows this system's /usr.

Nothing is downloaded for it but the wheels that the installation needs, and nothing stays behind.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.integration.harness import Line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[2]
SHIPPED = ("edge", "shared", "host", "deploy", "systemd", "bundle", "pyproject.toml", "README.md", "LICENSE")
PROGRAMS = ("systemd-nspawn", "nsenter", "ip", "mosquitto", "mosquitto_pub", "setpriv", "getent", "groupadd")
PYTHON = "/usr/bin/python3"  # pyenv's and others lie outside of /usr, or in somebody's home
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"
TIMEOUT_S = 60.0
NETWORK = "10.20.30.40"
"""An address of the machine beside 127.0.0.1: for the daemon's sandbox, somewhere in the local network."""

PASSWD = """root:x:0:0:root:/root:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
alice:x:1000:1000::/home/alice:/bin/sh
bob:x:1001:1001::/home/bob:/bin/sh
"""
GROUP = "root:x:0:\ntty:x:5:\nvideo:x:44:\nnogroup:x:65534:\nalice:x:1000:\nbob:x:1001:\n"


def why_not() -> str | None:
    """What is missing to boot a machine here; None when nothing is."""
    if os.getuid() != 0:
        return "only root can boot a machine"
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        return f"{', '.join(missing)} missing: apt-get install systemd-container mosquitto mosquitto-clients iproute2"
    if not Path("/usr/lib/systemd/systemd").exists():
        return "/usr holds no systemd to boot"
    if subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "this root may not make namespaces: a container within a container, as a rule"
    asked = subprocess.run([PYTHON, "-c", "import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))"])
    return f"{PYTHON} is older than 3.10 or has no venv: apt-get install python3-venv" if asked.returncode else None


def fetch_wheels(folder: Path) -> None:
    """What the installation takes from the package index, for this system's Python."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    wanted += [one for extra in ("web", "images") for one in project["project"]["optional-dependencies"][extra]]
    version = subprocess.check_output([PYTHON, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    for_python = ["--python-version", version.strip(), "--only-binary=:all:", "--dest", str(folder)]
    pinned = ["--constraint", str(REPOSITORY / "deploy/constraints.txt")]
    subprocess.run([*command, *for_python, *pinned, *wanted], check=True, timeout=600)


class Machine:
    """A booted machine; `boot` before anything else, `close` at the end."""

    def __init__(self) -> None:
        self._tree = Path(tempfile.mkdtemp(prefix="edgelm-machine-"))
        self._tree.chmod(0o755)
        self._log = self._tree.with_suffix(".log")
        self.root = self._tree
        self.boot_s = 0.0
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0
        self._furnish()

    def _furnish(self) -> None:
        for name in ("etc/systemd/system", "proc", "sys", "dev", "run", "tmp", "var", "usr", "root", "srv/wheels"):
            (self.root / name).mkdir(parents=True)
        for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
            if Path("/", name).is_symlink():
                (self.root / name).symlink_to(f"usr/{name}")
        etc = self.root / "etc"
        (etc / "passwd").write_text(PASSWD)
        (etc / "group").write_text(GROUP)
        (etc / "shadow").write_text("root:*:20000::::::\n")  # no password, and not locked: ssh takes its key
        (etc / "hosts").write_text("127.0.0.1 localhost\n")
        (etc / "hostname").write_text("edge01\n")
        (etc / "machine-id").write_text("")
        shutil.copy("/usr/lib/os-release", etc)  # nspawn looks for it before /usr is there
        (etc / "nsswitch.conf").write_text("passwd: files systemd\ngroup: files systemd\nhosts: files\n")
        (etc / "systemd/system/default.target").symlink_to("/usr/lib/systemd/system/multi-user.target")
        for name in ("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ssl"):
            source = Path("/etc", name)
            if source.is_dir():
                shutil.copytree(source, etc / name, symlinks=True)
            elif source.exists():
                shutil.copy(source, etc)
        for user, number in (("alice", 1000), ("bob", 1001)):
            home = self.root / "home" / user
            home.mkdir(parents=True)
            (home / "diary").write_text("private")
            for path in (home, home / "diary"):
                os.chown(path, number, number)
                path.chmod(0o755)  # it is the sandbox that has to keep the daemon out
        for name in SHIPPED:
            source, target = REPOSITORY / name, self.root / "srv/checkout" / name
            target.parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)

    def boot(self) -> None:
        """Boot to multi-user, which takes about a second."""
        began_s = time.monotonic()
        # Without this variable and BPF, DeviceAllow and IPAddressDeny would silently not be enforced.
        environment = {"PATH": PATH, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
        command = [
            *("systemd-nspawn", "--quiet", f"--directory={self._tree}", f"--machine=edgelm-{os.getpid()}", "--boot"),
            *("--volatile=overlay", "--bind-ro=/usr", "--tmpfs=/usr/local/bin:mode=755", "--private-network"),
            *("--register=no", "--keep-unit", "--console=pipe"),
            *("--capability=CAP_BPF,CAP_NET_ADMIN,CAP_PERFMON", "--system-call-filter=bpf"),
        ]
        with self._log.open("wb") as log:
            self._nspawn = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self.until(self._up, "systemd to come up")
        self.boot_s = time.monotonic() - began_s
        self.root = Path(f"/proc/{self._leader}/root")  # what is written from now on is in memory
        self.run("ip", "address", "add", f"{NETWORK}/32", "dev", "lo")

    def _up(self) -> bool:
        assert self._nspawn is not None and self._nspawn.poll() is None, self.console
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        if not children:
            return False
        self._leader = int(children[0])
        return self.run("systemctl", "is-system-running", check=False).stdout.strip() in ("running", "degraded")

    @property
    def console(self) -> str:
        """What systemd printed."""
        return self._log.read_text(errors="replace")

    def run(
        self, *command: str, user: int = 0, check: bool = True, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine, with the groups that its user has there."""
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"] if user else []
        enter = ["nsenter", f"--target={self._leader}", *["-m", "-u", "-i", "-n", "-p", "-r", "-w", "-C"], "--"]
        done = subprocess.run(
            [*enter, *become, *command],
            env={"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8"} | (environment or {}),
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def popen(self, *command: str) -> "subprocess.Popen[str]":
        """Start a command in the machine, its output to be read."""
        enter = ["nsenter", f"--target={self._leader}", *["-m", "-u", "-i", "-n", "-p", "-r", "-w", "-C"], "--"]
        return subprocess.Popen([*enter, *command], env={"PATH": PATH}, stdout=subprocess.PIPE, text=True)

    def show(self, name: str, unit: str = "edgelm.service") -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()

    def journal(self, *arguments: str) -> list[str]:
        """The messages of the daemon's unit."""
        return self.run("journalctl", "-u", "edgelm.service", "-o", "cat", *arguments).stdout.splitlines()

    def line(self) -> Line:
        """A connection to the daemon's socket, as root."""
        return Line(self.root / "run/edgelm.sock")

    def kill(self, number: int) -> None:
        """Send the daemon a signal, and nothing to any other process."""
        self.run("kill", f"-{number}", self.show("MainPID"))

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something that is bound to happen."""
        give_up_s = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < give_up_s, f"waited in vain: {what}\n{self.console[-2000:]}"
            time.sleep(0.05)

    def write(self, path: str, lines: Iterable[str]) -> None:
        """A file in the machine."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        """Power off, and remove everything."""
        if self._nspawn is not None:
            if self._leader and self._nspawn.poll() is None:
                self.run("systemctl", "poweroff", check=False)
            try:
                self._nspawn.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait()
        shutil.rmtree(self._tree, ignore_errors=True)
        self._log.unlink(missing_ok=True)
