"""`python -m edge.bundle`: install, list, roll back and verify the bundles of a device.

A bundle is served only after its files match their hashes, its signature the device's key, and each decoder has written
ten tokens, in a process of its own. It stays only if the reloaded daemon answers with it; otherwise the previous bundle
serves again.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from edge.backends import may_use_gpu
from edge.backends.trt.build_process import WORKSPACE_MIB, run_build
from edge.backends.trt.engine_builder import Order
from edge.backends.trt.engine_cache import built_roles, writable_cache
from edge.backends.trt.find_tensorrt import is_gpu_device
from edge.client import ask, connect
from edge.config import CONFIG, STORE, Config, load_config, settings_file
from edge.system.bundle_download import RemoteBundle
from edge.system.bundle_store import Links, Store, check_files, check_signature
from edge.system.privileges import become_nobody
from shared.errors import BundleError, ConfigError, DiffusionLLMError, RequestError, command_name, run_main
from shared.manifest import model_name, read_manifest
from shared.messages import GenerateRequest, Response

KEY: Final = Path("/etc/edgelm/minisign.pub")
UNIT: Final = "edgelm.service"
TOKENS: Final = 10
TEST: Final = GenerateRequest(prompt="", seed=1, max_tokens=TOKENS)
TEST_S: Final = 300.0
"""Timeout of the self-test, loading included, and then of the daemon's answer."""
POLL_S: Final = 0.2

EPILOG = """examples:
  python -m edge.bundle install bundle/tinystories    verify, test and serve; on failure nothing changes
  python -m edge.bundle install https://files.example/bundles/tinystories    the same, from a web server's folder
  python -m edge.bundle rollback                      serve the previous bundle again
  python -m edge.bundle verify                        check the bundle that is served

With a minisign key at /etc/edgelm/minisign.pub every bundle must be signed by it (sign the manifest:
minisign -Sm NAME/manifest.json); without one, signatures are not checked, and nothing is downloaded. Web servers are
checked against the system's certificate authorities, or those of SSL_CERT_FILE; https_proxy names a proxy."""


def self_test(folder: Path, config: Config) -> None:
    """Write ten tokens twice by each decoder, and compare them. Drops root for good. Raises BundleError."""
    from edge.serving.loaded_bundle import LoadedBundle  # listing and rolling back need no runtime

    with suppress(ImportError):  # while still root: Python may be in a folder that nobody cannot read
        import onnxruntime  # noqa: F401

        import edge.backends.ort  # noqa: F401
    os.chdir(folder)  # the user nobody cannot pass through every folder above it
    become_nobody()
    try:
        loaded = LoadedBundle.load(Path(), config.backend, config.threads)
        try:
            for decoder in loaded.decoders:
                first, second = (loaded.run(loaded.prepare(replace(TEST, decode=decoder))) for _ in range(2))
                most = TOKENS + 1  # an end left of text takes one more
                if not 1 <= first.steps <= most or first.text != second.text:
                    what = f"two runs of one request by {decoder} differ, or take {first.steps} steps"
                    raise BundleError(what)
        finally:
            loaded.close()
    except BundleError as error:
        raise BundleError(f"{folder} fails its self-test: {error}") from None


def verify(folder: Path, key: Path | None, config: Config) -> None:
    """Check files and, with a key, the signature; run the self-test. Raises BundleError or ConfigError."""
    check_files(folder)
    if key is not None:
        check_signature(folder, key)
    self_test(folder, config)


