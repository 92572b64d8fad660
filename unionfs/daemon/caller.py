"""Who waits for a mount: the user of this process, or a launcher whose call was handed over to it."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unionfs.core.samepages import SamePages


class MustRunThere(Exception):
    """The call can only be served by the caller's own process."""


def result(code: int) -> bytes:
    """Return the message that makes a launcher exit with this code."""
    return b"R" + bytes([code & 0xFF])


class Caller:
    def __init__(self) -> None:
        self._launcher: socket.socket | None = None
        self._pages: SamePages | None = None

    def follow(self, launcher: socket.socket, pages: SamePages | None) -> None:
        """From now on this process serves the call of the launcher at the other end.

        `pages`: what it may share of its memory with others that its resident has forked.
        """
        self._launcher, self._pages = launcher, pages

    @property
    def launcher(self) -> socket.socket | None:
        """The connection to the launcher; None if this process is the caller's own."""
        return self._launcher

    @property
    def pages(self) -> SamePages | None:
        """What this process may share of its memory."""
        return self._pages

    def needs_own_process(self) -> None:
        """Raises MustRunThere unless this process is the caller's own."""
        if self._launcher is not None:
            raise MustRunThere


CALLER = Caller()
"""That of this process."""
