"""The daemon at work: opens the layers, mounts, serves, and ends so that all is on disk and nothing is left.

Imports trio and the whole union, so only the process that serves a mount imports this module.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import trio

from unionfs.daemon import live, unmount
from unionfs.daemon.claiming import Claim
from unionfs.daemon.confine import confine
from unionfs.daemon.control import listen, serve_control
from unionfs.daemon.runtime import RuntimeDirectory
from unionfs.daemon.settings import MountSettings
from unionfs.daemon.stats import more_for
from unionfs.errors import MountRefusedError, UserError, quoted, reason
from unionfs.fuse.errors import SessionError, SessionUnfit
from unionfs.fuse.operations import Operations
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability, in_initial_user_namespace
from unionfs.sys.mountinfo import MountEntry, mount_of_id, mounted_at
from unionfs.sys.process import is_alive
from unionfs.union.errors import LayerError
from unionfs.union.layers import LayerStack
from unionfs.union.tree import Union

if TYPE_CHECKING:
    from unionfs.daemon.guardian import Guardian
    from unionfs.storage.sources import Sources
    from unionfs.storage.specs import Spec, TmpfsOptions

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# How long a mount that was unmounted in this namespace may live on elsewhere once the daemon was told to end.
_GRACE_SECONDS = 2.0
_DETACHED_SECONDS = 0.1

log = logging.getLogger(__name__)


class Service:
    """One mount from its layers to its end."""

    def __init__(
        self,
        settings: MountSettings,
        directory: RuntimeDirectory,
        on_usable: Callable[[], None],
        *,
        foreground: bool,
    ) -> None:
        """`directory` is for runtime files; `on_usable` is called once, when the mount can be used.

        With `foreground` the loss of the terminal (SIGHUP) ends the mount.
        """
        self.settings = settings
        self.directory = directory
        self.device = ""
        self._on_usable = on_usable
        self._foreground = foreground
        self._claim: Claim | None = None
        self._stack: LayerStack | None = None
        self._entry: live.LiveMount | None = None
        self._told_to_end = False
        #: Whether mounts of ours may be left: not once it is known that they are gone, for the number of the
        #: device is then given to the next mount, of whatever kind.
        self._may_leave_mounts = True
        self._io: dict[str, Any] = {}
        #: The mount, as the direct session made it.
        self._mount: MountEntry | None = None
        #: Of a mount with storage: who it is to the registry of volumes, and the process that watches us.
        self._user = ""
        self._guardian: Guardian | None = None
        self._sources: Sources | None = None
        #: Whether the mount came to be used, so that what was made for its storage stays.
        self._usable = False

    def run(self) -> bool:
        """Serve until the mount is gone. Returns whether the upper reached the disk.

        Raises UserError when it can't be mounted; nothing is left mounted then.
        """
        self._claim = Claim(self.settings.mountpoint, self.directory)
        try:
            return self._run()
        finally:
            self._claim.release()
            self._let_go_of_storage()

    def _run(self) -> bool:
        os.umask(0)  # what callers ask for is what they get; the kernel took their umask off already
        if self.settings.storage:
            self._open_storage()
        settings = self.settings
        try:
            claims = live.claims_of(settings)
            scratch = None if settings.upper_tmpfs is None else self._scratch(settings.upper_tmpfs)
            stack = LayerStack.open(
                settings.lowers,
                settings.upper,
                settings.work,
                userxattr=settings.userxattr,
                volatile=settings.volatile,
                scratch=scratch,
            )
        except LayerError as error:
            raise UserError(_sentence(str(error))) from error
        except OSError as error:
            name = quoted(str(error.filename)) if error.filename else "the layers"
            raise UserError(f"{name} cannot be opened: {reason(error)}; check the layers.") from error
        self._stack = stack
        confine(settings)
        try:
            operations = Operations(Union(stack))
            if settings.storage and not has_capability(CAP_SYS_ADMIN):
                self._serve_storage(operations.union, stack)
            listeners = self._listen()
            # From here on a signal means "end cleanly". It waits until trio's receiver looks for it (what is
            # blocked is kept even if it is ignored, kernel/signal.c), and once the receiver has put "ignored"
            # back, it cannot end the process before the upper is on disk.
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            try:
                trio.run(self._main, operations, listeners, claims)
            except BaseExceptionGroup as group:
                cause = _cause(group)
                if isinstance(cause, SessionError) and self.device:
                    raise UserError(_sentence(str(cause))) from group
                if isinstance(cause, SessionError):
                    raise MountRefusedError(self.settings.mountpoint, str(cause)) from group
                if isinstance(cause, UserError):
                    raise cause from group
                raise
        finally:
            on_disk = self._finish(stack)
        return on_disk

    def _open_storage(self) -> None:
        """Have a guardian wait for our end, and open all sources, before there are threads or a mount."""
        from unionfs.daemon import guardian
        from unionfs.storage.sources import Sources
        from unionfs.storage.users import release, user_of, with_names
        from unionfs.storage.volumes import Volumes

        settings = self.settings = replace(self.settings, storage=with_names(self.settings.storage))
        self._user = user = user_of(settings.mountpoint)

        def clear(device: str) -> None:
            if device:
                unmount.clear_dead_mounts(device)
            release(settings, user)
            live.entries()

        try:
            self._guardian = guardian.start(clear)
        except OSError as error:
            raise UserError(f"no process can be started: {reason(error)}; end some others.") from error
        volumes = Volumes(settings.storage_root)
        self._sources = Sources(volumes, user, kernel_mounts=has_capability(CAP_SYS_ADMIN))
        self._sources.open(settings.storage)

    def _scratch(self, options: TmpfsOptions) -> int:
        from unionfs.storage import tmpfs

        # Devices and set-id programs are for the union's own mount to allow or not.
        return tmpfs.make(options, owner="the tmpfs for the upper")

    def _attach(self, mount: MountEntry, stack: LayerStack) -> tuple[Spec, ...]:
        """Mount the storage into the union, in a thread: every path leads through the union."""
        from unionfs.storage.attach import attach

        assert self._sources is not None
        return attach(mount, self._sources, stack)

    def _serve_storage(self, union: Union, stack: LayerStack) -> None:
        """Without root the union shows its storage by itself."""
        from unionfs.storage import served

        assert self._sources is not None
        self.settings = replace(self.settings, storage=served.serve(self._sources, union, stack))
        self._sources.close()

    def _listen(self) -> list[socket.socket]:
        """Where this user asks, by the runtime directory, and where root asks an ordinary user's daemon."""
        name = live.own_name()
        addresses = [self.directory.address(f"{name}.sock")]
        # In a user namespace root of the host cannot be told from anybody else.
        if os.geteuid() != 0 and in_initial_user_namespace():
            addresses.append("\0" + live.abstract_name(name))
        found = []
        for address in addresses:
            try:
                found.append(listen(address))
            except OSError as error:
                # `inspect` will lack the figures; that is no reason not to mount.
                log.warning("no socket for questions: %s", error)
        return found

    async def _main(
        self,
        operations: Operations,
        listeners: list[socket.socket],
        claims: tuple[tuple[int, int], ...],
    ) -> None:
        ready = trio.Event()
        async with trio.open_nursery() as nursery:
            session = trio.CancelScope()
            await nursery.start(self._watch_signals, session)
            nursery.start_soon(self._announce, ready, claims)
            if self.settings.lives_with is not None:
                nursery.start_soon(self._watch_owner, session, *self.settings.lives_with)
            if listeners:
                nursery.start_soon(serve_control, listeners, lambda asked: self._answer(operations, asked))
            with session:
                await self._serve(operations, ready)
                self._may_leave_mounts = False
            nursery.cancel_scope.cancel()
        if not ready.is_set():
            raise UserError(f"mounting at {quoted(self.settings.mountpoint)} was interrupted; try again.")

    async def _serve(self, operations: Operations, ready: trio.Event) -> None:
        """By the session that was asked for, or by the first that can be had."""
        settings = self.settings
        if settings.session != "pyfuse3":
            from unionfs.fuse.protocol import Decision, IoMode
            from unionfs.fuse.session_direct import serve as serve_directly

            def on_ready(decision: Decision, entry: MountEntry | None) -> None:
                self._mount = entry
                self.settings = replace(settings, session="direct", io=str(decision.io))
                self._io = {
                    "why": decision.why,
                    "why_not": {str(mode): reason for mode, reason in decision.why_not.items()},
                    "missing": {str(flag.name): reason for flag, reason in decision.missing.items()},
                }
                ready.set()

            try:
                await serve_directly(
                    operations, settings.mountpoint, settings.mount_options(), IoMode(settings.io), on_ready
                )
                return
            except SessionUnfit as unfit:
                if settings.session == "direct":
                    raise
                log.info("no direct session: %s", unfit)
                self._io = {"why": f"The direct session cannot be had. {unfit}"}
        from unionfs.fuse.session_pyfuse3 import serve

        self.settings = replace(settings, session="pyfuse3")
        await serve(operations, settings.mountpoint, settings.fuse_options(), ready.set)

    async def _announce(self, ready: trio.Event, claims: tuple[tuple[int, int], ...]) -> None:
        await ready.wait()
        # By its id where that is known: its path may lead to another mount by now.
        if self._mount is None:
            mount = mounted_at(self.settings.mountpoint)
        else:
            mount = mount_of_id(self._mount.mount_id)
        assert self._claim is not None
        self._claim.release()
        if mount is None or not mount.is_fuse:
            # Whoever waited for the mount has unmounted it already, and serve() is about to return.
            log.info("%s was unmounted as soon as it was there", self.settings.mountpoint)
            self._on_usable()
            return
        self.device = mount.device
        if self._guardian is not None:
            self._guardian.tell(mount.device)
        if self.settings.storage and has_capability(CAP_SYS_ADMIN):
            assert self._stack is not None
            attached = await trio.to_thread.run_sync(self._attach, mount, self._stack, abandon_on_cancel=True)
            self.settings = replace(self.settings, storage=attached)
            assert self._sources is not None
            self._sources.close()
        try:
            self._entry = live.announce(self.settings, mount.device, self.directory.path, claims)
        except OSError as error:
            raise UserError(
                f"the mount cannot be entered in {quoted(self.directory.path)}: {reason(error)}; make room "
                "there."
            ) from error
        log.info("mounted at %s", self.settings.mountpoint)
        self._usable = True
        self._on_usable()

    def _answer(self, operations: Operations, question: dict[str, Any]) -> dict[str, Any]:
        upper = operations.union.stack.upper
        return {
            "settings": self.settings.to_json(),
            "device": self.device,
            "since": None if self._entry is None else self._entry.since,
            "io": self._io,
            "figures": operations.figures(),
            "upper_fd": None if upper is None else upper.root_fd,
            **more_for(question, operations.latencies),
        }

    async def _watch_signals(
        self, session: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(*_SIGNALS) as signals:
            task_status.started()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            async with trio.open_nursery() as nursery:
                async for number in signals:
                    if self._told_to_end or (number == signal.SIGHUP and not self._foreground):
                        continue
                    self._told_to_end = True
                    log.info("%s: unmounting %s", signal.Signals(number).name, self.settings.mountpoint)
                    nursery.start_soon(self._end, session)

    async def _watch_owner(self, session: trio.CancelScope, pid: int, started: int) -> None:
        """End when the process ends for which the mount is there."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            pass
        else:
            try:
                # Asked after the pidfd is there, so that the pid cannot have got to another process since.
                if is_alive(pid, started):
                    await trio.lowlevel.wait_readable(pidfd)
            finally:
                os.close(pidfd)
        if not self._told_to_end:
            self._told_to_end = True
            log.info("process %d has ended: unmounting %s", pid, self.settings.mountpoint)
            await self._end(session)

    async def _end(self, session: trio.CancelScope) -> None:
        """Unmount while the loop goes on serving, then stop serving even if somebody still holds files."""
        if not self.device:
            session.cancel()
            return
        try:
            detached = await trio.to_thread.run_sync(
                unmount.end_from_within, self.device, abandon_on_cancel=True
            )
        except OSError:
            log.exception("unmounting failed")
            detached = True
        # When the mount is gone, serve() returns and cancels this task.
        await trio.sleep(_DETACHED_SECONDS if detached else _GRACE_SECONDS)
        log.warning("%s is still in use: its users are cut off", self.settings.mountpoint)
        # serve() is not cancelled, for libfuse would then unmount by name, and by now that is somebody else's
        # mount. The end of the process ends the connection.
        assert self._stack is not None
        on_disk = self._finish(self._stack, connected=True)
        logging.shutdown()
        os._exit(0 if on_disk else 1)

    def _finish(self, stack: LayerStack, *, connected: bool = False) -> bool:
        """Let go of the layers, lowers first, the upper when it is on disk."""
        on_disk = True
        stack.close_lowers()
        if self.device and self._may_leave_mounts:
            unmount.clear_leftovers(self.device, connected=connected)
        self._release_storage()
        if self._entry is not None:
            live.mark_ending(self._entry)
        if not self.settings.volatile:
            try:
                stack.sync_upper()
            except OSError as error:
                log.error("the upper could not be written to disk: %s", error)
                on_disk = False
        stack.close()
        if self._entry is not None:
            self._entry.remove()
        else:
            self.directory.remove(f"{live.own_name()}.sock")
        self._let_go_of_storage()
        log.info("ended: %s", self.settings.mountpoint)
        return on_disk

    def _release_storage(self) -> None:
        """Give the volumes back; when the mount never could be used, all that was made for it is undone."""
        if self._sources is None:
            return
        if self._usable:
            from unionfs.storage.users import release

            release(self.settings, self._user)
        else:
            self._sources.give_up()
        self._sources = None

    def _let_go_of_storage(self) -> None:
        """The last that is done, however the mount ends: from now on nobody has to watch us."""
        self._release_storage()
        if self._guardian is not None:
            self._guardian.dismiss()
            self._guardian = None


def _cause(group: BaseExceptionGroup[Any]) -> BaseException:
    """The exception in a tree of groups that is meant for the user, else the first one."""
    known = group.subgroup((SessionError, UserError))
    error: BaseException = group if known is None else known
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _sentence(text: str) -> str:
    return text if text.endswith(".") else text + "."
