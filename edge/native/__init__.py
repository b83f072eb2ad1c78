"""The compiled library: passes of an INT8 network by blocks, drafts and noise on a CPU, called by ctypes.

It is built when the package is installed, where there is a C++ compiler. Its functions are the same to the bit for each
set of instructions, and release the GIL.
"""

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Final

NAME: Final = "_rows"
VERSION: Final = 3
"""Of the structures and functions; `rows.cpp` exports its own."""
LANES: Final = 8  # of a vector in `types.h`; vocabulary and widths are multiples of it


class Matrix(Structure):
    """As in `types.h`, and so are all structures here. Pointers are addresses."""

    _fields_ = [
        *((name, c_void_p) for name in ("weights", "sums", "scales", "bias")),
        ("input_scale", c_float),
        *((name, c_int32) for name in ("input_zero", "inputs", "outputs")),
    ]


class Norm(Structure):
    """A LayerNorm."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class Block(Structure):
    """A transformer block."""

    _fields_ = [
        *((name, Norm) for name in ("norm1", "norm2")),
        *((name, Matrix) for name in ("qkv", "attention_out", "up", "down")),
    ]


class Network(Structure):
    """The network of a step graph."""

    _fields_ = [
        *((name, c_int32) for name in ("width", "heads", "layers", "farthest")),
        *((name, c_void_p) for name in ("tokens", "token_scales", "positions", "distances")),
        ("blocks", POINTER(Block)),
        ("norm", Norm),
        ("head", Matrix),
    ]


class Reading(Structure):
    """What a layer reads of a condition."""

    _fields_ = [("keys", Matrix), ("values", Matrix), ("rows", c_int32)]


class Request(Structure):
    """Rows of one request in a pass, what it draws with, and what it has drawn."""

    _fields_ = [
        *((name, c_void_p) for name in ("tokens", "positions", "places", "caches", "scores", "states")),
        *((name, c_int32) for name in ("rows", "kept", "scored", "room")),
        ("readings", c_void_p),
        ("guidance", c_float),
        *((name, c_int32) for name in ("guided", "best")),
        *((name, c_void_p) for name in ("noise", "noise_of", "drawn", "drafts")),
        ("seed", c_uint64),
        *((name, c_float) for name in ("temperature", "draft_temperature")),
        *((name, c_int32) for name in ("noise_rows", "top_rank", "window", "last")),
        *((name, c_int32) for name in ("agreed", "drafted", "left")),
    ]


class Depth(Structure):
    """One step of the chain drafter."""

    _fields_ = [("known", c_void_p), ("known_scales", c_void_p), ("norm", Norm), ("up", Matrix), ("down", Matrix)]


class Drafter(Structure):
    """The chain drafter of a draft graph."""

    _fields_ = [
        *((name, c_int32) for name in ("depths", "width", "hidden")),
        ("likely", c_void_p),
        ("steps", POINTER(Depth)),
        ("head", Matrix),
    ]


@dataclass(frozen=True)
class Library:
    """The functions of `rows.cpp` for one set of instructions."""

    instructions: str
    run: Any  # (network, requests, count, weights, memory)
    advance: Any  # (network, drafter, requests, count, weights, memory)
    draft: Any  # (drafter, state, token, noise, vocabulary, temperature, drafts, memory)
    noise: Any  # (seed, first position, count, vocabulary, noise)
    draw: Any  # (scores, noise, rows, vocabulary, temperature, tokens, ranks)
    space: Any  # (rows, width, wide, weights) → bytes


def library(instructions: str | None = None) -> Library | None:
    """The library for the best set of instructions of this processor, or for the named one; None where `why_not` says
    why there is none."""
    found = _load(instructions)
    return found if isinstance(found, Library) else None


def why_not() -> str:
    """Why there is no library here, as the rest of a sentence that begins with it; empty where there is one."""
    found = _load(None)
    return found if isinstance(found, str) else ""


@cache
def _load(instructions: str | None) -> Library | str:
    folder = Path(__file__).parent
    file = next((f for suffix in EXTENSION_SUFFIXES if (f := folder / f"{NAME}{suffix}").is_file()), None)
    if file is None:
        return "was not built: install g++ 9 or newer, then this package again (CXX=g++ names it)"
    try:
        loaded = ctypes.CDLL(str(file))
    except OSError as error:  # built for another processor or C library
        return f"cannot be loaded: {error}"
    if not hasattr(loaded, f"edgelm_version_{VERSION}"):
        return "was built from other sources: install this package again"
    loaded.edgelm_sets.restype = c_char_p
    known = loaded.edgelm_sets().decode().split()
    chosen = instructions or next(iter(known), "")
    if chosen not in known:
        return "needs a processor with AVX-512 VNNI or AVX-VNNI"
    loaded.edgelm_space.restype = c_int64

    def function(name: str, *arguments: Any) -> Any:
        found = loaded[f"edgelm_{name}_{chosen}"]
        found.argtypes, found.restype = arguments, None
        return found

    return Library(
        instructions=chosen,
        run=function("pass", c_void_p, c_void_p, c_int, c_int, c_void_p),
        advance=function("advance", c_void_p, c_void_p, c_void_p, c_int, c_int, c_void_p),
        draft=function("draft", c_void_p, c_void_p, c_int, c_void_p, c_int, c_float, c_void_p, c_void_p),
        noise=function("noise", c_uint64, c_uint32, c_int, c_int, c_void_p),
        draw=function("draw", c_void_p, c_void_p, c_int, c_int, c_float, c_void_p, c_void_p),
        space=loaded.edgelm_space,
    )
