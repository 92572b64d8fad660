"""Runs the daemon: claim, storage, layers, mount, announcement and lifetime.

Imports trio and the whole union, so only the process that serves a mount imports this module.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import trio

from unionfs.core.samepages import SamePages
from unionfs.daemon import live, logs, watchdog
from unionfs.daemon.announcement import Announcement
from unionfs.daemon.answering import serve_control
from unionfs.daemon.claiming import Claim
from unionfs.daemon.confine import confine
from unionfs.daemon.lifetime import Lifetime, hold_signals
from unionfs.daemon.orders import END, done, failed, order_in
from unionfs.daemon.outliving import Outliving
from unionfs.daemon.runtime import RuntimeDirectory
from unionfs.daemon.serving import Serving
from unionfs.daemon.sharing import share_memory
from unionfs.daemon.snapshotting import Snapshotting, recover
from unionfs.daemon.stats import more_for
from unionfs.daemon.syncing import sync
from unionfs.errors import MountRefusedError, UserError, on_failure, path_in, quoted, reason
from unionfs.fuse.errors import SessionError
from unionfs.fuse.operations import Operations
from unionfs.settings.mount import MountSettings
from unionfs.settings.options import ATIME_WORDS
from unionfs.sys.inotify import Inotify
from unionfs.sys.manager import Manager
from unionfs.union.layers import LayerStack
from unionfs.union.tree import Union

if TYPE_CHECKING:
    from unionfs.core.state import State
    from unionfs.daemon.former import FormerDaemon
    from unionfs.daemon.holder import Holder
    from unionfs.daemon.storage import Storage

_SYNC_MICROSECONDS: Final = 600_000_000
"""How long the service manager lets the upper be written at the end."""

_LEASE_SECONDS: Final = 5.0
"""How long an order waits for the upper's lease to be renewed."""

log = logging.getLogger(__name__)


