"""Where built engines are kept, and under which name: an engine serves one graph, one TensorRT and one kind of GPU.

An engine is a program: it is loaded only from a folder of this user or of root. Root never runs what the daemon's user
has put there.
"""

import hashlib
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

from edge.backends.trt import kernels
from edge.backends.trt.driver import Gpu
from edge.backends.trt.profiles import buckets
from shared.errors import DeviceError
from shared.manifest import Manifest, find_graph

SYSTEM_CACHE: Final = Path("/opt/edgelm/engines")
"""Root's: `edge.bundle install` and `sudo edgelm build` write here, and the daemon reads."""
ENGINE: Final = "step.engine"
KERNELS: Final = "kernels.cubin"
FACTS: Final = "facts.json"
TIMINGS: Final = "timings-*.cache"
KEPT: Final = 4
"""Engines in a cache folder; those used last. Two bundles are kept, and each may have one of an earlier TensorRT."""
FLAGS: Final = "strongly typed, no auxiliary streams, one profile a shape"
"""What the builder is told; part of the key, so that another release of ours does not take an older engine."""


class Facts(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that an engine depends on. shapes: (batch, length) of its profiles, in order."""

    graph_sha256: str
    kernels_sha256: str
    tensorrt: str
    cuda: str
    gpu: str
    architecture: str
    processors: int
    shapes: tuple[tuple[int, int], ...]
    flags: str = FLAGS

    @property
    def key(self) -> str:
        """The name of the engine's folder."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:24]


class Built(NamedTuple):
    """What the device runs."""

    engine: bytes
    cubin: bytes


def facts_of(folder: Path, manifest: Manifest, tensorrt: str, gpu: Gpu) -> Facts:
    """The facts of this bundle's engine on this device. Raises BundleError when the bundle has no graph for CUDA."""
    kernels_text = kernels.source("arithmetic.h") + kernels.source("unmask.cu")
    return Facts(
        graph_sha256=find_graph(folder, manifest, "cuda").sha256,
        kernels_sha256=hashlib.sha256(kernels_text.encode()).hexdigest(),
        tensorrt=tensorrt,
        cuda=gpu.cuda_version,
        gpu=gpu.name,
        architecture=gpu.architecture,
        processors=gpu.processors,
        shapes=tuple(buckets(manifest, gpu.processors)),
    )


def cache_folders() -> tuple[Path, ...]:
    """Where engines are looked for: the service's own folder, the system's, the user's; built into the first writable.

    systemd's CacheDirectory= sets CACHE_DIRECTORY.
    """
    own = os.environ.get("CACHE_DIRECTORY", "").split(":")[0]
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME", "/"), ".cache")) / "edgelm"
    return (*((Path(own),) if own else ()), SYSTEM_CACHE, user)


def writable_cache() -> Path:
    """The first of the cache folders that this user can write to; it exists then. Raises DeviceError."""
    for folder in cache_folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    tried = ", ".join(map(str, cache_folders()))
    raise DeviceError(f"no folder for engines can be written to ({tried}): name one with --cache")


def find(facts: Facts, folders: tuple[Path, ...]) -> Path | None:
    """The folder of a built engine, if there is one that this user may read."""
    return next((place for folder in folders if _is_usable(place := folder / facts.key)), None)


def any_built(folders: tuple[Path, ...]) -> bool:
    """Whether some engine is there that this user may read; it need not be this bundle's."""
    for folder in folders:
        try:
            if any(_is_usable(place) for place in folder.iterdir()):
                return True
        except OSError:  # not there, or not ours
            continue
    return False


def _is_usable(place: Path) -> bool:
    """Whether a readable engine is there, of this user or of root."""
    trusted = (0, os.geteuid())
    try:
        return os.access(place / ENGINE, os.R_OK) and all(
            path.stat().st_uid in trusted for path in (place.parent, place, place / ENGINE)
        )
    except OSError:
        return False


def load(place: Path) -> Built:
    """Read a built engine. Raises DeviceError."""
    with suppress(OSError):  # root's, read by the daemon
        os.utime(place)
    try:
        return Built((place / ENGINE).read_bytes(), (place / KERNELS).read_bytes())
    except OSError as error:
        raise DeviceError(
            f"the engine in {place} cannot be read ({error.strerror}): run python -m edge.build"
        ) from None


def store(facts: Facts, built: Built, cache: Path) -> Path:
    """Keep an engine: a reader finds a whole one at every moment. Removes those that were not used for longest.

    Where one of its key is already, each file is replaced by itself: files of one key fit each other. Raises
    DeviceError when the disk refuses.
    """
    place = cache / facts.key
    contents = {KERNELS: built.cubin, FACTS: msgspec.json.format(msgspec.json.encode(facts)), ENGINE: built.engine}
    try:
        with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as temporary:
            fresh = Path(temporary) / "fresh"
            fresh.mkdir(mode=0o755)
            for name, content in contents.items():
                write_durably(fresh / name, content)
            if place.is_dir():
                for name in contents:
                    (fresh / name).replace(place / name)
            else:
                fresh.rename(place)
    except OSError as error:
        raise DeviceError(f"the engine cannot be written to {cache}: {error.strerror}") from None
    _prune(cache, place)
    return place


def _prune(cache: Path, newest: Path) -> None:
    """Keep KEPT engines, the newest among them. Removed is only what is named by the key of its own facts."""
    engines = sorted((p for p in cache.iterdir() if _is_ours(p)), key=lambda p: (p != newest, -p.stat().st_mtime))
    for place in engines[KEPT:]:
        shutil.rmtree(place, ignore_errors=True)


def _is_ours(place: Path) -> bool:
    try:
        return not place.is_symlink() and msgspec.json.decode(plain_bytes(place / FACTS), type=Facts).key == place.name
    except (OSError, msgspec.MsgspecError):
        return False


def adopt(place: Path, cache: Path) -> Path:
    """Keep an engine that another user's process has built, and its timing caches.  → its place. Raises DeviceError."""
    try:
        if not _is_ours(place):
            raise DeviceError(f"the builder left no engine in {place}")
        for timings in place.parent.glob(TIMINGS):
            replace_durably(cache / timings.name, plain_bytes(timings))
        facts = msgspec.json.decode(plain_bytes(place / FACTS), type=Facts)
        return store(facts, Built(plain_bytes(place / ENGINE), plain_bytes(place / KERNELS)), cache)
    except OSError as error:
        raise DeviceError(f"the engine cannot be taken over from {place}: {error.strerror or error}") from None


def plain_bytes(path: Path) -> bytes:
    """Read a file, and nothing that a link leads to. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{path} is not a plain file")
        return file.read()


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait for the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, content: bytes) -> None:
    """Write a file beside `path`, then put it there."""
    fresh = path.with_suffix(".new")
    write_durably(fresh, content)
    fresh.replace(path)
