"""Mounts as users of volumes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from unionfs.errors import UserError, quoted
from unionfs.settings.mount import MountSettings
from unionfs.settings.names import anonymous_name
from unionfs.settings.specs import Spec, VolumeSpec
from unionfs.storage.model import VolumeUser
from unionfs.storage.volumes import Volumes

log = logging.getLogger(__name__)


def with_names(specs: Sequence[Spec]) -> tuple[Spec, ...]:
    """The specs with names for anonymous volumes, chosen before creation so that `release` knows them."""
    return tuple(
        replace(spec, name=anonymous_name()) if isinstance(spec, VolumeSpec) and spec.name is None else spec
        for spec in specs
    )


def user_of(settings: MountSettings, pid: int, started: int) -> str:
    """The text of a mount as a user of its volumes until a process ends: its daemon, or one that stays."""
    return VolumeUser.of_process("mount", pid, started, settings.mountpoint)


def hold(settings: MountSettings, user: str) -> None:
    """Make it a user of every volume of a mount, which must exist. Raises UserError."""
    volumes = Volumes(settings.storage_root)
    for spec in settings.storage:
        if isinstance(spec, VolumeSpec) and spec.name is not None:
            volumes.attach(spec.name, user)


def release(settings: MountSettings, user: str) -> None:
    """Release every volume of a mount, last first."""
    volumes = Volumes(settings.storage_root)
    for spec in reversed(settings.storage):
        if isinstance(spec, VolumeSpec) and spec.name is not None:
            try:
                volumes.detach(spec.name, user)
            except (UserError, OSError) as error:
                log.warning("volume %s could not be released: %s", quoted(spec.name), error)
