"""Mounts a union anew whose daemon died, where no other daemon can go on with its mount.

So it is with the pyfuse3 session, and on kernels that cannot send requests again. Files that were open on the
dead mount are lost; names work again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Thread
from typing import Final

from unionfs.core.state import State, StateError
from unionfs.daemon import logs
from unionfs.daemon.clearing import clear_dead_mounts
from unionfs.daemon.holder import Holder, close_others
from unionfs.daemon.identities import Layer, refuse_others
from unionfs.daemon.live import LiveMount
from unionfs.daemon.runtime import RuntimeDirectory
from unionfs.daemon.service import Service
from unionfs.errors import UserError
from unionfs.settings.mount import MountSettings
from unionfs.settings.specs import BindSpec, VolumeSpec
from unionfs.storage.users import hold, release, user_of
from unionfs.sys.liveness import is_dead
from unionfs.sys.mountinfo import mounted_at
from unionfs.sys.process import pid_and_start, pid_namespace, wait_gone

_GUARDIAN_SECONDS: Final = 30.0
"""How long the guardian of a dead daemon may take to release its storage."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeadDaemon:
    """What a daemon has kept for this."""

    why: str
    """Why no other daemon can go on with its mount, as a clause."""
    entry: LiveMount
    layers: Sequence[Layer]


def dead_daemon(state: State) -> DeadDaemon | None:
    """What a daemon has kept whose union must be mounted anew; None if its mount goes on.

    Raises StateError.
    """
    try:
        values = json.loads(state.text)
        if "anew" not in values:
            return None
        entry = LiveMount.from_json(values["entry"], values["directory"])
        layers = [(str(path), int(device), int(inode)) for path, device, inode in values["layers"]]
        return DeadDaemon(str(values["anew"]), entry, layers)
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(f"its text cannot be read ({type(error).__name__}: {error})") from error


def mount_anew(state: State, dead: DeadDaemon) -> int:
    """Mount and serve until the mount is gone; returns the exit code."""
    close_others({state.fd})
    entry, holder = dead.entry, Holder(state, stays=True)
    if os.getppid() != state.holder:  # it was killed, so that the union is not mounted anew
        return 1
    waiting = _waiting(entry, state.holder)
    with RuntimeDirectory(entry.directory) as directory:
        logs.to_host(entry.settings.log_level, directory, entry.settings.mountpoint)
        deaths, too_often = state.died
        if too_often:
            log.critical("daemon %d died, one too many within a minute: it stays dead", entry.pid)
            waiting.remove()
            return 1
        if not _take_off(entry, state):
            log.info("daemon %d ended, and its mount was unmounted", entry.pid)
            waiting.remove()
            state.end()
            return 0
        with suppress(OSError):  # then `ls` and `umount` do not know of it
            waiting.save()
        entry.remove()
        text = "daemon %d ended (deaths: %d); the union is mounted anew: %s"
        log.warning(text, entry.pid, deaths, dead.why)
        try:
            settings = _settings(entry, state.restrictions)
            user = user_of(settings, *waiting.volume_user)
            hold(settings, user)
            refuse_others(dead.layers, settings.mountpoint)

            def on_usable() -> None:
                waiting.remove()
                # The requests do not wait for the locks of volumes.
                Thread(target=release, args=(settings, user), daemon=True).start()

            service = Service(settings, directory, on_usable, None, foreground=False, holder=holder)
            return 0 if service.run() else 1
        except UserError as error:
            log.error("the union could not be mounted anew: %s", error)
            return 1


def _take_off(entry: LiveMount, state: State) -> bool:
    """Unmount the dead mount, or that of a daemon which died as it mounted anew. Returns False if somebody
    else has, or if another mount is there."""
    if entry.guardian is not None:  # it does that
        wait_gone(*entry.guardian, _GUARDIAN_SECONDS)
    path = entry.settings.mountpoint
    mount = mounted_at(path)
    if mount is not None and not mount.is_fuse:
        mount = None
    if mount is not None and not is_dead(path):
        return False
    if not state.is_off:
        if mount is None or mount.device != entry.device:
            return False
        state.takes_off(mount.all_options)
    clear_dead_mounts(entry.device)
    if mount is not None:
        clear_dead_mounts(mount.device)
    return True


def _waiting(entry: LiveMount, holder: int) -> LiveMount:
    """The entry until the union is mounted, so that `umount` can end it: that of the holder, which is
    the user of the volumes, too, so that nobody removes them."""
    pid, started = pid_and_start(holder)
    return replace(
        entry, pid=pid, started=started, device="", claims=(), holder=None, guardian=None, waiting=True,
        namespace=pid_namespace(),
    )  # fmt: skip


def _settings(entry: LiveMount, restrictions: Collection[str]) -> MountSettings:
    """The settings of the dead mount with its restrictions, some of which may have come with a remount. What
    its storage needs, it has made and filled: an anonymous volume stays if mounting fails, and a volume that
    is empty by now stays empty."""
    storage = []
    for spec in entry.settings.storage:
        if isinstance(spec, VolumeSpec):
            spec = replace(spec, anonymous=False, copy=False)
        elif isinstance(spec, BindSpec):
            spec = replace(spec, create=False)
        storage.append(spec)
    added = [name for name in restrictions if name != "ro" and name not in entry.settings.flags]
    lifted = {name.removeprefix("no") for name in added}
    flags = (*(flag for flag in entry.settings.flags if flag not in lifted), *added)
    read_only = entry.settings.read_only or "ro" in restrictions
    return replace(entry.settings, storage=tuple(storage), read_only=read_only, flags=flags)
