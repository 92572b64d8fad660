"""When a mount ends: on a signal, with its owner process, or when it is unmounted.

On a signal the mount leaves the tree at once, as by `umount -l`. Processes that have files of it open may
finish: it is served until they have closed them, a second signal arrives, or the time is up.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress

import trio

from unionfs.daemon.clearing import end_from_within
from unionfs.errors import quoted
from unionfs.settings.mount import MountSettings
from unionfs.sys.fds import Owned, close_connections
from unionfs.sys.manager import Manager
from unionfs.sys.process import is_alive

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# How long a mount is served after a signal: systemd kills 90 seconds after it has sent one (TimeoutStopSec).
_HELD_SECONDS = 60.0
# How long after the end of its owner.
_GRACE_SECONDS = 2.0
# After an unmount the session ends by itself, if nobody uses the mount.
_NOTICE_SECONDS = 0.1

log = logging.getLogger(__name__)


def hold_signals() -> None:
    """Block and ignore the ending signals; they stay pending until `Lifetime.watch_signals`.

    A blocked signal stays pending even if ignored (kernel/signal.c). When trio's receiver restores the
    handlers at the end, SIG_IGN keeps signals from ending the process before the upper is on disk.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Lifetime:
    """Ends a session; calls `finish` if the mount is still in use."""

    def __init__(
        self,
        settings: MountSettings,
        finish: Callable[[], bool],
        manager: Manager | None,
        *,
        foreground: bool,
    ) -> None:
        """`finish` releases everything and returns whether the upper is on disk. `manager`: tell it what is
        waited for.

        With `foreground`, SIGHUP (loss of the terminal) ends the mount.
        """
        self._mountpoint = settings.mountpoint
        self._owner = settings.lives_with
        self._finish = finish
        self._manager = manager
        self._foreground = foreground
        self._device = ""
        self._ending = False
        self._at_once = trio.Event()
        self._leaves = trio.Event()
        self._cut_off = False

    @property
    def is_ending(self) -> bool:
        """Whether the mount is being ended."""
        return self._ending

    def leave(self) -> None:
        """Another daemon is to go on: this one ends when it has answered the order."""
        self._leaves.set()

    async def watch_leaving(self) -> None:
        """End the process after `leave`, between two requests."""
        await self._leaves.wait()
        await trio.sleep(_NOTICE_SECONDS)
        log.info("another daemon goes on")
        logging.shutdown()
        os._exit(0)

    def mounted(self, device: str) -> None:
        """Record the `major:minor` of the mount."""
        self._device = device

    def cut_off(self) -> None:
        """End the mount now, like two signals, without waiting for its users."""
        self._cut_off = True
        if self._ending:
            self._at_once.set()
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def _tell(self, *states: str) -> None:
        if self._manager is not None:
            self._manager.tell(*states)

    async def watch_signals(
        self, session: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(*_SIGNALS) as signals:
            task_status.started()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            async with trio.open_nursery() as nursery:
                async for number in signals:
                    if number == signal.SIGHUP and not self._foreground:
                        continue
                    if self._ending:
                        self._at_once.set()
                    else:
                        nursery.start_soon(self._end, session, signal.Signals(number).name, _HELD_SECONDS)

    async def watch_owner(self, session: trio.CancelScope) -> None:
        if self._owner is None:
            return
        pid, started = self._owner
        with suppress(ProcessLookupError), Owned(os.pidfd_open(pid)) as pidfd:
            # Checked after pidfd_open, so that the pid cannot have been reused.
            if is_alive(pid, started):
                await trio.lowlevel.wait_readable(pidfd)
        await self._end(session, f"process {pid} has ended", _GRACE_SECONDS)

    async def _end(self, session: trio.CancelScope, why: str, patience: float) -> None:
        """Unmount while the loop keeps serving; stop serving after `patience` seconds at the latest."""
        if self._ending:
            return
        self._ending = True
        log.info("%s: unmounting %s", why, self._mountpoint)
        self._tell("STOPPING=1", f"STATUS=Unmounting {quoted(self._mountpoint)}")
        if not self._device:
            session.cancel()
            return
        try:
            if not await trio.to_thread.run_sync(end_from_within, self._device, abandon_on_cancel=True):
                log.warning("%s is covered by another mount: it ends with the daemon", self._mountpoint)
                patience = _GRACE_SECONDS
        except OSError:
            log.exception("unmounting failed")
            patience = 0
        # When the mount is gone, the session ends and cancels this task.
        await trio.sleep(_NOTICE_SECONDS)
        # Signals until now came for the unmounting.
        self._at_once = trio.Event()
        if self._cut_off:
            patience = 0
        if patience > _GRACE_SECONDS:
            log.warning(
                "%s is unmounted, but in use: it is served for at most %.0f seconds; another signal ends it",
                self._mountpoint,
                patience,
            )
            self._tell(f"STATUS=Unmounted, but in use: served for at most {patience:.0f} seconds")
        with trio.move_on_after(patience):
            await self._at_once.wait()
        log.warning("%s is still in use: its users are cut off", self._mountpoint)
        # Do not cancel the session: libfuse would unmount by path, which may be another mount by now.
        on_disk = self._finish()
        # It would end with the process, which a call into a layer that does not answer may keep.
        close_connections()
        logging.shutdown()
        os._exit(0 if on_disk else 1)
