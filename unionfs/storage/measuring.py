"""The space that things of a storage root take, and whether something uses them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Use:
    name: str
    size: int
    """Bytes on this host."""
    active: bool


def uses(root: str) -> list[Use]:
    """The volumes. Raises UserError."""
    # start-up time: commands on containers need `Use` alone
    from unionfs.storage.usage import reclaimable
    from unionfs.storage.volumes import Volumes

    volumes = Volumes(root)
    users = volumes.all_users()
    return [Use(volume.name, reclaimable(volume), volume.name in users) for volume in volumes.all()]
