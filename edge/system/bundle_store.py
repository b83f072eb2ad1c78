"""The device's bundles: verified copies in one folder, with a link to the one that is served.

    STORE/
      NAME-DIGEST/    one folder per bundle, renamed into place when complete
      current         link to the bundle that the daemon serves
      previous        link to the bundle before: the target of a rollback

Links are replaced atomically, by renaming. Two bundles are kept. Only folders whose name matches their manifest's name
and digest are removed, and only while both links lead to a bundle.
"""

import errno
import fcntl
import os
import shutil
import stat
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
LOCK: Final = ".lock"


def check_files(folder: Path) -> Manifest:
    """Compare every file with its hash in the manifest. Raises BundleError naming the first that differs."""
    manifest = read_manifest(folder)
    for file, expected in ((TOKENIZER, manifest.tokenizer_sha256), *((g.file, g.sha256) for g in manifest.graphs)):
        try:
            actual = sha256_of(folder / file)
        except OSError as error:
            raise BundleError(f"bundle file {folder / file} cannot be read ({error.strerror})") from None
        if actual != expected:
            short = f"sha256 {actual[:12]}… instead of {expected[:12]}…"
            raise BundleError(f"bundle file {folder / file} does not match its manifest: {short}")
    return manifest


def check_signature(folder: Path, key: Path) -> None:
    """Verify the signature of the manifest, which holds the hashes of all other files. Raises BundleError.

    By the program `minisign`, which the distribution keeps up to date: a library would be a dependency of the daemon
    and a second cryptography stack on the device, for a check that runs once per upgrade.
    """
    signature = folder / SIGNATURE
    if not signature.is_file():
        raise BundleError(f"{folder} is not signed: {SIGNATURE} is missing, and {key} requires it")
    program = shutil.which("minisign")
    if program is None:
        raise BundleError(f"{key} requires signatures, but minisign is not installed: apt install minisign")
    command = [program, "-V", "-m", str(folder / MANIFEST), "-x", str(signature), "-p", str(key)]
    checked = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if checked.returncode != 0:
        why = " ".join((checked.stderr or checked.stdout).split()) or f"minisign ends with {checked.returncode}"
        raise BundleError(f"{folder / MANIFEST} is not signed by {key}: {why}")


@dataclass(frozen=True)
class Links:
    """Targets of the two links: names of folders, None without a link."""

    current: str | None
    previous: str | None


class Store:
    """A folder of bundles. Raises BundleError when it cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Exclusive access to the store. Only an empty folder becomes a store."""
        for outer in (self.folder.absolute(), *self.folder.absolute().parents):
            if (outer / MANIFEST).exists():
                raise BundleError(f"{self.folder} cannot be a store of bundles: {outer} is a bundle itself")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = self.folder / LOCK
            if not lock.exists() and (entry := next(self.folder.iterdir(), None)) is not None:
                raise BundleError(f"{self.folder} is no store of bundles, and it is not empty: it holds {entry.name}")
            handle = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield
            finally:
                os.close(handle)
        except BlockingIOError:
            raise BundleError(f"another command is changing {self.folder}; try again when it is done") from None
        except OSError as error:
            raise BundleError(f"the store {self.folder} cannot be written to: {error.strerror or error}") from None

    @property
    def links(self) -> Links:
        """The links as they are now."""
        return Links(self._target("current"), self._target("previous"))

    def names(self) -> list[str]:
        """Names of the bundles."""
        if not self.folder.is_dir():
            return []
        return sorted(p.name for p in self.folder.iterdir() if p.is_dir() and not p.is_symlink() and p.name[0] != ".")

    @contextmanager
    def staging(self, source: object) -> Iterator[Path]:
        """A folder for the files of a bundle; discarded if the block fails, else for `admit` or `discard`.

        source: what a BundleError of the block names instead of that folder.
        """
        staged = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.folder))
        try:
            yield staged
            staged.chmod(0o755)
            _flush(staged)
        except BaseException as error:
            self.discard(staged)
            if isinstance(error, BundleError):
                raise BundleError(str(error).replace(str(staged), str(source))) from None
            raise

    def stage(self, source: Path) -> Path:
        """Copy the files of a bundle, synced to disk.  → a folder for `admit` or `discard`"""
        if not (source / MANIFEST).exists():
            read_manifest(source)  # raises
        file = MANIFEST
        with self.staging(source) as staged:
            try:
                _copy(source / file, staged / file)
                manifest = read_manifest(staged)
                signature = [SIGNATURE] if (source / SIGNATURE).exists() else []
                for file in (TOKENIZER, *(graph.file for graph in manifest.graphs), *signature):
                    _copy(source / file, staged / file)
            except OSError as error:
                raise BundleError(f"{source / file} cannot be copied to {self.folder}: {error.strerror}") from None
        return staged

    def discard(self, staged: Path) -> None:
        """Remove a staged or admitted bundle."""
        shutil.rmtree(staged, ignore_errors=True)

    def admit(self, staged: Path) -> str:
        """Move a verified folder into the store, or repair the one of its name, file by file.  → its name"""
        name = _name_of(staged)
        final = self.folder / name
        if final.is_dir():  # of the same files, if undamaged
            for file in staged.iterdir():
                if not _same(file, final / file.name):
                    file.rename(final / file.name)
            _flush(final)
        else:
            staged.rename(final)
        _flush(self.folder)
        return name

    def point(self, links: Links) -> None:
        """Set both links, `previous` first: a crash in between keeps the old bundle, a full disk changes nothing."""
        targets = {"previous": links.previous, "current": links.current}
        for link, name in targets.items():
            fresh = self.folder / f".{link}"
            fresh.unlink(missing_ok=True)
            if name is not None:
                fresh.symlink_to(name)
        for link, name in targets.items():
            if name is None:
                (self.folder / link).unlink(missing_ok=True)
            else:
                (self.folder / f".{link}").rename(self.folder / link)
        _flush(self.folder)

    def discard_partials(self) -> None:
        """Remove the partial copies of killed commands."""
        for path in self.folder.glob(f"{PARTIAL}*"):
            self.discard(path)

    def prune(self) -> None:
        """Remove the bundles that neither link leads to; none if a link is missing, since it may have led to any."""
        keep = (self.links.current, self.links.previous)
        if any(name is None or not (self.folder / name).is_dir() for name in keep):
            return
        for name in self.names():
            if name not in keep and _is_named_by_its_content(self.folder / name):
                self.discard(self.folder / name)

    def _target(self, link: str) -> str | None:
        path = self.folder / link
        return path.readlink().name if path.is_symlink() else None


def _name_of(folder: Path) -> str:
    return f"{read_manifest(folder).name}-{bundle_digest(folder)[:12]}"


def _is_named_by_its_content(folder: Path) -> bool:
    try:
        return folder.name == _name_of(folder)
    except BundleError:
        return False


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and not other.is_symlink() and sha256_of(one) == sha256_of(other)


def _copy(source: Path, target: Path) -> None:
    """Copy a plain file. Links are refused, since they may lead outside the bundle, and pipes, which never end."""
    try:
        handle = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BundleError(f"bundle file {source} is a link; `cp -rL` copies a bundle without links") from None
        raise
    with os.fdopen(handle, "rb") as readable:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise BundleError(f"bundle file {source} is not a plain file")
        with target.open("wb") as writable:
            shutil.copyfileobj(readable, writable, 1 << 20)
            writable.flush()
            os.fsync(writable.fileno())
    target.chmod(0o644)  # for the daemon's user, whatever the umask
