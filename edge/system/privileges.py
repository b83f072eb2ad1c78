"""Dropping root: commands run by root handle untrusted files as the user nobody."""

import grp
import os
from contextlib import suppress
from typing import Final

NOBODY: Final = 65534
GPU_GROUPS: Final = ("video", "render")
"""Whose members may open the device nodes of a Jetson's GPU."""


def is_root() -> bool:
    """Whether this process runs as root."""
    return os.geteuid() == 0


def become_nobody() -> None:
    """Drop root for good, keeping the groups that the GPU needs; other users are left as they are.

    The working directory stays usable, whatever the modes of the folders above it.
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
