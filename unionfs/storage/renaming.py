"""Renames a volume."""

from __future__ import annotations

import os
from dataclasses import replace

from unionfs.errors import UserError, on_failure, quoted
from unionfs.settings.names import check_name
from unionfs.storage import locks, records
from unionfs.storage.drivers import find_driver
from unionfs.storage.model import Volume
from unionfs.storage.removing import refuse_bound, refuse_mounted
from unionfs.storage.volumes import Volumes
from unionfs.sys.fds import sync_directory


def rename(volumes: Volumes, old: str, new: str) -> Volume:
    """Give a volume that nothing uses another name. Raises UserError, having changed nothing.

    After a crash it has the old name or the new one, with its record.
    """
    check_name(new)
    complaint = f"volume {quoted(old)} cannot be renamed"
    with volumes.working_on(old, "a renaming") as volume, volumes.still(old, "renamed"):
        if volumes.exists(new):
            raise UserError(f"{complaint}: volume {quoted(new)} already exists; choose another name.")
        driver = find_driver(volume.driver)
        if not driver.keeps_names_apart:
            raise UserError(
                f"{complaint}: its driver {quoted(volume.driver)} knows it by that name; create another "
                "volume, and copy its content."
            )
        refuse_mounted(volume.directory, complaint)
        refuse_bound(volume.directory, complaint)
        place = f"{os.path.dirname(volume.directory)}/{new}"
        renamed = replace(volume, name=new, directory=place)
        renamed = replace(renamed, mountpoint=driver.mountpoint(renamed))
        with (
            locks.state(volumes.root, new),
            on_failure(f"{complaint} in {quoted(os.path.dirname(place))}", "check the permissions"),
            records.prepared(volume.directory, renamed),
        ):
            # An empty directory in the way would be replaced.
            if os.path.lexists(place):
                raise UserError(f"{complaint}: {quoted(place)} is in the way; move it away.")
            os.rename(volume.directory, place)
            sync_directory(os.path.dirname(place))
        records.settle(renamed)
        locks.forget(volumes.root, old)
    return renamed
