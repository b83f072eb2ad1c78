"""The compiled library: where it has to be, why it is not, and functions that give what numpy gives."""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edge import native
from edge.decoding import philox, winners
from edge.native import Library, library, why_not
from tests.support.compiled import NEEDS_LIBRARY, SETS, libraries

SOURCE = Path(native.__file__)
VNNI_512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
FLAGS = (VNNI_512 | {"amx_tile", "amx_int8"}, VNNI_512, {"avx2", "fma", "avx_vnni"})
"""Of Linux, for what `rows.cpp` asks of a processor."""
ARCH_PRCTL, ASK, TILES = 158, 0x1023, 18


def flags_of_this_processor() -> set[str]:
    """Without the matrix unit's where the kernel does not let this process have its registers."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    if "amx_tile" in flags and ctypes.CDLL(None).syscall(ARCH_PRCTL, ASK, TILES) != 0:
        flags -= {"amx_tile", "amx_int8"}
    return flags


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler is installed (apt: g++)")
@pytest.mark.skipif(
    not any(needed <= flags_of_this_processor() for needed in FLAGS), reason="this processor has no VNNI"
)
def test_library_is_there_where_it_can_be() -> None:
    """All other tests of it skip without it: none would say that it is gone."""
    assert library() is not None, f"the compiled library {why_not()}"
    assert why_not() == ""


def test_library_has_each_set_of_instructions_that_the_processor_has() -> None:
    if library() is None:
        pytest.skip(f"the compiled library {why_not()}")
    has = flags_of_this_processor()
    assert [found.instructions for found in libraries()] == [
        name for name, needed in zip(SETS, FLAGS, strict=True) if needed <= has
    ]
    assert library("vnni_1024") is None


def copied(folder: Path) -> ModuleType:
    """`edge.native` from another folder, where a test puts a library of its own."""
    shutil.copy(SOURCE, folder / "__init__.py")
    spec = importlib.util.spec_from_file_location(f"native_of_{folder.name}", folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def test_library_that_was_not_built_is_told(tmp_path: Path) -> None:
    module = copied(tmp_path)
    assert module.library() is None
    assert module.why_not() == "was not built: install g++ 9 or newer, then this package again (CXX=g++ names it)"


def test_library_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    (tmp_path / "_rows.so").write_text("built for another processor")
    module = copied(tmp_path)
    assert module.library() is None
    assert module.why_not().startswith("cannot be loaded: ") and str(tmp_path / "_rows.so") in module.why_not()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler is installed (apt: gcc)")
@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("void edgelm_version_0(void) {}", "was built from other sources: install this package again"),
        (
            f'void edgelm_version_{native.VERSION}(void) {{}} const char *edgelm_sets(void) {{ return ""; }}',
            "needs a processor with AVX-512 VNNI or AVX-VNNI",
        ),
    ],
    ids=["version", "processor"],
)
def test_library_of_another_version_or_for_other_processors_is_told(tmp_path: Path, code: str, told: str) -> None:
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(tmp_path / "_rows.so")]
    subprocess.run(command, input=code, text=True, check=True)
    module = copied(tmp_path)
    assert (module.library(), module.why_not()) == (None, told)


SIZES = (1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 100, 512, 4096)
SEEDS = (0, 1, 2**32 - 1, 2**32, 2**53 - 1, 2**63 + 12345, 2**64 - 1)


def noise_of(found: Library, seed: int, position: int, *, count: int, vocab_size: int) -> np.ndarray[tuple[int, ...]]:
    """With a number behind the last, which has to stay."""
    made = np.full(count * vocab_size + 1, np.float32(-7.0))
    found.noise(seed, position, count, vocab_size, made.ctypes.data)
    assert made[-1] == -7
    return made[:-1].reshape(count, vocab_size)


@NEEDS_LIBRARY
@pytest.mark.parametrize("seed", SEEDS)
def test_library_makes_the_noise_that_numpy_makes(seed: int) -> None:
    """Of the same words; logarithms of logarithms differ in the last bits."""
    for vocab_size in SIZES:
        positions = np.array([0, 1, 255, 4095, 2**31 + 5, 2**32 - 1], np.uint32)
        wanted = philox._block_noise(seed, positions, vocab_size)
        made = philox.block_noise(seed, positions, vocab_size)
        assert made.dtype == np.float32 and made.shape == wanted.shape
        assert (np.abs(made - wanted) <= 1e-6 * np.maximum(1, np.abs(wanted))).all()


@NEEDS_LIBRARY
def test_library_makes_noise_of_the_very_words_of_philox() -> None:
    """Undone, each number is within a few of the 2²³ uniform ones."""
    positions = np.arange(40, dtype=np.uint32)
    made = philox.block_noise(11, positions, 4096).astype(np.float64)
    words = np.exp(-np.exp(-made)) * 2.0**23 - 0.5
    wanted = np.exp(-np.exp(-philox._block_noise(11, positions, 4096).astype(np.float64))) * 2.0**23 - 0.5
    assert np.abs(words - wanted).max() < 4  # of 8 388 608: another word would be anywhere


@NEEDS_LIBRARY
def test_library_makes_the_same_noise_with_each_set_of_instructions() -> None:
    first, *others = libraries()
    for seed in SEEDS:
        for vocab_size in SIZES:
            made = noise_of(first, seed, 250, count=3, vocab_size=vocab_size)
            alone = noise_of(first, seed, 252, count=1, vocab_size=vocab_size)
            assert np.array_equal(made[2:], alone)
            for other in others:
                assert np.array_equal(noise_of(other, seed, 250, count=3, vocab_size=vocab_size), made)


def scores_of(
    rng: np.random.Generator, kind: str, vocab_size: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """(30, V), of which some are equal, the lowest, or no numbers."""
    scores = rng.normal(0, 3, (30, vocab_size)).astype(np.float32)
    if kind == "ties":
        return np.round(scores)
    if kind == "equal":
        return np.zeros_like(scores)
    if kind == "lowest":
        scores[rng.random(scores.shape) < 0.5] = -np.inf
        scores[0] = -np.inf
    elif kind != "plain":
        scores[::2, rng.integers(vocab_size, size=3)] = {"nan": np.nan, "inf": np.inf}[kind]
        scores[4] = np.nan
    return scores


@NEEDS_LIBRARY
@pytest.mark.parametrize("temperature", [0.0, 1e-3, 0.8, 2.0])
@pytest.mark.parametrize("kind", ["plain", "ties", "equal", "lowest", "nan", "inf"])
def test_library_draws_what_numpy_draws(kind: str, temperature: float) -> None:
    """And so with each set of instructions. Of scores that are not numbers, only that they are not: rank 0."""
    rng = np.random.default_rng(1)
    for vocab_size in (8, 16, 104, 512, 4096):
        scores = scores_of(rng, kind, vocab_size)
        noise = rng.gumbel(size=scores.shape).astype(np.float32)
        noise[::3] = np.round(noise[::3])
        token, rank = winners._by_numpy(scores, noise, temperature)
        for found in libraries():
            drawn, place = np.full((2, len(scores)), -1, np.int32)
            found.draw(
                scores.ctypes.data, noise.ctypes.data, len(scores), vocab_size, temperature, drawn.ctypes.data,
                place.ctypes.data,
            )  # fmt: skip
            assert place.tolist() == rank.tolist()
            assert ((drawn == token) | (rank == 0)).all() and (drawn >= 0).all() and (drawn < vocab_size).all()
        both = winners.winners(scores, noise, temperature)
        assert both[1].tolist() == rank.tolist() and ((both[0] == token) | (rank == 0)).all()


def test_library_is_asked_only_for_rows_that_it_can_read() -> None:
    """Of other widths, and of views that are not in one piece, numpy draws."""
    rng = np.random.default_rng(2)
    for scores in (rng.normal(size=(5, 13)), rng.normal(size=(5, 64))[:, ::2], rng.normal(size=(16, 5)).T):
        rows = scores.astype(np.float32, order="K")
        noise = rng.gumbel(size=rows.shape).astype(np.float32)
        wanted = winners._by_numpy(rows, noise, 0.8)
        assert all(np.array_equal(a, b) for a, b in zip(winners.winners(rows, noise, 0.8), wanted, strict=True))


@NEEDS_LIBRARY
def test_library_structures_are_as_large_as_the_compiler_makes_them(tmp_path: Path) -> None:
    """A field that one side has and the other has not would shift all behind it."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler is installed (apt: g++)")
    names = ("Matrix", "Norm", "Block", "Network", "Reading", "Request", "Depth", "Drafter")
    kinds = [getattr(native, name) for name in names]
    places = [(kind.__name__, [name for name, *_ in kind._fields_]) for kind in kinds]
    printed = "".join(
        f'printf("%zu ", sizeof({kind}));' + "".join(f'printf("%zu ", offsetof({kind}, {n}));' for n in names)
        for kind, names in places
    )
    code = f'#include "types.h"\n#include <cstddef>\n#include <cstdio>\nint main() {{ {printed} }}'
    command = ["g++", "-std=c++17", "-Wno-psabi", f"-I{SOURCE.parent}", "-x", "c++", "-", "-o", str(tmp_path / "sizes")]
    subprocess.run(command, input=code, text=True, check=True)
    told = subprocess.run([tmp_path / "sizes"], capture_output=True, text=True, check=True).stdout.split()
    wanted = [n for kind in kinds for n in (ctypes.sizeof(kind), *(getattr(kind, f).offset for f, *_ in kind._fields_))]
    assert [int(number) for number in told] == wanted