class Service:
    """One mount, from opening its layers to its end."""

    def __init__(
        self,
        settings: MountSettings,
        directory: RuntimeDirectory,
        on_usable: Callable[[], None],
        pages: SamePages | None,
        *,
        foreground: bool,
        holder: Holder | None = None,
        former: FormerDaemon | None = None,
        manager: Manager | None = None,
    ) -> None:
        """`directory` holds runtime files; `on_usable` is called once, when the mount is usable.
        `holder`: that of this process. `former`: take over its mount. `manager`: tell it that the process
        runs, and when it ends.

        `pages`: what may be shared of the memory of this process.

        With `foreground`, SIGHUP (loss of the terminal) ends the mount. Raises UserError, leaving nothing
        open.
        """
        os.umask(0)  # the kernel has already applied the caller's umask
        self._on_usable = on_usable
        self._pages = pages
        self._claim = None if former else Claim(settings.mountpoint, directory)
        self._former = former
        self._storage: Storage | None = None
        with ExitStack() as undo:
            if former is None:  # else the mount lives on, for another daemon
                undo.callback(self._let_go)
            if settings.storage:
                self._storage = _storage(settings, holder, former)
                settings = self._storage.settings
            if former is None:
                self._announcement, self._stack = _open(settings, directory)
            else:
                self._announcement = Announcement(settings, directory, former.entry)
                self._stack = former.layers()
            if former is None:
                undo.callback(self._stack.close)
                _recover(self._stack, settings)
            self._outliving = Outliving(
                settings, directory, self._stack, holder, self._storage, foreground=foreground
            )
            # Before the union notes the capabilities to restore after it acted as a caller: capset(2) of
            # more than are left fails, and the caller's own rights would count in work.
            confine(settings)
            if self._stack.lease is not None:  # its thread has no more rights then
                (self._stack.lease.begin if former is None else self._stack.lease.go_on)()
            self._operations = Operations(_union(self._stack, settings, self._outliving.state))
            undo.pop_all()
        self._serving = Serving(self._operations, settings)
        self._snapshotting = Snapshotting(self._operations, self._stack, self._serving, self._republish)
        self._manager = manager
        self._lifetime = Lifetime(
            settings, lambda: self._finish(connected=True), manager, foreground=foreground
        )

    def run(self) -> bool:
        """Serve until the mount is gone. Returns whether the upper is on disk.

        Raises UserError if mounting fails, leaving nothing mounted.
        """
        try:
            if self._storage is not None and self._former is None:
                self._storage.serve(self._operations.union, self._stack)
            listeners = self._announcement.listen()
            hold_signals()
            try:
                trio.run(self._main, listeners)
            except BaseExceptionGroup as group:
                cause = _cause(group)
                if not isinstance(cause, SessionError | UserError):
                    self._outliving.crash(group)
                if isinstance(cause, SessionError):
                    cause = self._explained(cause)
                if isinstance(cause, UserError):
                    raise cause from group
                raise
        finally:
            on_disk = self._finish()
        return on_disk

    def _settings(self) -> MountSettings:
        """Return the settings with the chosen session and the real targets of the storage."""
        settings = self._serving.settings
        if self._storage is not None:
            settings = replace(settings, storage=self._storage.settings.storage)
        return settings

    def _explained(self, error: SessionError) -> UserError:
        text = str(error)
        if not self._serving.device:
            return MountRefusedError(self._serving.settings.mountpoint, text)
        return UserError(text if text.endswith(".") else text + ".")

    async def _main(self, listeners: list[socket.socket]) -> None:
        mounted = trio.Event()
        async with trio.open_nursery() as nursery:
            session = trio.CancelScope()
            await nursery.start(self._lifetime.watch_signals, session)
            nursery.start_soon(self._lifetime.watch_owner, session)
            nursery.start_soon(self._lifetime.watch_leaving)
            nursery.start_soon(self._announce, mounted)
            if self._manager is not None:
                nursery.start_soon(watchdog.watch, self._manager)
            if self._pages is not None:
                nursery.start_soon(share_memory, self._pages)
            watches = self._operations.union.watches
            if watches is not None:
                nursery.start_soon(self._operations.refreshing.watch, watches)
            nursery.start_soon(self._snapshotting.clean)
            if listeners:
                nursery.start_soon(serve_control, listeners, self._answer)
            with session:
                if self._former is None:
                    await self._serving.serve(mounted.set)
                else:
                    connection, open_before = self._former.take_over(self._operations)
                    self._outliving.take_charge(connection)
                    await self._serving.resume(connection, open_before, mounted.set)
            nursery.cancel_scope.cancel()
        if not mounted.is_set():
            mountpoint = quoted(self._serving.settings.mountpoint)
            raise UserError(f"mounting at {mountpoint} was interrupted; try again.")

    async def _announce(self, mounted: trio.Event) -> None:
        await mounted.wait()
        mount = self._serving.locate()
        self._release_claim()
        if mount is None:
            # It has been unmounted already, and the session is about to end.
            log.info("%s was unmounted as soon as it was there", self._serving.settings.mountpoint)
            self._on_usable()
            return
        self._lifetime.mounted(mount.device)
        if self._storage is not None and self._former is None:
            await trio.to_thread.run_sync(self._storage.mount, mount, self._stack, abandon_on_cancel=True)
        user = None if self._storage is None else self._storage.lasting_user
        self._announcement.publish(self._settings(), mount.device, user)
        log.info("mounted at %s", self._serving.settings.mountpoint)
        for name, value in self._settings().to_json().items():
            log.debug("setting %s: %s", name, value)
        for name, value in self._serving.io.items():
            log.debug("I/O %s: %s", name, value)
        if self._storage is not None:
            self._storage.keep()
        self._outliving.begin(self._settings(), self._serving.connection, self._announcement)
        self._on_usable()
        await self._outliving.watch(self._announcement)

    async def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        log.debug("asked: %s", question or "figures")
        order = order_in(question)
        if order is not None:
            return await self._obey(order, question)
        upper = self._stack.upper
        return {
            "settings": self._settings().to_json(),
            "device": self._serving.device,
            "since": self._announcement.since,
            "io": self._serving.io,
            "log": logs.current_place(),
            "figures": {**self._operations.figures(), **self._outliving.figures()},
            "upper_fd": None if upper is None else upper.root_fd,
            live.ENDING: self._lifetime.is_ending,
            **more_for(question, self._operations.latencies),
        }

    async def _refusal(self, order: str) -> str:
        """Why an order is not carried out for lack of the upper's lease, with the cure; else empty."""
        fence, lease = self._operations.fence, self._stack.lease
        if fence is None or lease is None or order == END:
            return ""
        with trio.move_on_after(_LEASE_SECONDS):
            await fence.passed()
        if fence.passes:
            return ""
        silent = "the lease of its upper cannot be renewed; try again when the filesystem answers"
        why = f"{lease.lost}; unmount it" if lease.lost else silent
        if order in ("snapshot", "restore"):
            return f"{quoted(self._serving.settings.mountpoint)} cannot change its layers: {why}"
        return why

    async def _obey(self, order: str, question: dict[str, Any]) -> dict[str, Any]:
        try:
            if why_not := await self._refusal(order):
                return failed(why_not)
            if order in ("snapshot", "restore"):
                return await self._snapshotting.obey(order, question)
            if order == "sync":
                await sync(self._serving.locate(), self._stack)
            elif order == "exchange":
                if why_not := await trio.to_thread.run_sync(self._outliving.exchange):
                    return failed(why_not)
                self._lifetime.leave()
            elif order == "refresh":
                await self._operations.refreshing.refresh()
            elif order == END:
                self._lifetime.cut_off()
            else:
                return failed("its daemon does not know that order")
        except OSError as error:
            return failed(reason(error))
        except UserError as error:
            return failed(str(error).rstrip("."))
        return done()

    def _republish(self) -> None:
        self._announcement.changed(self._settings(), self._stack.identities())

    def _finish(self, *, connected: bool = False) -> bool:
        """Release everything: lowers first, the upper after its sync. Returns whether it is on disk."""
        settings, on_disk = self._settings(), True
        if self._manager is not None:
            mountpoint = quoted(settings.mountpoint)
            status = f"STATUS=Writing the upper of {mountpoint} to disk"
            self._manager.tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={_SYNC_MICROSECONDS}", status)
        self._outliving.end()
        self._stack.close_lowers()
        self._serving.clear_leftovers(connected=connected)
        if self._storage is not None:
            self._storage.give_back()
        self._announcement.mark_ending()
        lease = self._stack.lease
        sure = lease is None or lease.is_renewed()
        answers = sure or (lease is not None and bool(lease.lost))
        if sure:  # else work may be another host's
            self._operations.union.work.close()
        if not settings.volatile:
            on_disk = self._synced(answers=answers)
        if answers:
            self._stack.close()
        else:
            # Who unmounts does not wait for the server. The process ends by a signal that kills.
            closing = threading.Thread(target=self._stack.close, daemon=True)
            closing.start()
            closing.join(_LEASE_SECONDS)
        self._announcement.withdraw()
        self._let_go()
        log.info("ended: %s", settings.mountpoint)
        return on_disk

    def _synced(self, *, answers: bool) -> bool:
        """Write the upper to disk, if its server answers; returns whether that was possible."""
        try:
            if not answers:
                raise TimeoutError("its filesystem does not answer")
            self._stack.sync_upper()
        except OSError as error:
            log.error("the upper could not be written to disk: %s", error)
            return False
        return True

    def _release_claim(self) -> None:
        if self._claim is not None:
            self._claim.release()

    def _let_go(self) -> None:
        self._release_claim()
        if self._storage is not None:
            self._storage.let_go()


