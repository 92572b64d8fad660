"""Users of volumes: the text that names a mount as a user, and the release of its volumes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace

from unionfs.errors import UserError, quoted
from unionfs.settings.mount import MountSettings
from unionfs.settings.names import anonymous_name
from unionfs.settings.specs import Spec, VolumeSpec
from unionfs.storage.volumes import Volumes
from unionfs.sys.process import start_time

log = logging.getLogger(__name__)


def with_names(specs: Sequence[Spec]) -> tuple[Spec, ...]:
    """The specs with names for anonymous volumes, chosen before creation so that `release` knows them."""
    return tuple(
        replace(spec, name=anonymous_name()) if isinstance(spec, VolumeSpec) and spec.name is None else spec
        for spec in specs
    )


def user_of(mountpoint: str, pid: int | None = None, started: int | None = None) -> str:
    """The text mount:PID:STARTTIME:MOUNTPOINT for a mount, of this process by default."""
    if pid is None:
        pid = os.getpid()
        started = start_time(pid)
    return f"mount:{pid}:{started or 0}:{mountpoint}"


def release(settings: MountSettings, user: str) -> None:
    """Release every volume of a mount, last first."""
    volumes = Volumes(settings.storage_root)
    for spec in reversed(settings.storage):
        if isinstance(spec, VolumeSpec) and spec.name is not None:
            try:
                volumes.detach(spec.name, user)
            except (UserError, OSError) as error:
                log.warning("volume %s could not be given back: %s", quoted(spec.name), error)
