"""When a mount ends: by a signal, with the process it was made for, or by whoever unmounts it."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable

import trio

from unionfs.daemon.clearing import end_from_within
from unionfs.settings.mount import MountSettings
from unionfs.sys.process import is_alive

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# How long a mount that was unmounted in this namespace may live on elsewhere once the daemon was told to end.
_GRACE_SECONDS = 2.0
_DETACHED_SECONDS = 0.1

log = logging.getLogger(__name__)


def hold_signals() -> None:
    """From here on a signal means "end cleanly", and waits until `Lifetime.watch_signals` looks for it.

    What is blocked is kept even if it is ignored (kernel/signal.c). Ignored, a signal cannot end the process
    before the upper is on disk once trio's receiver has put that handler back.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Lifetime:
    """Ends a session, `finish` being called when it has to be cut off from its users."""

    def __init__(self, settings: MountSettings, finish: Callable[[], bool], *, foreground: bool) -> None:
        """`finish` lets go of everything and returns whether the upper is on disk.

        With `foreground` the loss of the terminal (SIGHUP) ends the mount.
        """
        self._mountpoint = settings.mountpoint
        self._owner = settings.lives_with
        self._finish = finish
        self._foreground = foreground
        self._device = ""
        self._ending = False

    def mounted(self, device: str) -> None:
        """The mount is there, and this is its `major:minor`."""
        self._device = device

    async def watch_signals(
        self, session: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """End the session at a signal."""
        with trio.open_signal_receiver(*_SIGNALS) as signals:
            task_status.started()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            async with trio.open_nursery() as nursery:
                async for number in signals:
                    if number == signal.SIGHUP and not self._foreground:
                        continue
                    nursery.start_soon(self._end, session, signal.Signals(number).name)

    async def watch_owner(self, session: trio.CancelScope) -> None:
        """End the session when the process ends for which the mount is there."""
        if self._owner is None:
            return
        pid, started = self._owner
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
        await self._end(session, f"process {pid} has ended")

    async def _end(self, session: trio.CancelScope, why: str) -> None:
        """Unmount while the loop goes on serving, then stop serving even if somebody still holds files."""
        if self._ending:
            return
        self._ending = True
        log.info("%s: unmounting %s", why, self._mountpoint)
        if not self._device:
            session.cancel()
            return
        try:
            detached = await trio.to_thread.run_sync(end_from_within, self._device, abandon_on_cancel=True)
        except OSError:
            log.exception("unmounting failed")
            detached = True
        # When the mount is gone, the session ends and cancels this task.
        await trio.sleep(_DETACHED_SECONDS if detached else _GRACE_SECONDS)
        log.warning("%s is still in use: its users are cut off", self._mountpoint)
        # The session is not cancelled: libfuse would unmount by name, which by now is somebody else's mount.
        # The end of the process ends the connection.
        on_disk = self._finish()
        logging.shutdown()
        os._exit(0 if on_disk else 1)
