"""What a root command does with a stranger's bytes it does as nobody."""

import grp
import os
from contextlib import suppress
from typing import Final

NOBODY: Final = 65534
GPU_GROUPS: Final = ("video", "render")
"""Whose members may open the device nodes of a Jetson's GPU."""


def is_root() -> bool:
    """Whether this process may do everything."""
    return os.geteuid() == 0


def become_nobody() -> None:
    """Give root up for good, and keep the groups that the GPU needs; for who is not root, nothing changes.

    The working directory stays usable, whatever folders lie above it.
    """
    if not is_root():
        return
    groups = []
    for name in GPU_GROUPS:
        with suppress(KeyError):
            groups.append(grp.getgrnam(name).gr_gid)
    os.setgroups(groups)
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
