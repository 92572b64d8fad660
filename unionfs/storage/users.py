"""Who uses a volume: the text that names a mount as its user, and giving volumes back."""

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
    """The specs with names for anonymous volumes, known before they are made to whoever gives them back."""
    return tuple(
        replace(spec, name=anonymous_name()) if isinstance(spec, VolumeSpec) and spec.name is None else spec
        for spec in specs
    )


def user_of(mountpoint: str, pid: int | None = None, started: int | None = None) -> str:
    """The user that a mount is: mount:PID:STARTTIME:MOUNTPOINT, of this process unless another is named."""
    if pid is None:
        pid = os.getpid()
        started = start_time(pid)
    return f"mount:{pid}:{started or 0}:{mountpoint}"


def release(settings: MountSettings, user: str) -> None:
    """Give back every volume of a mount, last first."""
    volumes = Volumes(settings.storage_root)
    for spec in reversed(settings.storage):
        if isinstance(spec, VolumeSpec) and spec.name is not None:
            try:
                volumes.detach(spec.name, user)
            except (UserError, OSError) as error:
                log.warning("volume %s could not be given back: %s", quoted(spec.name), error)
