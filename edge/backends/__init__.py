"""What runs the step graph: a protocol of few methods, and an explicit table of its implementations."""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigError, DiffusionLLMError, one_line
from shared.manifest import Manifest

if TYPE_CHECKING:
    from edge.decoding.canvas import Row

log = logging.getLogger("edgelm")


class StepResult(NamedTuple):
    """What one pass knows of the wanted positions: the K best tokens, best first; ties: the lower id first.

    What stands at other positions is nothing to rely on.
    """

    ids: NDArray[np.int32]  # (B, L, K)
    logp: NDArray[np.float32]  # (B, L, K) log-probabilities over the full vocabulary
    entropy: NDArray[np.float32]  # (B, L) nats


class Backend(Protocol):
    """Scores canvases. Not thread-safe: one worker owns it."""

    lengths: tuple[int, ...]
    """Canvas lengths it serves, ascending; the last is the bundle's canvas length."""

    batches: tuple[int, ...]
    """Numbers of canvases it scores in one pass, ascending from 1. No canvas's scores depend on its neighbours."""

    def step(self, canvas: NDArray[np.int32], t: NDArray[np.float32], wanted: NDArray[np.bool_]) -> StepResult:
        """Score the wanted (B, L) of the masked positions of canvases (B, L) at times t (B,).

        B is one of `batches`, L one of `lengths`; behind a canvas's first visible EOS or PAD nothing is wanted.
        """

    def close(self) -> None:
        """Free what it holds."""


@runtime_checkable
class LoopBackend(Protocol):
    """A backend that draws and commits where the logits lie: they never come to Python. Not thread-safe either."""

    lengths: tuple[int, ...]
    """As of a Backend."""

    batches: tuple[int, ...]
    """Numbers of rows that it has a program for, ascending; fewer rows run in the next larger one."""

    failure: str | None
    """Why the device is out of service; None while it is healthy."""

    def advance(self, rows: "Sequence[Row]", length: int) -> None:
        """One pass over at most `batches[-1]` rows, each cut to its first `length` positions; one of `lengths`.

        Changes canvas and step of every row in place, exactly as `unmask.advance` would. A row that comes again is
        known by its identity: between two passes nobody else may write to it. Raises DeviceError: when `failure` is set
        from then on, the device is out of service and every call raises; else these rows failed and others may not.
        """

    def close(self) -> None:
        """Free what it holds."""


AnyBackend = Backend | LoopBackend


def _load_ort(folder: Path, manifest: Manifest, threads: int, argument: str) -> Backend:
    from edge.backends.ort import OrtBackend

    if argument:
        raise ConfigError(f"backend 'ort' takes no argument; found {argument!r} behind its colon")
    return OrtBackend(folder, manifest, threads)


def _load_fake(folder: Path, manifest: Manifest, threads: int, argument: str) -> Backend:
    from edge.backends.fake import FakeBackend

    if not re.fullmatch(r"\d*\.?\d*", argument, re.ASCII) or argument == ".":
        raise ConfigError(f"backend 'fake' takes milliseconds behind its colon, as in fake:20; found {argument!r}")
    return FakeBackend(manifest, step_ms=float(argument or 0))


def _load_trt(folder: Path, manifest: Manifest, threads: int, argument: str) -> AnyBackend:
    from edge.backends.trt import backend as trt

    return trt.load(folder, manifest, argument)


_LOADERS: dict[str, Callable[[Path, Manifest, int, str], AnyBackend]] = {
    "ort": _load_ort,
    "trt": _load_trt,
    "fake": _load_fake,
}


class Chosen(NamedTuple):
    """A loaded backend. degraded: why this device computes with less than it has; None when it does not."""

    backend: AnyBackend
    name: str  # "ort", "trt" or "fake"
    degraded: str | None = None


def may_use_gpu(name: str) -> bool:
    """Whether the backend of that name tries the GPU on this device."""
    from edge.backends.trt import engine_cache

    return name.startswith("trt") or (name == "auto" and engine_cache.any_built(engine_cache.cache_folders()))


def choose_backend(name: str, folder: Path, manifest: Manifest, threads: int) -> Chosen:
    """The backend of that name, warmed up: "ort", "trt" ("trt:pycuda" takes its memory from pycuda), "fake" ("fake:20"
    takes 20 ms a step), or "auto": trt where an engine was built, else ort.

    threads: how many to compute with on the CPU; 0 takes every processor this process may use.
    """
    kind, _, argument = name.partition(":")
    if kind in _LOADERS:
        return Chosen(_LOADERS[kind](folder, manifest, threads, argument), kind)
    if kind != "auto":
        raise ConfigError(f"unknown backend {name!r}: choose one of auto, {', '.join(_LOADERS)}")
    if argument:
        raise ConfigError(f"backend 'auto' takes no argument; found {argument!r} behind its colon")
    degraded = None
    if may_use_gpu(name):
        try:
            return Chosen(_load_trt(folder, manifest, threads, ""), "trt")
        except Exception as error:  # TensorRT and its bindings raise their own: the device must go on serving
            ours = isinstance(error, DiffusionLLMError)
            degraded = str(error) if ours else one_line(f"{type(error).__name__}: {error}")
            log.warning("the GPU cannot be used, and the CPU serves: %s", degraded, exc_info=not ours)
    return Chosen(_load_ort(folder, manifest, threads, ""), "ort", degraded)


def load_backend(name: str, folder: Path, manifest: Manifest, threads: int) -> AnyBackend:
    """`choose_backend` for those who need not know which it was."""
    return choose_backend(name, folder, manifest, threads).backend
