"""The device's bundles: verified copies in one folder, with a link to the one that is served.

    STORE/
      NAME-DIGEST/    one folder a bundle, only ever renamed into place whole
      current         link to the one that the daemon serves
      previous        link to the one before: what a rollback returns to

A link is swapped by renaming a new one over it, so that at every moment there is a whole one. Two bundles are kept.
"""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared.errors import BundleError
from shared.manifest import MANIFEST, TOKENIZER, Manifest, bundle_digest, read_manifest, sha256_of

SIGNATURE: Final = f"{MANIFEST}.minisig"
PARTIAL: Final = ".partial-"


def check_files(folder: Path) -> Manifest:
    """Hold every file that the manifest lists to its hash. Raises BundleError naming the first that does not fit."""
    manifest = read_manifest(folder)
    for file, expected in ((TOKENIZER, manifest.tokenizer_sha256), *((g.file, g.sha256) for g in manifest.graphs)):
        try:
            found = sha256_of(folder / file)
        except OSError as error:
            raise BundleError(f"bundle file {folder / file} cannot be read ({error.strerror})") from None
        if found != expected:
            short = f"sha256 {found[:12]}… instead of {expected[:12]}…"
            raise BundleError(f"bundle file {folder / file} does not match its manifest: {short}")
    return manifest


def check_signature(folder: Path, key: Path) -> None:
    """Hold the manifest, and by its hashes everything else, to the signature beside it. Raises BundleError.

    Asks the program `minisign`, which the distribution keeps up to date: a library would be a dependency of the
    daemon, and bring a second cryptography stack to the device for a check that runs once an upgrade.
    """
    signature = folder / SIGNATURE
    if not signature.is_file():
        raise BundleError(f"{folder} is not signed: {SIGNATURE} is missing, and {key} asks for it")
    program = shutil.which("minisign")
    if program is None:
        raise BundleError(f"{key} asks for signatures, but minisign is not installed: apt install minisign")
    command = [program, "-V", "-m", str(folder / MANIFEST), "-x", str(signature), "-p", str(key)]
    checked = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if checked.returncode != 0:
        why = " ".join((checked.stderr or checked.stdout).split()) or f"minisign ends with {checked.returncode}"
        raise BundleError(f"{folder / MANIFEST} is not signed by {key}: {why}")


@dataclass(frozen=True)
class Links:
    """What the two links show: names of folders, None without a link."""

    current: str | None
    previous: str | None


class Store:
    """A folder of bundles. Raises BundleError when it cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes the store meanwhile."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BundleError(f"the store {self.folder} cannot be written to: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise BundleError(f"another command is changing {self.folder}; try again when it is done") from None
        finally:
            os.close(handle)

    @property
    def links(self) -> Links:
        """Where they lead now."""
        return Links(self._target("current"), self._target("previous"))

    def names(self) -> list[str]:
        """The bundles there are, by name."""
        if not self.folder.is_dir():
            return []
        return sorted(p.name for p in self.folder.iterdir() if p.is_dir() and not p.is_symlink() and p.name[0] != ".")

    def stage(self, source: Path) -> Path:
        """Copy what a bundle consists of, flushed to the disk.  → a folder that `admit` or `discard` takes over"""
        manifest = read_manifest(source)
        staged = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.folder))
        files = [MANIFEST, TOKENIZER, *(graph.file for graph in manifest.graphs)]
        files += [SIGNATURE] if (source / SIGNATURE).is_file() else []
        try:
            for file in files:
                shutil.copyfile(source / file, staged / file)
                (staged / file).chmod(0o644)  # whatever the umask: the daemon is another user
                _flush(staged / file)
        except OSError as error:
            self.discard(staged)
            raise BundleError(f"{source / file} cannot be copied to {self.folder}: {error.strerror}") from None
        staged.chmod(0o755)
        _flush(staged)
        return staged

    def discard(self, staged: Path) -> None:
        """Remove what was staged."""
        shutil.rmtree(staged, ignore_errors=True)

    def admit(self, staged: Path) -> str:
        """Take a verified folder in; one that is there already stays if it is whole.  → its name"""
        name = f"{read_manifest(staged).name}-{bundle_digest(staged)[:12]}"
        final = self.folder / name
        try:
            check_files(final)
            return name
        except BundleError:  # not there, or damaged since
            if final.is_dir():
                final.rename(Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.folder)) / name)
        staged.rename(final)
        _flush(self.folder)
        return name

    def point(self, links: Links) -> None:
        """Set both links, `previous` first: a crash in between leaves the old one served."""
        for link, name in (("previous", links.previous), ("current", links.current)):
            path = self.folder / link
            if name is None:
                path.unlink(missing_ok=True)
                continue
            fresh = self.folder / f".{link}"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(name)
            fresh.rename(path)
        _flush(self.folder)

    def prune(self) -> None:
        """Remove all but the two that the links show, and what interrupted commands left."""
        keep = (self.links.current, self.links.previous)
        for path in self.folder.iterdir():
            if path.name.startswith(PARTIAL) or (path.name in self.names() and path.name not in keep):
                shutil.rmtree(path, ignore_errors=True)

    def _target(self, link: str) -> str | None:
        path = self.folder / link
        return path.readlink().name if path.is_symlink() else None


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
