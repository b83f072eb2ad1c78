"""`python -m edge.bundle` without a running service: what it takes in, what it refuses, and what it leaves behind."""

import fcntl
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from shared.manifest import sha256_of
from tests.integration.harness import run_module

needs_minisign = pytest.mark.skipif(shutil.which("minisign") is None, reason="minisign is not installed")


def bundle_command(store: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_module("edge.bundle", *map(str, arguments), "--store", str(store))


def install(store: Path, folder: Path, *more: object) -> str:
    """The name it goes by in the store."""
    done = bundle_command(store, "install", folder, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[0]


def variant(bundle: Path, folder: Path, name: str) -> Path:
    """A whole bundle under another name."""
    shutil.copytree(bundle, folder / name)
    manifest = json.loads((bundle / "manifest.json").read_text()) | {"name": name}
    (folder / name / "manifest.json").write_text(json.dumps(manifest))
    return folder / name


def links(store: Path) -> tuple[str, str | None]:
    previous = store / "previous"
    return (store / "current").readlink().name, previous.readlink().name if previous.is_symlink() else None


def contents(store: Path) -> set[str]:
    return {path.name for path in store.iterdir()} - {".lock", "current", "previous"}


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 66, (done.stdout, done.stderr)
    (line,) = done.stderr.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.slow
def test_bundle_install_keeps_the_previous_bundle_for_a_rollback(debug_bundle: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = install(store, debug_bundle)
    assert links(store) == (first, None)
    second = install(store, variant(debug_bundle, tmp_path, "second"))
    assert links(store) == (second, first)
    third = install(store, variant(debug_bundle, tmp_path, "third"))
    assert links(store) == (third, second) and contents(store) == {second, third}

    listed = bundle_command(store, "list").stdout.splitlines()
    assert [line.split()[:2] for line in listed] == [["previous", second], ["current", third]]
    assert "fp32 cpu canvas, fp16 cuda canvas" in listed[0]

    assert bundle_command(store, "rollback").returncode == 0
    assert links(store) == (second, third)


@pytest.mark.slow
def test_bundle_install_of_the_current_bundle_changes_nothing(debug_bundle: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = install(store, debug_bundle)
    file = store / first / "manifest.json"
    before = file.stat().st_ino
    assert install(store, debug_bundle) == first
    assert links(store) == (first, None) and file.stat().st_ino == before


def test_bundle_rollback_without_a_previous_bundle_is_refused(debug_bundle: Path, tmp_path: Path) -> None:
    install(tmp_path / "store", debug_bundle)
    assert "no previous bundle" in refusal(bundle_command(tmp_path / "store", "rollback"))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["graph", "tokenizer", "manifest", "missing file", "graph that does not load"])
def test_bundle_install_of_a_faulty_bundle_leaves_nothing(damage: str, debug_bundle: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    before = install(store, debug_bundle)
    bad = variant(debug_bundle, tmp_path, "bad")
    manifest = json.loads((bad / "manifest.json").read_text())
    graph = next(graph for graph in manifest["graphs"] if graph["target"] == "cpu")
    file = bad / graph["file"]
    if damage == "graph":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    elif damage == "tokenizer":
        (bad / "tokenizer.json").write_text("{}")
    elif damage == "manifest":
        (bad / "manifest.json").write_text("{")
    elif damage == "missing file":
        file.unlink()
    else:
        file.write_bytes(b"no graph")
        graph["sha256"] = sha256_of(file)
        (bad / "manifest.json").write_text(json.dumps(manifest))

    said = refusal(bundle_command(store, "install", bad))
    assert {"manifest": "manifest.json", "tokenizer": "tokenizer.json"}.get(damage, graph["file"]) in said
    assert str(bad) in said and ".partial" not in said
    assert links(store) == (before, None) and contents(store) == {before}


@pytest.mark.slow
def test_bundle_verify_reports_damage_and_install_repairs_it(debug_bundle: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    name = install(store, debug_bundle)
    assert bundle_command(store, "verify").returncode == 0
    (store / name / "tokenizer.json").write_text("{}")
    assert "does not match its manifest" in refusal(bundle_command(store, "verify"))
    assert install(store, debug_bundle) == name
    assert bundle_command(store, "verify").returncode == 0 and contents(store) == {name}


def test_bundle_install_is_readable_by_the_daemon_under_any_umask(debug_bundle: Path, tmp_path: Path) -> None:
    store, private = tmp_path / "store", tmp_path / "private"
    shutil.copytree(debug_bundle, private)
    for path in private.iterdir():
        path.chmod(0o600)
    name = install(store, private)
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (store / name).iterdir())
    assert (store / name).stat().st_mode & 0o777 == 0o755


def test_bundle_install_excludes_a_second_command(debug_bundle: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    with (store / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another command" in refusal(bundle_command(store, "install", debug_bundle))


def test_bundle_store_that_cannot_be_used_is_named(debug_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refusal(bundle_command(tmp_path / "file" / "store", "install", debug_bundle))


def test_bundle_list_of_an_empty_store_is_empty(tmp_path: Path) -> None:
    assert "no bundles in" in bundle_command(tmp_path / "none", "list").stdout


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A minisign key pair: public, secret."""
    public, secret = tmp_path / "minisign.pub", tmp_path / "minisign.key"
    command = ["minisign", "-G", "-W", "-p", str(public), "-s", str(secret)]
    subprocess.run(command, check=True, capture_output=True)
    return public, secret


@pytest.mark.slow
@needs_minisign
def test_bundle_install_with_a_key_takes_signed_bundles_only(
    keys: tuple[Path, Path], debug_bundle: Path, tmp_path: Path
) -> None:
    public, secret = keys
    store, signed = tmp_path / "store", variant(debug_bundle, tmp_path, "signed")
    manifest = signed / "manifest.json"
    assert "manifest.json.minisig is missing" in refusal(bundle_command(store, "install", signed, "--key", public))

    subprocess.run(["minisign", "-S", "-s", str(secret), "-m", str(manifest)], check=True, capture_output=True)
    name = install(store, signed, "--key", public)
    assert bundle_command(store, "verify", "--key", public).returncode == 0

    manifest.write_text(manifest.read_text().replace('"calibration"', ' "calibration"'))
    said = refusal(bundle_command(store, "install", signed, "--key", public))
    assert "is not signed by" in said and "Signature verification failed" in said
    assert links(store) == (name, None)


@needs_minisign
def test_bundle_verify_with_a_missing_key_file_is_refused(debug_bundle: Path, tmp_path: Path) -> None:
    done = bundle_command(tmp_path / "store", "verify", debug_bundle, "--key", tmp_path / "none.pub")
    assert done.returncode == 78 and "none.pub" in done.stderr


@pytest.mark.slow
def test_bundle_install_takes_one_that_decodes_by_blocks_alone(blocks_alone: Path, tmp_path: Path) -> None:
    assert install(tmp_path / "store", blocks_alone).startswith("blocks-")
