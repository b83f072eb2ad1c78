"""The kernels of both loops on the GPU, canvas and blocks, and their records as numpy dtypes.

`arithmetic.h` and `blocks.h` also compile with the system's C++ compiler, for tests on any machine; `select.h`,
`unmask.cu` and `blocks.cu` add the threads.
"""

from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge.decoding.types import Sampling
from shared.errors import DeviceError
from shared.manifest import MAX_WINDOW
from shared.schedule import reveal_ratio

THREADS: Final = 256  # of a block; also the most candidates a position can have
MAX_LENGTH: Final = 1024
MAX_VOCAB: Final = 65536  # an id is half of a 32-bit sorting key
DRAW: Final = "draw_candidates"
COMMIT: Final = "commit_candidates"
PREPARE: Final = "prepare_rows"
DRAW_ROWS: Final = "draw_rows"
KEEP: Final = "keep_rows"
APPEND: Final = "append_rows"
REMEMBER: Final = "remember_rows"
GUIDE: Final = "guide_scores"
DRAFT_INPUT: Final = "draft_input"
DRAFT_LINEAR: Final = "draft_linear"
DRAFT_TOKEN: Final = "draft_token"
HIDDEN_LAYER, STATE_LAYER, SCORES_LAYER = 0, 1, 2
COLUMNS: Final = THREADS // 4  # of a linear layer, in one block
HEADERS: Final = ("arithmetic.h", "select.h", "blocks.h", "unmask.cu", "blocks.cu", "conditions.cu")
UNITS: Final = '#include "unmask.cu"\n#include "blocks.cu"\n#include "conditions.cu"\n'

ROW: Final = np.dtype(
    [
        ("seed", np.uint64),
        ("step", np.int32),
        ("steps", np.int32),
        ("rule", np.int32),
        ("top_k", np.int32),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("bound", np.float32),
        ("broken", np.int32),
    ]
)
"""`Row` of arithmetic.h, field by field; a test compares the layouts."""

CANDIDATE: Final = np.dtype(
    [("token", np.int32), ("confidence", np.float32), ("entropy", np.float32), ("margin", np.float32)]
)

WRITING: Final = np.dtype(
    [
        ("seed", np.uint64),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("guidance", np.float32),
        *((name, np.int32) for name in ("top_k", "window", "last", "position", "token", "cached", "drafts")),
        ("draft", np.int32, (MAX_WINDOW,)),
        *((name, np.int32) for name in ("start", "kept", "agreed", "fresh")),
        ("text", np.int32, (MAX_WINDOW + 1,)),
        ("broken", np.int32),
    ],
    align=True,
)
"""`Writing` of blocks.h."""

READING: Final = np.dtype([(name, np.int32) for name in ("rows", "evidence", "draws", "slot")])

_SELECTIONS: Final = {"random": 0, "confidence": 1, "margin": 2, "entropy": 3}
_THRESHOLD: Final = 4
_ENTROPY_BOUND: Final = 5

_FLAGS: Final = ("--std=c++17", "--fmad=false", "--device-as-default-execution-space", f"-DTHREADS={THREADS}")
"""No contraction to FMA: it changes the last bit, and so ties, against the loop in numpy."""


def row_of(sampling: Sampling, step: int) -> tuple[int | float, ...]:
    """A request's settings as a ROW."""
    rule, bound = _SELECTIONS[sampling.selection], 0.0
    if sampling.threshold is not None:
        rule, bound = _THRESHOLD, float(sampling.least_confidence)
    elif sampling.entropy_bound is not None:
        rule, bound = _ENTROPY_BOUND, sampling.entropy_bound
    return (sampling.seed, step, sampling.steps, rule, sampling.top_k, sampling.temperature, sampling.top_p, bound, 0)


@lru_cache(maxsize=16)
def ratios(steps: int) -> NDArray[np.float64]:
    """The unmasking schedule's ratio of every step but the last, which commits all.  → (steps − 1,)

    A table, because a cosine that differs in its last bit can commit another number of tokens.
    """
    return np.array([reveal_ratio(step, steps) for step in range(steps - 1)])


def source(name: str) -> str:
    """The text of a file in this folder."""
    return (Path(__file__).parent / name).read_text("utf-8")


def compile_kernels(architecture: str) -> bytes:
    """Machine code (cubin) of the kernels for an architecture such as "sm_87". Raises DeviceError.

    Needs the CUDA compiler library NVRTC, but no GPU and no driver.
    """
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # RuntimeError: the bindings find no library
        remedy = "pip install 'diffusion-llm[cuda13]' ('diffusion-llm[cuda12]' on JetPack 6)"
        why = " ".join(str(error).split())
        raise DeviceError(f"the CUDA compiler NVRTC cannot be loaded: {remedy} ({why})") from None

    def checked(result: tuple[object, ...]) -> object:
        code, *values = result
        if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise DeviceError(f"the CUDA compiler failed: {code} on {architecture}\n{log()}".rstrip())
        return values[0] if values else None

    def log() -> str:
        if program is None:
            return ""
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        if size <= 1:  # nothing but the final NUL, and NVRTC would write it into the b" " that all of Python shares
            return ""
        text = bytes(size)
        nvrtc.nvrtcGetProgramLog(program, text)
        return str(text.rstrip(b"\0 \n"), "utf-8", "replace")

    program = None
    contents, names = [source(name).encode() for name in HEADERS], [name.encode() for name in HEADERS]
    program = checked(nvrtc.nvrtcCreateProgram(UNITS.encode(), b"kernels.cu", len(names), contents, names))
    flags = [flag.encode() for flag in (*_FLAGS, f"--gpu-architecture={architecture}")]
    checked(nvrtc.nvrtcCompileProgram(program, len(flags), flags))
    if text := log():
        raise DeviceError(f"the CUDA compiler warns about the kernels:\n{text}")
    size = checked(nvrtc.nvrtcGetCUBINSize(program))
    assert isinstance(size, int)
    cubin = bytes(size)
    checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return cubin
