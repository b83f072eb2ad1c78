"""Bundles that mean harm, disks that fill up, and commands that are killed: the store stays as it was, and usable."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import edge.bundle
from edge.backends.trt.engine_builder import Order
from edge.bundle import Service, build_engine
from edge.config import Config
from edge.system.bundle_store import Store, check_files, check_signature
from shared.errors import BundleError, DeviceError
from shared.manifest import bundle_digest
from tests.integration.harness import ROOT, clean_environment
from tests.integration.test_bundle_command import (
    bundle_command,
    contents,
    install,
    links,
    needs_minisign,
    refusal,
    variant,
)


def graph_file(bundle: Path) -> Path:
    return bundle / str(json.loads((bundle / "manifest.json").read_text())["graphs"][0]["file"])


def refused(folder: Path, bundle: Path, key: Path | None = None) -> str:
    """Why `edge.bundle install` refuses a bundle; but for the self-test, and in this process."""

    def check(staged: Path) -> None:
        check_files(staged)
        if key is not None:
            check_signature(staged, key)

    with pytest.raises(BundleError) as caught:
        edge.bundle.install(Store(folder), bundle, service=Service(Config()), check=check)
    assert ".partial" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "graph"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_bundle_harm_links_and_pipes_are_refused(name: str, kind: str, debug_bundle: Path, tmp_path: Path) -> None:
    """What a link leads to is read by root, and would be for everyone to read in the store; a pipe would never end."""
    store, bad = tmp_path / "store", variant(debug_bundle, tmp_path, "bad")
    file = graph_file(bad) if name == "graph" else bad / name
    if kind == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")  # with the right content, even
    else:
        file.unlink()
        (os.mkfifo if kind == "pipe" else os.mkdir)(file)
    said = refused(store, bad)
    assert str(file) in said
    assert {"link": "is a link", "pipe": "is not a plain file", "folder": "Is a directory"}[kind] in said
    assert contents(store) == set() and not (store / "current").is_symlink()


@pytest.mark.parametrize("path", ["../../escaped", "/etc/hostname", "a/b", "..", ".hidden", ""])
@pytest.mark.parametrize("field", ["name", "file"])
def test_bundle_harm_paths_in_a_manifest_are_refused(field: str, path: str, debug_bundle: Path, tmp_path: Path) -> None:
    store, bad = tmp_path / "store", variant(debug_bundle, tmp_path, "bad")
    manifest = json.loads((bad / "manifest.json").read_text())
    (manifest["graphs"][0] if field == "file" else manifest)[field] = path
    (bad / "manifest.json").write_text(json.dumps(manifest))
    said = refused(store, bad)
    assert "manifest.json is damaged" in said and str(bad) in said
    assert contents(store) == set() and {p.name for p in tmp_path.iterdir()} == {"store", "bad"}


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "graph"])
def test_bundle_harm_truncated_file_is_named(name: str, debug_bundle: Path, tmp_path: Path) -> None:
    store, bad = tmp_path / "store", variant(debug_bundle, tmp_path, "bad")
    file = graph_file(bad) if name == "graph" else bad / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert str(file) in refused(store, bad)
    assert contents(store) == set()


@needs_minisign
@pytest.mark.parametrize("fault", ["another key's", "another bundle's", "cut off", "no signature", "no key"])
def test_bundle_harm_wrong_signature_is_refused(fault: str, debug_bundle: Path, tmp_path: Path) -> None:
    store, bad = tmp_path / "store", variant(debug_bundle, tmp_path, "bad")
    pairs = [(tmp_path / f"{n}.pub", tmp_path / f"{n}.key") for n in range(2)]
    for public, secret in pairs:
        subprocess.run(["minisign", "-G", "-W", "-p", str(public), "-s", str(secret)], check=True, capture_output=True)
    (public, secret), (_, other) = pairs
    signed = debug_bundle / "manifest.json" if fault == "another bundle's" else bad / "manifest.json"
    signature = bad / "manifest.json.minisig"
    key = other if fault == "another key's" else secret
    command = ["minisign", "-S", "-s", key, "-m", signed, "-x", signature]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    if fault == "cut off":
        signature.write_bytes(signature.read_bytes()[:80])
    elif fault == "no signature":
        signature.write_text("trust me")
    elif fault == "no key":
        public.write_text("no key")
    said = refused(store, bad, public)
    assert f"is not signed by {public}" in said and str(bad) in said
    assert contents(store) == set()


@pytest.fixture
def small_disk(tmp_path: Path, debug_bundle: Path) -> Iterator[Path]:
    """A file system for one and a half bundles."""
    size = sum(path.stat().st_size for path in debug_bundle.iterdir()) * 3 // 2
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)], check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a small disk")
def test_bundle_harm_full_disk_changes_nothing(small_disk: Path, debug_bundle: Path, tmp_path: Path) -> None:
    store, second = small_disk / "store", variant(debug_bundle, tmp_path, "second")
    first = install(store, debug_bundle)
    said = refusal(bundle_command(store, "install", second))
    assert said.endswith(f"cannot be copied to {store}: No space left on device")
    assert links(store) == (first, None) and contents(store) == {first}
    assert bundle_command(store, "verify").returncode == 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a small disk")
def test_bundle_harm_leftovers_of_a_killed_command_are_removed(
    small_disk: Path, debug_bundle: Path, tmp_path: Path
) -> None:
    store = small_disk / "store"
    (store / ".partial-1").mkdir(parents=True)
    (store / ".lock").touch()
    shutil.copytree(debug_bundle, store / ".partial-1/copy")
    name = install(store, debug_bundle)
    assert contents(store) == {name}


@pytest.mark.slow
def test_bundle_harm_kill_at_any_step_leaves_a_whole_bundle_current(debug_bundle: Path, tmp_path: Path) -> None:
    new = variant(debug_bundle, tmp_path, "new")
    command = [sys.executable, "-m", "tests.support.killed", tmp_path / "store", debug_bundle, new]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(line["whole"] for line in told)
    names = {line["current"].rpartition("-")[0] for line in told}
    assert names == {"debug", "new"}  # it was killed before the swap, and behind it
    steps = [line["before"] for line in told]
    assert any(step.startswith("os.rename .current") for step in steps) and len(steps) > 15
    assert {tuple(line["left"]) for line in told} == {tuple(told[-1]["left"])} and told[-1]["survived"]


def test_bundle_harm_foreign_folder_is_refused_and_keeps_its_files(debug_bundle: Path, tmp_path: Path) -> None:
    """`--store .` beside the bundle, as one types it in a checkout."""
    mine = tmp_path / "mine"
    bundle = variant(debug_bundle, mine, "mine")
    (mine / "photos").mkdir()
    (mine / "photos" / "one.jpg").write_text("dear")
    before = sorted(path.relative_to(mine) for path in mine.rglob("*"))
    said = refusal(bundle_command(mine, "install", bundle))
    assert f"{mine} is no store of bundles, and it is not empty: it holds " in said
    assert sorted(path.relative_to(mine) for path in mine.rglob("*")) == before


@pytest.mark.parametrize("inside", ["", "store", "a/store"])
def test_bundle_harm_store_inside_a_bundle_is_refused(inside: str, debug_bundle: Path, tmp_path: Path) -> None:
    bundle = variant(debug_bundle, tmp_path, "mine")
    before = sorted(bundle.rglob("*"))
    said = refused(bundle / inside, bundle)
    assert f"{bundle / inside} cannot be a store of bundles: {bundle} is a bundle itself" in said
    assert sorted(bundle.rglob("*")) == before


@pytest.mark.slow
def test_bundle_harm_foreign_files_in_the_store_survive(debug_bundle: Path, tmp_path: Path) -> None:
    """Photos, a bundle that somebody copied there by hand, and one whose name says another digest."""
    store = tmp_path / "store"
    install(store, debug_bundle)
    (store / "photos-0123456789ab").mkdir()
    variant(debug_bundle, store, "by-hand")
    variant(debug_bundle, store, "debug-0123456789ab")
    for name in ("second", "third", "fourth"):
        install(store, variant(debug_bundle, tmp_path, name))
    kept = {"photos-0123456789ab", "by-hand", "debug-0123456789ab"}
    assert {name.rpartition("-")[0] for name in contents(store) - kept} == {"third", "fourth"}
    assert kept <= contents(store)


@pytest.mark.slow
def test_bundle_harm_store_without_links_keeps_its_bundles(debug_bundle: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    names = {install(store, debug_bundle), install(store, variant(debug_bundle, tmp_path, "second"))}
    for link in ("current", "previous"):
        (store / link).unlink()
    third = install(store, variant(debug_bundle, tmp_path, "third"))
    assert contents(store) == names | {third} and links(store) == (third, None)
    assert install(store, store / next(iter(names))) in names, "one of them can be served again"


@pytest.mark.slow
def test_bundle_harm_refused_bundle_removes_nothing(debug_bundle: Path, tmp_path: Path) -> None:
    """Bundles are removed after the new one was verified, and not before it was even read."""
    store = tmp_path / "store"
    names = {install(store, debug_bundle), install(store, variant(debug_bundle, tmp_path, "second"))}
    spare = variant(debug_bundle, store, "spare")
    name = spare.rename(store / f"spare-{bundle_digest(spare)[:12]}").name
    refused(store, tmp_path / "nothing")
    assert contents(store) == names | {name}


WATCHED = """
import os, sys
import edge.bundle, edge.serving.loaded_bundle as m
real = m.LoadedBundle.load
def load(*arguments):
    print(os.getresuid(), os.getresgid())
    return real(*arguments)
