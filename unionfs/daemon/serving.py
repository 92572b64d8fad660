"""Mounts and serves a union with the requested session, or with the first one that works here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from unionfs.daemon.clearing import clear_leftovers
from unionfs.fuse.direct.former import Former
from unionfs.fuse.direct.mounting import MountOptions
from unionfs.fuse.errors import SessionUnfit
from unionfs.fuse.operations import Operations
from unionfs.fuse.protocol import IoMode
from unionfs.fuse.session_direct import Connection
from unionfs.fuse.session_direct import resume as resume_directly
from unionfs.fuse.session_direct import serve as serve_directly
from unionfs.settings.mount import MountSettings
from unionfs.sys.mountinfo import MountEntry, mount_of_id, mounted_at

log = logging.getLogger(__name__)


class Serving:
    """The FUSE mount of one union."""

    def __init__(self, operations: Operations, settings: MountSettings) -> None:
        self.settings = settings
        """With the chosen session and I/O mode, once known."""
        self.io: Mapping[str, Any] = {}
        """The reasons for the I/O mode, as plain values."""
        self.device = ""
        """`major:minor` of the mount, once known."""
        self.connection: Connection | None = None
        """Of the direct session, once it is usable."""
        self._operations = operations
        self._mount: MountEntry | None = None
        self._gone = False

    def changed(self, settings: MountSettings) -> None:
        """Set the settings of the usable mount, whose layers have changed."""
        self.settings = settings

    async def serve(self, on_mounted: Callable[[], None]) -> None:
        """Mount and serve until the mount is gone. Raises SessionError."""
        await self._serve(on_mounted)
        # The kernel reuses the device number for the next mount.
        self._gone = True

    async def _serve(self, on_mounted: Callable[[], None]) -> None:
        settings = self.settings
        if settings.session != "pyfuse3":
            try:
                await self._serve_directly(on_mounted)
                return
            except SessionUnfit as unfit:
                if settings.session == "direct":
                    raise
                log.info("no direct session: %s", unfit)
                self.io = {"why": f"The direct session cannot be had. {unfit}"}
        # For start-up time: most mounts never load libfuse.
        from unionfs.fuse.session_pyfuse3 import serve as serve_by_pyfuse3

        self.settings = replace(settings, session="pyfuse3")
        await serve_by_pyfuse3(
            self._operations, settings.mountpoint, settings.fuse_options(), on_mounted, _no_limit(settings)
        )

    async def _serve_directly(self, on_mounted: Callable[[], None]) -> None:
        settings = self.settings
        options = MountOptions(
            source=settings.fsname,
            subtype=settings.subtype,
            allow_other=settings.allow_other,
            read_only=settings.read_only,
            flags=settings.flags,
            security=settings.security,
        )

        await serve_directly(
            self._operations, settings.mountpoint, options, IoMode(settings.io), partial(self._ready,
            on_mounted), cpu_idle=settings.cpu_idle, max_nodes=settings.max_nodes,
        )

    async def resume(self, connection: Connection, former: Former, on_mounted: Callable[[], None]) -> None:
        """Serve the mount of a former daemon until it is gone. Raises SessionError."""
        await resume_directly(
            self._operations, self.settings.mountpoint, connection, former, partial(self._ready, on_mounted),
            cpu_idle=self.settings.cpu_idle, max_nodes=self.settings.max_nodes,
        )
        self._gone = True

    def _ready(self, on_mounted: Callable[[], None], connection: Connection) -> None:
        decision = connection.decision
        self.connection = connection
        self._mount = connection.mount
        self.settings = replace(self.settings, session="direct", io=str(decision.io))
        self.io = {
            "why": decision.why,
            "why_not": {str(mode): reason for mode, reason in decision.why_not.items()},
            "missing": {str(flag.name): reason for flag, reason in decision.missing.items()},
        }
        on_mounted()

    def locate(self) -> MountEntry | None:
        """Return the mount, by its id if known: another mount may cover its path by now."""
        if self._mount is None:
            mount = mounted_at(self.settings.mountpoint)
        else:
            mount = mount_of_id(self._mount.mount_id)
        if mount is None or not mount.is_fuse:
            return None
        self.device = mount.device
        return mount

    def clear_leftovers(self, *, connected: bool) -> None:
        """Detach mounts left by an error; `connected`: the session is still served."""
        if self.device and not self._gone:
            clear_leftovers(self.device, connected=connected)


def _no_limit(settings: MountSettings) -> dict[str, object]:
    """The figures about a limit of nodes that libfuse cannot keep, and a line in the log."""
    if not settings.max_nodes:
        return {}
    why = "libfuse cannot ask the kernel to give nodes back"
    log.warning("option max_nodes has no effect: %s", why)
    return {"node_limit": {"max_nodes": settings.max_nodes, "none_because": why}}
