"""Files and flags of several commands: replace a folder atomically, lock it, check numeric flags."""

import argparse
import ctypes
import errno
import fcntl
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from shared.errors import ConfigError, DataError, DiffusionLLMError

_HERE, _RENAME_EXCHANGE = -100, 2  # of Linux: AT_FDCWD, and renameat2's flag


@contextmanager
def locked(folder: Path, refusal: str) -> Iterator[None]:
    """Lock a folder against other processes; DataError(refusal) when another holds the lock."""
    with ExitStack() as opened:
        try:
            handle = os.open(folder, os.O_RDONLY)
            opened.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(refusal) from None
        except OSError as error:
            raise DataError(f"{folder} cannot be locked: {error.strerror}") from None
        yield


@contextmanager
def swapped_in(out: Path) -> Iterator[Path]:
    """A scratch folder beside `out` that replaces it when the block succeeds; otherwise the old one stays.

    Readers find the old folder or the new one, whole. What a killed run left in the scratch folder is cleared first.
    Raises DiffusionLLMError when another process is writing `out`, or the disk refuses.
    """
    real = out.resolve()  # a link stays a link, and renaming stays on one disk
    scratch, replaced = (real.with_name(f".{real.name}.{suffix}") for suffix in ("partial", "replaced"))
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with locked(scratch, f"another process is writing {out}: wait for it, or choose another --out"):
            _clear(scratch)
            shutil.rmtree(replaced, ignore_errors=True)
            try:
                yield scratch
                for path in scratch.iterdir():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                _take_place(scratch, real, replaced)
            except BaseException:
                shutil.rmtree(scratch, ignore_errors=True)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise DiffusionLLMError(f"{out} cannot be written: {error.strerror}") from None


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _take_place(scratch: Path, out: Path, replaced: Path) -> None:
    """Move `scratch` to `out`, and what was there to `replaced`."""
    if not out.exists():
        scratch.rename(out)
    elif _exchange(scratch, out):
        scratch.rename(replaced)
    else:
        out.rename(replaced)
        try:
            scratch.rename(out)
        except OSError:
            replaced.rename(out)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths atomically.  → False where the file system cannot, as on some network shares"""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def check_numbers(args: argparse.Namespace, at_most: Mapping[str, float]) -> None:
    """ConfigError names a flag, if given, that is not above 0 or above its limit, and a seed outside 63 bits."""
    for name, most in at_most.items():
        value = getattr(args, name, None)
        if value is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        if not 0 < value < math.inf:
            raise ConfigError(f"{flag} must be a number above 0, not {value}")
        if value > most:
            raise ConfigError(f"{flag} must be at most {most:,}, not {value}")
    seed = getattr(args, "seed", 0)
    if not 0 <= seed < 1 << 63:
        raise ConfigError(f"--seed must be at least 0 and below 2**63, not {seed}")