m.LoadedBundle.load = load
edge.bundle.main(["verify", *sys.argv[1:]])
"""


@pytest.mark.skipif(os.getuid() != 0, reason="who is not root has nothing to give up")
def test_bundle_harm_untrusted_graph_is_loaded_as_nobody(debug_bundle: Path, tmp_path: Path) -> None:
    bundle = variant(debug_bundle, tmp_path, "strange")
    command = [sys.executable, "-c", WATCHED, str(bundle)]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "(65534, 65534, 65534) (65534, 65534, 65534)"
    assert second == f"{bundle} is undamaged and works; its signature was not checked"


@pytest.mark.parametrize("backend", ["auto", "trt"])
def test_bundle_install_on_a_gpu_device_builds_the_engine_or_says_why_not(
    backend: str, debug_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built from the checked copy, before it is served."""
    config, store = Config(backend=backend), Store(tmp_path / "store")
    monkeypatch.setattr(edge.bundle, "is_gpu_device", lambda: True)
    monkeypatch.setattr(edge.bundle, "writable_cache", lambda: tmp_path)
    orders: list[Order] = []

    def run_build(order: Order, tell: object) -> None:
        assert contents(store.folder) == {Path(order.bundle).name}, "it is staged, and not yet served"
        orders.append(order)
        if len(orders) > 1:
            raise DeviceError("TensorRT 10.3.0 ran out of memory")

    monkeypatch.setattr(edge.bundle, "run_build", run_build)

    def install() -> str:
        shutil.rmtree(store.folder, ignore_errors=True)
        service = Service(config)
        return edge.bundle.install(
            store, debug_bundle, service=service, check=lambda _: None, build=partial(build_engine, config=config)
        )

    assert install().endswith("the next to start serves it")
    if backend == "trt":
        with pytest.raises(DeviceError, match="ran out of memory"):
            install()
        assert contents(store.folder) == set()
    else:
        told = "; it runs on the CPU, without an engine: TensorRT 10.3.0 ran out of memory"
        assert install().endswith(told)


def test_bundle_install_without_a_gpu_builds_no_engine(debug_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.bundle, "run_build", lambda *_: pytest.fail("nothing to build"))
    monkeypatch.setattr(edge.bundle, "is_gpu_device", lambda: False)
    monkeypatch.setattr(edge.bundle, "may_use_gpu", lambda name: False)
    assert build_engine(debug_bundle, Config(backend="auto")) == build_engine(debug_bundle, Config(backend="ort")) == ""
