"""Who waits for a mount: the user of this process, or a launcher whose call was handed over to it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unionfs.core.samepages import SamePages
    from unionfs.storage.archive.progress import Progress, Shows


class MustRunThere(Exception):
    """The call can only be served by the caller's own process."""


def result(code: int) -> bytes:
    """Return the message that makes a launcher exit with this code."""
    return b"R" + bytes([code & 0xFF])


class Caller:
    def __init__(self) -> None:
        self._launcher: socket.socket | None = None
        self._pages: SamePages | None = None
        self._shows: Shows | None = None
        self._stderr = -1

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

    def watches(self, shows: Shows | None) -> None:
        """From now until `goes` the caller sees how far long operations are, on what is stderr now."""
        self.goes()
        if shows is not None:
            self._shows, self._stderr = shows, os.dup(2)

    def goes(self) -> None:
        """The caller does not wait any more."""
        if self._stderr >= 0:
            os.close(self._stderr)
        self._shows, self._stderr = None, -1

    @property
    def fds(self) -> Sequence[int]:
        """The fds that `shown` needs."""
        return () if self._stderr < 0 else (self._stderr,)

    @contextmanager
    def shown(self, what: str) -> Iterator[Progress]:
        """Show the caller how far an operation is."""
        if self._shows is None:
            # For start-up time: few mounts have operations that take long.
            from unionfs.storage.archive.progress import UNSEEN

            yield UNSEEN
            return
        with (
            open(self._stderr, "w", errors="surrogateescape", closefd=False) as stream,
            self._shows(what, stream) as progress,
        ):
            yield progress

    def needs_own_process(self) -> None:
        """Raises MustRunThere unless this process is the caller's own."""
        if self._launcher is not None:
            raise MustRunThere


CALLER = Caller()
"""That of this process."""
