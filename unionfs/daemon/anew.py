"""Mounts a union anew whose daemon died, where no other daemon can go on with its mount.

So it is with the pyfuse3 session, and on kernels that cannot send requests again. Files that were open on the
dead mount are lost; names work again.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from typing import Final

from unionfs.core.state import State, StateError
from unionfs.daemon import logs
from unionfs.daemon.clearing import clear_dead_mounts
from unionfs.daemon.holder import Holder, close_others
from unionfs.daemon.live import LiveMount
from unionfs.daemon.runtime import RuntimeDirectory
from unionfs.daemon.service import Service
from unionfs.errors import UserError
from unionfs.settings.mount import MountSettings
from unionfs.settings.specs import VolumeSpec
from unionfs.sys.mountinfo import mounts_of_device
from unionfs.sys.process import wait_gone

_GUARDIAN_SECONDS: Final = 30.0
"""How long the guardian of a dead daemon may take to release its storage."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeadDaemon:
    """What a daemon has kept for this."""

    why: str
    """Why no other daemon can go on with its mount, as a clause."""
    entry: LiveMount
    taken_off: bool
    """Whether its mount was unmounted by a daemon that could not mount anew."""


def dead_daemon(state: State) -> DeadDaemon | None:
    """What a daemon has kept whose union must be mounted anew; None if its mount goes on.

    Raises StateError.
    """
    try:
        values = json.loads(state.text)
        if "anew" not in values:
            return None
        entry = LiveMount.from_json(values["entry"], values["directory"])
        return DeadDaemon(str(values["anew"]), entry, bool(values.get("taken_off")))
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(f"its text cannot be read ({type(error).__name__}: {error})") from error


def mount_anew(state: State, dead: DeadDaemon) -> int:
    """Mount and serve until the mount is gone; returns the exit code."""
    close_others({state.fd})
    entry, holder = dead.entry, Holder(state, stays=True)
    with RuntimeDirectory(entry.directory) as directory:
        logs.to_host(entry.settings.log_level, directory, entry.settings.mountpoint)
        deaths, too_often = state.died
        if too_often:
            log.critical("daemon %d died, one too many within a minute: it stays dead", entry.pid)
            return 1
        if not dead.taken_off:
            if not _take_off(entry):
                log.info("daemon %d ended, and its mount was unmounted", entry.pid)
                state.end()
                return 0
            holder.keep({**json.loads(state.text), "taken_off": True})
        text = "daemon %d ended (deaths: %d); the union is mounted anew: %s"
        log.warning(text, entry.pid, deaths, dead.why)
        try:
            service = Service(
                _settings(entry), directory, lambda: None, None, foreground=False, holder=holder
            )
            return 0 if service.run() else 1
        except UserError as error:
            log.error("the union could not be mounted anew: %s", error)
            return 1


def _take_off(entry: LiveMount) -> bool:
    """Unmount the dead mount. Returns False if somebody else has."""
    if entry.guardian is not None:  # it does that
        wait_gone(*entry.guardian, _GUARDIAN_SECONDS)
    elif not any(one.mountpoint == entry.settings.mountpoint for one in mounts_of_device(entry.device)):
        return False
    clear_dead_mounts(entry.device)
    entry.remove()
    return True


def _settings(entry: LiveMount) -> MountSettings:
    """The settings of the dead mount. If mounting fails, its anonymous volumes stay."""
    storage = tuple(
        replace(spec, anonymous=False) if isinstance(spec, VolumeSpec) else spec
        for spec in entry.settings.storage
    )
    return replace(entry.settings, storage=storage)
