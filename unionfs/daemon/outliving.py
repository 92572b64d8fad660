"""A mount that outlives its daemon: the state for another daemon, and the holder that starts it."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Final

from unionfs.errors import reason
from unionfs.settings.mount import MountSettings
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability

if TYPE_CHECKING:
    from unionfs.core.state import State
    from unionfs.daemon.announcement import Announcement
    from unionfs.daemon.holder import Holder
    from unionfs.daemon.live import LiveMount
    from unionfs.daemon.runtime import RuntimeDirectory
    from unionfs.daemon.storage import Storage
    from unionfs.fuse.session_direct import Connection
    from unionfs.sys.mountinfo import MountEntry
    from unionfs.union.layers import LayerStack

log = logging.getLogger(__name__)

_NOT: Final = "the mount will not outlive its daemon: %s"
_ANEW: Final = f"{_NOT}; if it dies, another one mounts the union anew"


class Outliving:
    """What a mount needs for it, if it was asked for and is possible."""

    def __init__(
        self,
        settings: MountSettings,
        directory: RuntimeDirectory,
        stack: LayerStack,
        holder: Holder | None,
        storage: Storage | None,
        *,
        foreground: bool,
    ) -> None:
        """`holder`: that of this process, see :func:`holder_for`."""
        self._asked_for = settings.outlive
        self._directory = directory
        self._stack = stack
        self._storage = storage
        self.why_not = _why_not(settings, foreground=foreground)
        """Why the mount ends with its daemon, as a clause; empty if it does not."""
        self.state: State | None = None if holder is None or holder.stays else holder.state
        """Where nodes and open files are kept."""
        self._mounts_anew = False
        self._holder = holder
        self._layers = _identities(settings, holder)
        if settings.outlive and self.why_not:
            log.warning(_NOT, self.why_not)

    def begin(
        self, settings: MountSettings, connection: Connection | None, announcement: Announcement
    ) -> None:
        """The mount is usable and announced: start the holder."""
        if self._holder is None:
            return
        entry = announcement.entry
        mount = None if connection is None else connection.mount
        if entry is None or (connection is not None and mount is None):
            self.why_not = "the mount is in another mount namespace"
        elif self._holder.lies_on(entry.device):  # nothing more can be imported here
            self.why_not = "this program lies on the union itself"
        else:
            self.why_not = _no_takeover(entry.settings, connection)
            if self.why_not or self._holder.stays or connection is None or mount is None:
                self._begin_anew(self._holder, entry)
            else:
                self.why_not = self._begin(self._holder, connection, mount, entry)
        if self._holder.pid:
            announcement.held_by(self._holder.pid)
        else:
            self._holder.end()
        if self.why_not:
            log.warning(_ANEW if self._mounts_anew else _NOT, self.why_not)

    async def watch(self, announcement: Announcement) -> None:
        """Notice when somebody has killed the holder: then the mount ends with its daemon."""
        if self._holder is None or not self._holder.pid:
            return
        try:
            await self._holder.ended()
        except OSError as error:
            log.warning("the holder of the open files cannot be watched: %s", reason(error))
            return
        self.why_not, self._mounts_anew = "its holder was killed", False
        announcement.held_by(None)
        log.warning(_NOT, self.why_not)

    def take_charge(self, connection: Connection) -> None:
        """This process is about to answer requests of a former daemon's mount, and its own holder has its
        files."""
        if self._holder is not None:
            self._holder.take_charge(connection.device)

    def _begin(self, holder: Holder, connection: Connection, mount: MountEntry, entry: LiveMount) -> str:
        """Let the holder start daemons that go on with the mount. Returns why it cannot."""
        # For start-up time, as above.
        from unionfs.fuse.direct import agreed

        values = {
            "entry": entry.to_json(),
            "directory": self._directory.path,
            "layers": self._stack.kept(),
            "device": connection.device,
            "mount_id": mount.mount_id,
            "agreed": agreed.to_json(connection.decision),
            "guardian": None if self._storage is None else self._storage.guardian.kept(),
        }
        return holder.start(values, connection.device)

    def _begin_anew(self, holder: Holder, entry: LiveMount) -> None:
        """Let the holder start daemons that mount anew."""
        if entry.settings.upper_tmpfs is not None:
            self.why_not += ", and its upper is in memory"
            return
        if entry.settings.volatile and entry.settings.upper is not None:
            self.why_not += ", and its upper is volatile"  # no mount takes that after a crash
            return
        values = {
            "anew": self.why_not,
            "entry": entry.to_json(),
            "directory": self._directory.path,
            "layers": self._layers,
        }
        why_not = holder.start(values, -1)
        self._mounts_anew = not why_not
        self.why_not = why_not or self.why_not

    def crash(self, cause: BaseException) -> None:
        """An unexpected exception ends the daemon: leave everything to another one, if there is a holder."""
        if self._holder is not None and self._holder.is_there:
            log.critical("the daemon failed, and another one takes over", exc_info=cause)
            logging.shutdown()
            os._exit(1)

    def exchange(self) -> str:
        """Let the holder start the installed version when this process ends. Returns why that cannot be,
        as a clause, else an empty text."""
        return self.why_not or ("" if self._holder is None else self._holder.exchange())

    def end(self) -> None:
        """The daemon ends on purpose."""
        if self._holder is not None:
            self._holder.end()

    def figures(self) -> dict[str, Any]:
        """JSON-able."""
        if not self._asked_for:
            return {}
        if self._holder is None or (self.why_not and not self._mounts_anew):
            return {"holder": {"none_because": self.why_not}}
        why = {"mounts_anew_because": self.why_not} if self._mounts_anew else {}
        state = self._holder.state
        return {
            "holder": {
                "pid": self._holder.pid,
                "daemons_died": state.died[0],
                "state_bytes": state.memory,
                **why,
            }
        }


def holder_for(settings: MountSettings, *, foreground: bool) -> Holder | None:
    """A holder for a new mount, which is not forked yet; None if the mount ends with its daemon. Raises
    OSError."""
    if _why_not(settings, foreground=foreground):
        return None
    # For start-up time: few mounts have one.
    from unionfs.core.state import State
    from unionfs.daemon.holder import Holder

    return Holder(State())


def _identities(settings: MountSettings, holder: Holder | None) -> list[tuple[str, int, int]]:
    """The layers of a new mount that has a holder. Raises OSError."""
    if holder is None or holder.is_there:  # a former daemon's mount may cover them
        return []
    # For start-up time: few mounts have a holder.
    from unionfs.daemon.identities import identities

    return identities(settings)


def _why_not(settings: MountSettings, *, foreground: bool) -> str:
    if not settings.outlive:
        return "it was not asked for"
    if foreground:
        return "it runs in the foreground"
    return ""


def _no_takeover(settings: MountSettings, connection: Connection | None) -> str:
    """Why no other daemon can go on with a mount."""
    if settings.storage and not has_capability(CAP_SYS_ADMIN):
        return "the daemon serves its storage, which only root can mount"
    if settings.watch_lower:
        return "it watches its lowers"
    # For start-up time: few mounts have a holder.
    from unionfs.fuse.protocol import Init

    if connection is None:
        return "that needs --session direct"
    if not connection.decision.flags & Init.HAS_RESEND:
        return "the kernel cannot send requests again, which needs Linux 6.9"
    return ""
