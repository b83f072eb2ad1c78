"""What runs a bundle's graphs: ONNX Runtime on the CPU, TensorRT on an NVIDIA GPU, or a fake, in an explicit table.

The protocols that they fulfil are in `edge.decoding.types` (canvas) and `edge.decoding.blocks`. Which request runs when
is decided in `edge.serving`.
"""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from edge.decoding.blocks import AnyRows
from edge.decoding.types import AnyBackend
from shared.errors import ConfigError, DiffusionLLMError, one_line
from shared.manifest import Manifest, has_role

log = logging.getLogger(__name__)


class Chosen(NamedTuple):
    """A loaded backend. degraded: why this device does not use its GPU; None where all is well.

    backend, rows: for the decoders canvas and blocks; None where the bundle or the device lacks it.
    """

    backend: AnyBackend | None
    name: str  # "ort", "trt" or "fake"
    degraded: str | None = None
    rows: AnyRows | None = None


def _load_ort(folder: Path, manifest: Manifest, threads: int, argument: str) -> Chosen:
    from edge.backends.native_rows import NativeRows, read_networks
    from edge.backends.ort import OrtBackend
    from edge.backends.ort_rows import OrtRows

    if argument:
        raise ConfigError(f"backend 'ort' takes no argument; found {argument!r} after its colon")
    canvas, later = None, manifest.decoders[0] != "canvas"
    if "canvas" in manifest.decoders:
        canvas = OrtBackend(folder, manifest, threads=threads, later=later)
    if "blocks" not in manifest.decoders:
        return Chosen(canvas, "ort")
    networks = read_networks(folder, manifest)
    if networks is None:
        return Chosen(canvas, "ort", rows=OrtRows(folder, manifest, threads))
    return Chosen(canvas, "ort", rows=NativeRows(folder, manifest, threads, networks))


def _load_fake(folder: Path, manifest: Manifest, threads: int, argument: str) -> Chosen:
    from edge.backends.fake import FakeBackend

    if not re.fullmatch(r"\d*\.?\d*", argument, re.ASCII) or argument == ".":
        raise ConfigError(f"backend 'fake' takes milliseconds after its colon, as in fake:20; found {argument!r}")
    fake = FakeBackend(manifest, step_ms=float(argument or 0))
    return Chosen(fake, "fake", rows=fake if "blocks" in manifest.decoders else None)


def _load_trt(folder: Path, manifest: Manifest, threads: int, argument: str) -> Chosen:
    """Canvas and blocks, each on an engine of its own. Without the engine of blocks, canvas serves alone."""
    from edge.backends.trt import backend as trt

    blocks = has_role(manifest, "cuda", "step") and "blocks" in manifest.decoders
    if "canvas" not in manifest.decoders:
        if not blocks:
            raise ConfigError(f"bundle {folder} has no graph for CUDA that the backend 'trt' could run")
        return Chosen(None, "trt", rows=trt.load_blocks(folder, manifest, argument))
    canvas = trt.load(folder, manifest, argument)
    if not blocks:
        return Chosen(canvas, "trt")
    try:
        return Chosen(canvas, "trt", rows=trt.load_blocks(folder, manifest, argument))
    except trt.NoEngine as error:
        log.warning("blocks are not served, canvas is: %s", str(error))
        return Chosen(canvas, "trt")
    except BaseException:
        canvas.close()
        raise


_LOADERS: dict[str, Callable[[Path, Manifest, int, str], Chosen]] = {
    "ort": _load_ort,
    "trt": _load_trt,
    "fake": _load_fake,
}


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
        return _LOADERS[kind](folder, manifest, threads, argument)
    if kind != "auto":
        raise ConfigError(f"unknown backend {name!r}: choose one of auto, {', '.join(_LOADERS)}")
    if argument:
        raise ConfigError(f"backend 'auto' takes no argument; found {argument!r} after its colon")
    degraded = None
    if may_use_gpu(name):
        try:
            return _load_trt(folder, manifest, threads, "")
        except Exception as error:  # TensorRT and its bindings raise types of their own
            ours = isinstance(error, DiffusionLLMError)
            degraded = str(error) if ours else one_line(f"{type(error).__name__}: {error}")
            log.warning("the GPU cannot be used, the CPU serves instead: %s", degraded, exc_info=not ours)
    return _load_ort(folder, manifest, threads, "")._replace(degraded=degraded)
