"""Publishes a mount: an entry in the registry of live mounts, and sockets that answer questions."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress
from dataclasses import replace

from unionfs.daemon import live
from unionfs.daemon.answering import listen
from unionfs.daemon.live import LiveMount
from unionfs.daemon.runtime import RuntimeDirectory
from unionfs.errors import on_failure, quoted
from unionfs.settings.mount import MountSettings
from unionfs.sys.capabilities import in_initial_user_namespace
from unionfs.sys.process import pid_and_start

log = logging.getLogger(__name__)


class Announcement:
    """The announcement of the mount that this process serves."""

    def __init__(
        self, settings: MountSettings, directory: RuntimeDirectory, former: LiveMount | None = None
    ) -> None:
        """Call it before mounting, which may cover the layers' paths. `former`: the entry of a daemon
        whose mount this process takes over. Raises OSError.
        """
        self._directory = directory
        self._former = former
        self._claims = live.claims_of(settings) if former is None else former.claims
        self._entry: live.LiveMount | None = None

    @property
    def entry(self) -> LiveMount | None:
        """The entry of the usable mount."""
        return self._entry

    @property
    def since(self) -> float | None:
        """Seconds since the epoch when the mount became usable."""
        return None if self._entry is None else self._entry.since

    def listen(self) -> list[socket.socket]:
        """Listen in the runtime directory for this user, and in the abstract namespace for root."""
        name = live.own_name()
        addresses = [self._directory.address(f"{name}.sock")]
        # In a user namespace, the host's root is not distinguishable from other users.
        if os.geteuid() != 0 and in_initial_user_namespace():
            addresses.append("\0" + live.abstract_name(name))
        found = []
        for address in addresses:
            try:
                found.append(listen(address))
            except OSError as error:
                # Only `inspect` and `stats` lose their figures.
                log.warning("no control socket: %s", error)
        return found

    def publish(self, settings: MountSettings, device: str, guardian: int | None) -> None:
        """Register the usable mount. Raises UserError.

        `guardian`: the pid of the user of its volumes, if that is not this process.
        """
        user = None if guardian is None else pid_and_start(guardian)
        with on_failure(f"the mount cannot be entered in {quoted(self._directory.path)}", "make room there"):
            self._entry = live.announce(
                settings, device, self._directory.path, self._claims,
                None if self._former is None else self._former.since, user,
            )  # fmt: skip
        if self._former is not None:
            self._former.remove()
            self._former = None

    def changed(self, settings: MountSettings, claims: tuple[tuple[int, int], ...]) -> None:
        """Enter other settings of the usable mount, and (st_dev, st_ino) of its upper and work."""
        self._claims = claims
        if self._entry is not None:
            self._entry = replace(self._entry, settings=settings, claims=claims)
            with suppress(OSError):
                self._entry.save()

    def held_by(self, holder: int | None) -> None:
        """Enter the pid of the holder of this daemon's files, or that there is none any more."""
        if self._entry is not None:
            entered = None if holder is None else pid_and_start(holder)
            self._entry = replace(self._entry, holder=entered)
            with suppress(OSError):
                self._entry.save()

    def mark_ending(self) -> None:
        """Record that the mount is gone and only the layers are still synced and closed."""
        if self._entry is not None:
            live.mark_ending(self._entry)

    def withdraw(self) -> None:
        """Remove the entry and the socket: the daemon is about to end."""
        if self._entry is not None:
            self._entry.remove()
        else:
            self._directory.remove(f"{live.own_name()}.sock")
