"""A former daemon of the mount that this process takes over: what it has left in the state, and its open
files."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable
from typing import Any

from unionfs.core.restoring import Restoring
from unionfs.core.state import State, StateError
from unionfs.daemon.holder import close_others, open_on
from unionfs.daemon.live import LiveMount
from unionfs.fuse.direct import agreed
from unionfs.fuse.direct.former import Former
from unionfs.fuse.operations import Operations
from unionfs.fuse.session_direct import Connection
from unionfs.settings.mount import MountSettings
from unionfs.settings.options import ATIME_WORDS
from unionfs.sys.fds import close_quietly
from unionfs.sys.guardian import Guardian
from unionfs.sys.mountinfo import mount_of_id
from unionfs.union.layers import LayerStack, slow_devices


class FormerDaemon:
    """Its mount, layers and open files."""

    def __init__(self, state: State) -> None:
        """Closes the files of the former daemon that are not needed. Raises StateError."""
        self.state = state
        try:
            values = json.loads(state.text)
            self.entry = LiveMount.from_json(values["entry"], values["directory"])
            self.settings: MountSettings = self.entry.settings
            self._layers: dict[str, Any] = values["layers"]
            guardian = values.get("guardian")
            self.guardian = None if guardian is None else Guardian(int(guardian[0]), int(guardian[1]))
            self._connection = Connection(
                values["device"], agreed.from_json(values["agreed"]), mount_of_id(values["mount_id"])
            )
        except (ValueError, KeyError, TypeError) as error:
            raise StateError(f"its text cannot be read ({type(error).__name__}: {error})") from error
        self.holder = os.getppid()
        self._slow = open_on(slow_devices(self._layers["known"]))
        kept = {state.fd, self._connection.device, *self._layers["files"], *state.files()}
        if self.guardian is not None:
            kept.add(self.guardian.kept()[0])
        self._slow -= kept
        close_others(kept | self._slow)

    def layers(self) -> LayerStack:
        """The same layers. Raises LayerError, OSError."""
        settings = self.settings
        return LayerStack.resume(
            self._layers,
            settings.lowers,
            settings.upper,
            userxattr=settings.userxattr,
            volatile=settings.volatile,
            shown=settings.shown,
            atime=[flag for flag in settings.flags if flag in ATIME_WORDS],
        )

    def take_over(self, operations: Operations) -> tuple[Connection, Former]:
        """Take over nodes and open files; returns the connection, and what the session needs."""
        union = operations.union
        handles, files = operations.files.handles, union.files
        restoring = Restoring(union.nodes, union.stack.layers, handles, files.reopen, files.open_again)
        opened, backing_ids, kept = restoring.take_over()
        if self._slow:
            threading.Thread(target=_close_all, args=(sorted(self._slow),), daemon=True).start()
        return self._connection, Former(opened, backing_ids, kept, restoring.opened_by)


def _close_all(fds: Iterable[int]) -> None:
    """Close files of slow layers: close(2) waits for the server."""
    for fd in fds:
        close_quietly(fd)
