"""User and groups of a Unix socket's peer, as the kernel reports them: no client can forge them."""

import grp
import os
import socket
import struct
from typing import Final

from shared.errors import ConfigError

SO_PEERGROUPS: Final = 59  # asm-generic/socket.h, Linux 4.13; not in Python's socket module
CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid
MOST_GROUPS_BYTES: Final = 1024  # getsockopt's limit in Python: 256 groups


def group_id(name: str) -> int:
    """The id of a group. Raises ConfigError when it does not exist."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f"socket_group {name!r} does not exist; create it with: groupadd --system {name}") from None


def user_id(peer: socket.socket) -> int:
    """The user of a connected client. In a user namespace, other users but root all appear as nobody."""
    return _credentials(peer)[0]


def is_member(peer: socket.socket, gid: int) -> bool:
    """Whether a connected client is root, this daemon's own user, or in the group, primary or supplementary.

    As of the connection. In a user namespace (PrivateUsers=) other groups appear as nobody's, so the unit must run with
    this group as its own.
    """
    uid, first = _credentials(peer)
    if uid in (0, os.geteuid()) or first == gid:
        return True
    try:
        packed = peer.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, MOST_GROUPS_BYTES)
    except OSError:  # in more groups than fit: only the primary one counts
        return False
    return gid in struct.unpack(f"{len(packed) // 4}I", packed)


def _credentials(peer: socket.socket) -> tuple[int, int]:
    _, uid, gid = CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    return uid, gid
