"""Where built engines are kept, and under which name: an engine serves one graph, one TensorRT and one kind of GPU."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

from edge.backends.trt import kernels
from edge.backends.trt.driver import Gpu
from shared.errors import DeviceError
from shared.manifest import Manifest, find_graph

SYSTEM_CACHE: Final = Path("/var/cache/edgelm")
ENGINE: Final = "step.engine"
KERNELS: Final = "kernels.cubin"
FACTS: Final = "facts.json"
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


def facts_of(folder: Path, manifest: Manifest, tensorrt: str, gpu: Gpu, shapes: list[tuple[int, int]]) -> Facts:
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
        shapes=tuple(shapes),
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
    places = (folder / facts.key for folder in folders)
    return next((place for place in places if os.access(place / ENGINE, os.R_OK)), None)


def any_built(folders: tuple[Path, ...]) -> bool:
    """Whether some engine is there that this user may read; it need not be this bundle's."""
    for folder in folders:
        try:
            if any(os.access(place / ENGINE, os.R_OK) for place in folder.iterdir()):
                return True
        except OSError:  # not there, or not ours
            continue
    return False


def load(place: Path) -> Built:
    """Read a built engine. Raises DeviceError."""
    try:
        return Built((place / ENGINE).read_bytes(), (place / KERNELS).read_bytes())
    except OSError as error:
        raise DeviceError(
            f"the engine in {place} cannot be read ({error.strerror}): run python -m edge.build"
        ) from None


def store(facts: Facts, built: Built, cache: Path) -> Path:
    """Write an engine beside its place and swap it in: a reader sees the whole of it, or what was there before.

    Raises DeviceError when the disk refuses.
    """
    place = cache / facts.key
    try:
        with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as temporary:
            fresh = Path(temporary) / "fresh"
            fresh.mkdir(mode=0o755)
            contents = {
                ENGINE: built.engine,
                KERNELS: built.cubin,
                FACTS: msgspec.json.format(msgspec.json.encode(facts)),
            }
            for name, content in contents.items():
                write_durably(fresh / name, content)
            if place.exists():
                place.rename(Path(temporary) / "replaced")
            fresh.rename(place)
    except OSError as error:
        raise DeviceError(f"the engine cannot be written to {cache}: {error.strerror}") from None
    return place


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait for the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
