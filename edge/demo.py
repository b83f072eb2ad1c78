"""`python -m edge.demo`: start a daemon, watch it write a story, stop it."""

import argparse
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from edge.client import connect
from edge.config import PREFIX, default_bundle
from edge.generate import ask_daemon, unwrap
from edge.terminal_view import View, laid_out
from shared.errors import ConfigError, DiffusionLLMError, command_name, run_main
from shared.manifest import read_manifest
from shared.messages import GenerateRequest

PROMPT: Final = "Once upon a time"
START_S: Final = 60.0
STOP_S: Final = 10.0

EPILOG = """example:
  python -m edge.demo --bundle bundles/mine"""


@contextmanager
def running_daemon(bundle: Path, socket: Path, log: IO[bytes]) -> Iterator[str]:
    """A daemon for as long as the block runs; yields its ready line.

    Raises DiffusionLLMError with the daemon's message when it does not start.
    """
    # Without the settings of the user's own daemon, such as its broker.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    command = [sys.executable, "-m", "edge", "--bundle", str(bundle), "--socket", str(socket)]
    # A session of its own: Ctrl-C stops this program, which then stops the daemon.
    daemon = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True)
    assert daemon.stdout is not None
    try:
        if not select.select([daemon.stdout], [], [], START_S)[0]:
            raise DiffusionLLMError(f"the daemon was not ready within {START_S:g} s")
        ready = daemon.stdout.readline().decode().strip()
        if not ready:
            raise _failure_to_start(daemon, log)
        yield ready
    finally:
        daemon.terminate()
        try:
            daemon.wait(STOP_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        daemon.stdout.close()


def _failure_to_start(daemon: "subprocess.Popen[bytes]", log: IO[bytes]) -> DiffusionLLMError:
    exit_code = daemon.wait(STOP_S)
    log.seek(0)
    message = log.read().decode(errors="replace").strip().rpartition("\n")[2].removeprefix("error: ")
    error = DiffusionLLMError(message or f"the daemon ended with exit status {exit_code}")
    error.exit_code = exit_code
    return error


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration; its daemon and its files are gone afterwards, also after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog=command_name("edge.demo"),
        description="Start a daemon in a temporary folder, watch it write a story, stop it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", type=Path, default=default_bundle(), metavar="DIR", help="default: the shipped one")
    args = parser.parse_args(argv)
    settings = best_settings(args.bundle)  # read first: msgspec swallows a signal that meets it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="edgelm-") as name:
        folder = Path(name)
        with (folder / "daemon.log").open("w+b") as log, running_daemon(args.bundle, folder / "socket", log) as ready:
            print(ready)
            _tell_story(folder / "socket", args.bundle, settings)
    return 0


def _tell_story(socket: Path, bundle: Path, settings: Mapping[str, Any]) -> None:
    started_s = time.monotonic()
    connection = connect(socket)
    if connection is None:
        raise ConfigError(f"the daemon said it was ready, but nothing listens at {socket}")
    with connection, View(sys.stdout) as view:
        request = GenerateRequest(prompt=PROMPT, stream=True, **settings)
        response = ask_daemon(connection, request, view.show)
    seconds = time.monotonic() - started_s
    text = unwrap(response)
    assert response.usage is not None and response.seed is not None
    tokens, steps = response.usage.generated_tokens, response.usage.steps
    print(f"\n{laid_out(text, sys.stdout)}\n")
    print(f"{tokens} tokens in {steps} steps and {seconds:.2f} s: {tokens / seconds:.0f} tokens/s")
    print("again:", command_to_repeat(bundle, {**settings, "seed": response.seed}))


def command_to_repeat(bundle: Path, settings: Mapping[str, Any]) -> str:
    """The command that writes the same text again, in a shell in this folder with any active environment."""
    command = [_short(Path(sys.executable)), "-m", "edge.generate", PROMPT, "--bundle", _short(bundle), "--stream"]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    return shlex.join(command)


def best_settings(bundle: Path) -> dict[str, Any]:
    """By blocks the defaults. By canvas one step a token: something to see, and varied text (docs/quality.md)."""
    if read_manifest(bundle).decoders[0] == "blocks":
        return {}
    return {"steps": 256, "selection": "entropy", "temperature": 1.0}  # colder, this rule repeats itself


def _short(path: Path) -> str:
    """`path` relative to the working directory, if it is below."""
    path, here = path.absolute(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


if __name__ == "__main__":
    run_main(main)
