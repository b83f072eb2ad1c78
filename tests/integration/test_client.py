"""`python -m edge.generate` and `python -m edge.demo` as users run them."""

import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from edge.client import connect
from shared.messages import ErrorInfo, Response, encode
from tests.integration.harness import ROOT, TIMEOUT_S, Daemon, clean_environment, run_module

PROMPT = "Once upon a time"


@pytest.fixture
def ask(shared_daemon: Daemon) -> list[str]:
    """Flags that lead to the daemon."""
    return ["--socket", str(shared_daemon.socket)]


def test_generate_prints_the_text_alone(ask: list[str]) -> None:
    result = run_module("edge.generate", PROMPT, *ask)
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.startswith(PROMPT) and result.stdout.endswith("\n")


def test_generate_gives_the_same_text_with_and_without_a_daemon(ask: list[str], debug_bundle: Path) -> None:
    asked = run_module("edge.generate", PROMPT, "--seed", "5", *ask)
    flags = ["--seed", "5", "--bundle", str(debug_bundle)]
    own = run_module("edge.generate", PROMPT, *flags, BACKEND="fake")
    assert own.stdout == asked.stdout
    assert own.stderr == f"generating in this process with {debug_bundle}\n"


def test_generate_without_a_daemon_generates_itself_and_says_so(debug_bundle: Path) -> None:
    """In a process without default sockets, since a daemon may run on this machine."""
    code = "import sys; from edge import config, generate; generate.socket_candidates = lambda: ()\n"
    code += "sys.exit(generate.main(sys.argv[1:]))"
    environment = clean_environment(BUNDLE=str(debug_bundle), BACKEND="ort")
    command = [sys.executable, "-c", code, PROMPT]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout.startswith(PROMPT)
    assert result.stderr == f"no daemon listens; generating in this process with {debug_bundle}\n"


def test_generate_wants_the_daemon_of_a_named_socket(tmp_path: Path, debug_bundle: Path) -> None:
    sentence = f"error: no daemon listens at {tmp_path}/none; --bundle DIR generates without one\n"
    flag = run_module("edge.generate", PROMPT, "--socket", str(tmp_path / "none"), BUNDLE=str(debug_bundle))
    assert (flag.returncode, flag.stdout, flag.stderr) == (78, "", sentence)
    variable = run_module("edge.generate", PROMPT, SOCKET=str(tmp_path / "none"), BUNDLE=str(debug_bundle))
    assert (variable.returncode, variable.stdout, variable.stderr) == (78, "", sentence)


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_generate_says_in_a_sentence_that_the_disk_is_full(ask: list[str], flags: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "edge.generate", PROMPT, *ask, *flags]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            command, cwd=ROOT, env=clean_environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (result.returncode, result.stderr) == (74, "error: the output cannot be written: No space left on device\n")


def test_generate_fills_gaps(ask: list[str]) -> None:
    result = run_module("edge.generate", "--infill", "Tom had a ___ and it was ___:2.", "--json", *ask)
    response = json.loads(result.stdout)
    assert response["text"].startswith("Tom had a ") and " and it was " in response["text"]
    assert response["usage"]["generated_tokens"] == 6


def test_generate_streams_snapshots_beside_the_text(ask: list[str]) -> None:
    result = run_module("edge.generate", PROMPT, "--stream", *ask)
    assert result.stdout.startswith(PROMPT) and "░" not in result.stdout
    assert result.stderr.startswith("step 1/") and PROMPT in result.stderr and "░" in result.stderr


def test_generate_prints_an_error_as_a_sentence_or_as_json(ask: list[str]) -> None:
    long = "time " * 2000
    result = run_module("edge.generate", long, *ask)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1

    raw = run_module("edge.generate", long, "--json", *ask)
    assert raw.returncode == 1 and json.loads(raw.stdout)["error"]["code"] == "too_large"


def test_generate_hears_a_daemon_that_refuses_before_it_is_asked(tmp_path: Path) -> None:
    full = Response(status="error", error=ErrorInfo("queue_full", "too many clients are connected", retryable=True))

    def refuse() -> None:
        client, _ = listener.accept()
        client.sendall(encode(full) + b"\n")
        client.close()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        thread = threading.Thread(target=refuse)
        thread.start()
        result = run_module("edge.generate", PROMPT, "--socket", str(tmp_path / "s"))
        thread.join(TIMEOUT_S)
    assert result.returncode == 1 and result.stderr == "error: too many clients are connected\n"