def _storage(settings: MountSettings, holder: Holder | None, former: FormerDaemon | None) -> Storage:
    # For start-up time: most unions have no storage.
    from unionfs.daemon.storage import Storage

    guardian = None if former is None else former.guardian
    return Storage(settings, guardian, None if holder is None else holder.state)


def _open(settings: MountSettings, directory: RuntimeDirectory) -> tuple[Announcement, LayerStack]:
    """Open the layers and claims, whose paths the mount may cover. Raises UserError."""
    try:
        announcement, scratch = Announcement(settings, directory), None
        if settings.upper_tmpfs is not None:
            # For start-up time: most uppers are directories.
            from unionfs.storage import tmpfs

            # The union's own mount decides on devices and set-id programs.
            scratch = tmpfs.make(settings.upper_tmpfs, owner="the tmpfs for the upper")
        stack = LayerStack.open(
            settings.lowers,
            settings.upper,
            settings.work,
            userxattr=settings.userxattr,
            volatile=settings.volatile,
            features=settings.features,
            shown=settings.shown,
            scratch=scratch,
            atime=[flag for flag in settings.flags if flag in ATIME_WORDS],
        )
    except OSError as error:
        path = path_in(error)
        name = quoted(path) if path else "the layers"
        raise UserError(f"{name} cannot be opened: {reason(error)}; check the layers.") from error
    return announcement, stack


def _recover(stack: LayerStack, settings: MountSettings) -> None:
    """Finish a change of snapshots whose daemon was killed. Raises UserError."""
    complaint = f"the snapshots of upper {quoted(settings.upper or '')} cannot be read"
    with on_failure(complaint, "check their directory"):
        recover(stack, settings)


def _union(stack: LayerStack, settings: MountSettings, state: State | None) -> Union:
    """The union, with watches of its lowers if `watch_lower`. Raises UserError."""
    if not settings.watch_lower:
        return Union(stack, state=state)
    try:
        return Union(stack, notifier=Inotify())
    except OSError as error:
        limits = "fs.inotify.max_user_instances and max_user_watches"
        raise UserError(
            f"the lowers cannot be watched: {reason(error)}; raise {limits}, or leave --watch-lower out."
        ) from error


def _cause(group: BaseExceptionGroup[Any]) -> BaseException:
    """Return the exception in a tree of groups that is meant for the user, else the first one."""
    known = group.subgroup((SessionError, UserError))
    error: BaseException = group if known is None else known
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