def verify_apart(folder: Path, arguments: list[str]) -> None:
    """`verify` in a process of its own: its crash or hang is an error of the bundle. Raises BundleError."""
    command = [sys.executable, "-m", "edge.bundle", "verify", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TEST_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise BundleError(f"the bundle did not finish its self-test within {TEST_S:g} s") from None
    if done.returncode != 0:
        lines = done.stderr.splitlines() or [f"the self-test ended with status {done.returncode}"]
        raise BundleError(lines[-1].removeprefix("error: "))


class Service:
    """The daemon as systemd's unit. Without systemd, or with the unit stopped, there is nothing to reload."""

    def __init__(self, config: Config) -> None:
        self._bundle = config.bundle
        self._socket = config.socket

    def serves(self, store: Store) -> bool:
        """Whether it serves from this store. A failed one counts: the old bundle may be the reason."""
        own = self._bundle == store.folder / "current" and Path("/run/systemd/system").is_dir()
        return own and self._show("ActiveState") not in ("inactive", "")

    def serve(self, model: str) -> None:
        """Reload, and wait until it answers a request with that model. Raises BundleError."""
        before = self._show("StatusText")
        verb = "reload" if self._show("ActiveState") in ("active", "reloading") else "restart"
        if verb == "restart":  # clears the start limit
            subprocess.run(["systemctl", "reset-failed", UNIT], capture_output=True)
        done = subprocess.run(["systemctl", verb, UNIT], capture_output=True, text=True)
        if done.returncode != 0:
            raise BundleError(f"{UNIT} cannot {verb}; `journalctl -u {UNIT}` has the details")
        give_up_s = time.monotonic() + TEST_S
        while time.monotonic() < give_up_s:
            if self._answers(model):
                return
            status = self._show("StatusText")
            if status != before and "the last reload failed" in status:
                raise BundleError(f"the daemon refused it: {status.partition('failed: ')[2]}")
            time.sleep(POLL_S)
        raise BundleError(f"the daemon did not answer with {model} within {TEST_S:g} s")

    def _answers(self, model: str) -> bool:
        """Whether it answers with that model now. Raises BundleError when the model fails."""
        connection = connect(self._socket)
        if connection is None:
            return False
        try:
            with connection:
                connection.settimeout(TEST_S)
                response = next(reply for reply in ask(connection, TEST) if isinstance(reply, Response))
        except RequestError:  # it is restarting
            return False
        if response.error is not None and not response.error.retryable:
            raise BundleError(f"the daemon could not answer: {response.error.message}")
        return response.error is None and response.model == model

    def _show(self, property_name: str) -> str:
        command = ["systemctl", "show", "--value", f"--property={property_name}", UNIT]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def switch(store: Store, links: Links, service: Service) -> str:
    """Set the links and have the daemon serve `current`; on failure restore both.  → a sentence for the user

    Raises BundleError after restoring.
    """
    assert links.current is not None
    before = store.links
    store.point(links)
    if not service.serves(store):
        return f"{links.current} is current; no service runs on this store, and the next to start serves it"
    try:
        service.serve(model_name(store.folder / links.current))
    except (BundleError, ConfigError) as error:
        store.point(before)
        if before.current is None:
            raise
        service.serve(model_name(store.folder / before.current))
        raise BundleError(f"{before.current} serves again, because {links.current} did not work: {error}") from None
    return f"{links.current} is served"


def build_engine(folder: Path, config: Config) -> str:
    """On a device with a GPU, build the bundle's engines, which takes minutes.  → an addition to the user's sentence

    Raises DeviceError or BundleError when the configured backend is `trt`.
    """
    only_gpu = config.backend.startswith("trt")
    if not only_gpu and not (config.backend == "auto" and (may_use_gpu("auto") or is_gpu_device())):
        return ""
    try:
        for role in built_roles(read_manifest(folder)) or ["canvas"]:  # without any, the builder says so
            order = Order(str(folder.absolute()), str(writable_cache()), WORKSPACE_MIB, force=False, role=role)
            run_build(order, lambda line: print(line, file=sys.stderr))
    except DiffusionLLMError as error:
        if only_gpu:
            raise
        return f"; it runs on the CPU, without an engine: {error}"
    return ""


def install(
    store: Store,
    source: Path | RemoteBundle,
    *,
    service: Service,
    check: Callable[[Path], None],
    build: Callable[[Path], str] = lambda folder: "",
) -> str:
    """Copy or download, check that, serve it.  → a sentence for the user. Raises BundleError; then nothing has changed.

    check: raises BundleError. build: builds the engine of the checked copy.  → an addition to that sentence
    """
    with store.locked():
        store.discard_partials()  # their room may be needed
        staged = store.stage(source) if isinstance(source, Path) else source.stage(store)
        before = store.names()
        try:
            check(staged)
            built = build(staged)
            name = store.admit(staged)
        except BundleError as error:  # as in `stage`
            raise BundleError(str(error).replace(str(staged), str(source))) from None
        finally:
            store.discard(staged)
        links = store.links
        previous = links.previous if links.current == name else links.current
        try:
            report = switch(store, Links(name, previous), service)
        except (BundleError, ConfigError):
            if name not in before:
                store.discard(store.folder / name)
            raise
        store.prune()
        return report + built


def rollback(store: Store, service: Service) -> str:
    """Swap current and previous.  → a sentence for the user. Raises BundleError."""
    with store.locked():
        links = store.links
        if links.previous in (None, links.current):
            raise BundleError(f"{store.folder} has no previous bundle to roll back to")
        check_files(store.folder / links.previous)
        return switch(store, Links(links.previous, links.current), service)


def describe(store: Store) -> list[str]:
    """One line per bundle: the link that leads to it, name, megabytes, graphs."""
    links = store.links
    lines = []
    for name in store.names():
        folder = store.folder / name
        role = "current" if name == links.current else "previous" if name == links.previous else "-"
        megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        try:
            graphs = ", ".join(f"{g.precision} {g.target} {g.role}" for g in read_manifest(folder).graphs)
        except BundleError as error:
            graphs = f"damaged: {error}"
        lines.append(f"{role:9}{name}  {megabytes:.1f} MB  {graphs}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(
        prog=command_name("edge.bundle"),
        description="The bundles of this device.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--store", type=Path, default=STORE, metavar="DIR", help=f"where bundles are kept (default: {STORE})"
    )
    shared.add_argument(
        "--config", type=Path, metavar="FILE", help=f"the daemon's settings (default: {CONFIG}, if it exists)"
    )
    checked = argparse.ArgumentParser(add_help=False)
    checked.add_argument("--key", type=Path, metavar="FILE", help=f"minisign key (default: {KEY}, if it exists)")
    command = commands.add_parser("install", parents=[shared, checked], help="verify a bundle, and serve it")
    command.add_argument("source", metavar="DIR|URL", help="a folder, or the https address of one")
    commands.add_parser("list", parents=[shared], help="what is installed, and what is served")
    commands.add_parser("rollback", parents=[shared], help="serve the previous bundle")
    command = commands.add_parser(
        "verify", parents=[shared, checked], help="check hashes and signature, write ten tokens"
    )
    command.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="default: the one that is current")
    args = parser.parse_args(argv)
    store = Store(args.store)
    file = settings_file(args.config)
    config = load_config(file)
    if args.command == "list":
        print("\n".join(describe(store)) or f"no bundles in {store.folder}")
    elif args.command == "rollback":
        print(rollback(store, Service(config)))
    elif args.command == "verify":
        folder = args.folder or store.folder / "current"
        key = key_for(args.key)
        verify(folder, key, config)
        print(f"{folder} is undamaged and works" + ("" if key else "; its signature was not checked"))
    else:
        passed_on = [f"--{name}={value}" for name in ("key", "config") if (value := getattr(args, name)) is not None]
        check = partial(verify_apart, arguments=passed_on)
        build = partial(build_engine, config=config)
        print(install(store, source_of(args.source, args.key), service=Service(config), check=check, build=build))
    return 0


def source_of(text: str, key_file: Path | None) -> Path | RemoteBundle:
    """A folder, or an address, whose bundle must be signed. Raises BundleError or ConfigError."""
    if "://" not in text:
        return Path(text)
    if (key := key_for(key_file)) is None:
        raise ConfigError(
            f"a bundle that is downloaded must be signed: put a minisign key at {KEY}, or name one by --key"
        )
    return RemoteBundle(text, key)


def key_for(file: Path | None) -> Path | None:
    """The key that signatures must match; by default the device's, if it has one. Raises ConfigError."""
    if file is not None and not file.is_file():
        raise ConfigError(f"--key {file}: there is no such file")
    return file or (KEY if KEY.is_file() else None)


if __name__ == "__main__":
    run_main(main)