@pytest.mark.parametrize(
    ("flags", "exit_code", "named"),
    [
        ([], 2, "prompt"),
        ([PROMPT, "--infill", "a ___"], 2, "prompt"),
        ([PROMPT, "--top-p", "2"], 1, "top_p"),
        ([PROMPT, "--bundle", "/none"], 66, "/none is not a bundle"),
        ([PROMPT, "--socket", str(ROOT / "LICENSE" / "s")], 78, "Not a directory"),
    ],
    ids=["nothing", "both", "out of bounds", "no bundle", "no socket"],
)
def test_generate_names_what_it_cannot_use(flags: list[str], exit_code: int, named: str) -> None:
    result = run_module("edge.generate", *flags)
    assert result.returncode == exit_code
    assert named in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr


def test_generate_says_that_the_daemon_left_before_its_answer(tmp_path: Path) -> None:
    def hang_up() -> None:
        client, _ = listener.accept()
        client.recv(4096)
        client.close()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        thread = threading.Thread(target=hang_up)
        thread.start()
        result = run_module("edge.generate", PROMPT, "--socket", str(tmp_path / "s"))
        thread.join(TIMEOUT_S)
    assert result.returncode == 1
    assert result.stderr == "error: the daemon hung up before it answered\n"


def test_generate_as_a_client_loads_no_runtime(ask: list[str]) -> None:
    code = "import sys; from edge.generate import main; main(sys.argv[1:]); print(sorted(sys.modules))"
    command = [sys.executable, "-c", code, PROMPT, *ask]
    result = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    for runtime in ("numpy", "onnxruntime", "tokenizers", "paho"):
        assert f"'{runtime}'" not in result.stdout


def test_readme_python_snippet_prints_a_text(shared_daemon: Daemon) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    code = snippet.replace("/run/edgelm.sock", str(shared_daemon.socket))
    assert code != snippet
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout.startswith(PROMPT), result.stderr


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Where the demo puts its folder: a short path, as sockets need, and empty again at the end."""
    folder = Path(tempfile.mkdtemp(prefix="demo-"))
    yield folder
    folder.rmdir()


@pytest.mark.slow
def test_demo_shows_a_story_and_leaves_nothing(debug_bundle: Path, temporary: Path) -> None:
    result = run_module("edge.demo", "--bundle", str(debug_bundle), temporary=temporary)

    assert result.returncode == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].startswith("ready in ") and lines[1].startswith("step 1/")
    assert any(line.startswith(PROMPT) for line in lines)
    assert "tokens/s" in result.stdout and "--seed " in lines[-1]


@pytest.mark.slow
def test_demo_prints_a_command_that_repeats_the_text_outside_the_environment(
    debug_bundle: Path, temporary: Path
) -> None:
    told = run_module("edge.demo", "--bundle", str(debug_bundle), temporary=temporary).stdout
    command = told.splitlines()[-1].removeprefix("again: ")
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(temporary)}
    again = subprocess.run(["sh", "-c", command], cwd=ROOT, env=bare, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and f"with {debug_bundle}" in again.stderr
    assert again.stdout.strip() and f"\n{again.stdout}" in told


def test_demo_says_why_its_daemon_did_not_start(temporary: Path) -> None:
    result = run_module("edge.demo", "--bundle", "/none", temporary=temporary)
    assert result.returncode == 66 and result.stdout == ""
    assert result.stderr == "error: /none is not a bundle: cannot read manifest.json (No such file or directory)\n"


def served_by(path: Path) -> int:
    """The process that listens there."""
    connection = connect(path)
    assert connection is not None
    with connection:
        pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)


LINGERING_DEMO = f"""
import time
from edge import demo
from shared.errors import run_main
ask = demo.ask_daemon
demo.ask_daemon = lambda *arguments: (ask(*arguments), time.sleep({TIMEOUT_S}))[0]
run_main(demo.main)
"""
"""The text is there within a tenth of a second, and then stays, so that the signal finds the program."""


def read_on(terminal: int) -> None:
    """Show what a program draws to nobody, until it ends: a terminal that nobody reads stops its program."""
    with suppress(OSError):
        while os.read(terminal, 4096):
            pass


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "kill"])
def test_demo_when_interrupted_stops_its_daemon(
    number: int, exit_code: int, debug_bundle: Path, temporary: Path
) -> None:
    leader, follower = pty.openpty()  # on a terminal, as a user sees it
    command = [sys.executable, "-c", LINGERING_DEMO, "--bundle", str(debug_bundle)]
    environment = clean_environment() | {"TERM": "xterm", "TMPDIR": str(temporary)}
    demo = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=follower, stderr=follower, text=True)
    os.close(follower)
    try:
        assert os.read(leader, 4096).decode().startswith("ready in ")
        threading.Thread(target=read_on, args=[leader], daemon=True).start()
        (socket_path,) = temporary.glob("*/socket")
        daemon_pid = served_by(socket_path)
        demo.send_signal(number)
        assert demo.wait(TIMEOUT_S) == exit_code
    finally:
        demo.kill()
        demo.wait()
        os.close(leader)
    with pytest.raises(ProcessLookupError):
        os.kill(daemon_pid, 0)
