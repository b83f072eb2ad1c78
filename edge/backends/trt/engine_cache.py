"""The cache of built engines, keyed by all that an engine depends on: graph, TensorRT version, GPU.

An engine is executable code: it is loaded only from folders owned by this user or by root, so root never runs what the
daemon's user has written.
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
from edge.backends.trt.profiles import buckets, reads_memory, step_profiles
from shared.errors import DeviceError
from shared.manifest import Manifest, Role, find_graph, graph_digest, has_role

SYSTEM_CACHE: Final = Path("/opt/edgelm/engines")
"""Root's: `edge.bundle install` and `sudo edgelm build` write here, and the daemon reads."""
ENGINE: Final = "step.engine"
KERNELS: Final = "kernels.cubin"
FACTS: Final = "facts.json"
TIMINGS: Final = "timings-*.cache"
KEPT: Final = 16
"""Engines per cache folder, the most recently used: canvas, blocks and encoders of two bundles, and of an earlier
TensorRT.
"""
FLAGS: Final = "strongly typed, no auxiliary streams, one profile a shape"
"""Builder settings; in the key, so that a release with other settings does not load an older engine."""


class Facts(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that an engine depends on. shapes: (batch, length) or (requests, rows) of its profiles, in order."""

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


def facts_of(folder: Path, manifest: Manifest, *, tensorrt: str, gpu: Gpu, role: Role = "canvas") -> Facts:
    """The facts of the engine of this bundle's graph of that role on this device.

    Raises BundleError when the bundle has no such graph for CUDA.
    """
    window, graph = 0 if manifest.blocks is None else manifest.blocks.window, find_graph(folder, manifest, "cuda", role)
    shapes = buckets(manifest, gpu.processors) if role == "canvas" else [(1, 1)]  # an encoder has one shape
    if role == "step":
        shapes = step_profiles(manifest.model.canvas_len, window, reads_memory(graph))
    kernels_text = "".join(map(kernels.source, kernels.HEADERS))
    return Facts(
        graph_sha256=graph_digest(manifest, graph),
        kernels_sha256=hashlib.sha256(kernels_text.encode()).hexdigest(),
        tensorrt=tensorrt,
        cuda=gpu.cuda_version,
        gpu=gpu.name,
        architecture=gpu.architecture,
        processors=gpu.processors,
        shapes=tuple(shapes),
    )


def built_roles(manifest: Manifest) -> list[Role]:
    """The graphs of a bundle that an engine is built of: for the decoders canvas and blocks, and for conditions."""
    roles: tuple[Role, ...] = ("canvas", "step", "encode.text", "encode.image")
    return [role for role in roles if has_role(manifest, "cuda", role)]


def cache_folders() -> tuple[Path, ...]:
    """Folders searched for engines: the service's, the system's, the user's. The first writable one is built into.

    systemd's CacheDirectory= sets CACHE_DIRECTORY.
    """
    own = os.environ.get("CACHE_DIRECTORY", "").split(":")[0]
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME", "/"), ".cache")) / "edgelm"
    return (*((Path(own),) if own else ()), SYSTEM_CACHE, user)


def writable_cache() -> Path:
    """The first cache folder that this user can write to; created if need be. Raises DeviceError."""
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
    """Whether this user may read any engine there, of whichever bundle."""
    for folder in folders:
        try:
            if any(_is_usable(place) for place in folder.iterdir()):
                return True
        except OSError:  # missing, or another user's
            continue
    return False


def _is_usable(place: Path) -> bool:
    """Whether it holds a readable engine that belongs to this user or to root."""
    trusted = (0, os.geteuid())
    try:
        return os.access(place / ENGINE, os.R_OK) and all(
            path.stat().st_uid in trusted for path in (place.parent, place, place / ENGINE)
        )
    except OSError:
        return False


def load(place: Path) -> Built:
    """Read a built engine. Raises DeviceError."""
    with suppress(OSError):  # another owner; the time of use stays
        os.utime(place)
    try:
        return Built((place / ENGINE).read_bytes(), (place / KERNELS).read_bytes())
    except OSError as error:
        raise DeviceError(
            f"the engine in {place} cannot be read ({error.strerror}): run python -m edge.build"
        ) from None


def store(facts: Facts, built: Built, cache: Path) -> Path:
    """Store an engine atomically, and remove the least recently used ones.

    Where its key exists already, each file is replaced by itself: files of one key fit each other. Raises DeviceError
    when it cannot be written.
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
    """Remove all but KEPT engines; `newest` stays. Only folders named by the key of their own facts are removed."""
    engines = sorted((p for p in cache.iterdir() if _is_ours(p)), key=lambda p: (p != newest, -p.stat().st_mtime))
    for place in engines[KEPT:]:
        shutil.rmtree(place, ignore_errors=True)


def _is_ours(place: Path) -> bool:
    try:
        return not place.is_symlink() and msgspec.json.decode(plain_bytes(place / FACTS), type=Facts).key == place.name
    except (OSError, msgspec.MsgspecError):
        return False


def adopt(place: Path, cache: Path) -> Path:
    """Store what another user's process has built: engine and timing caches.  → its place. Raises DeviceError."""
    try:
        if not _is_ours(place):
            raise DeviceError(f"the builder left no engine in {place}")
        for timings in place.parent.glob(TIMINGS):
            replace_durably(cache / timings.name, plain_bytes(timings))
        facts = msgspec.json.decode(plain_bytes(place / FACTS), type=Facts)
        return store(facts, Built(plain_bytes(place / ENGINE), plain_bytes(place / KERNELS)), cache)
    except OSError as error:
        raise DeviceError(f"the engine cannot be copied from {place}: {error.strerror or error}") from None


def plain_bytes(path: Path) -> bytes:
    """Read a plain file without following a link. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{path} is not a plain file")
        return file.read()


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and sync it to disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, content: bytes) -> None:
    """Replace a file atomically."""
    fresh = path.with_suffix(".new")
    write_durably(fresh, content)
    fresh.replace(path)
