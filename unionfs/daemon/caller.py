"""Who waits for a mount: the user of this process, or a launcher whose call was handed over to it."""

from __future__ import annotations

import socket


class MustRunThere(Exception):
    """The call can only be served by the caller's own process."""


class Caller:
    def __init__(self) -> None:
        self._launcher: socket.socket | None = None

    def follow(self, launcher: socket.socket) -> None:
        """From now on this process serves the call of the launcher at the other end."""
        self._launcher = launcher

    def has_ended(self) -> bool:
        """Return whether the launcher has ended, so that nobody learns of the mount."""
        if self._launcher is None:
            return False
        try:
            return not self._launcher.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def needs_own_process(self) -> None:
        """Raises MustRunThere unless this process is the caller's own."""
        if self._launcher is not None:
            raise MustRunThere


CALLER = Caller()
"""That of this process."""
