"""The process at the other end of a unix socket."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import trio

_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred, include/linux/socket.h


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that called connect(2) or listen(2) at the other end of a unix socket."""

    pid: int
    """0 for a process outside this pid namespace."""
    uid: int

    @property
    def is_own(self) -> bool:
        """Whether it is root, or this user."""
        return self.uid in (0, os.geteuid())


def peer_of(connection: socket.socket | trio.socket.SocketType) -> Peer:
    """Return the peer of a connection; SO_PEERCRED, unix(7)."""
    pid, uid, _ = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return Peer(pid, uid)
