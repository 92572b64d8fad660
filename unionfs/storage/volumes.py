"""Volumes as plain directories: ROOT/volumes/NAME/_data."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from unionfs.daemon.errors import UserError, quoted, reason
from unionfs.storage.names import anonymous_name, check_name
from unionfs.storage.root import make_directory


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume; `mountpoint` is its data directory, an absolute path."""

    name: str
    driver: str
    mountpoint: str
    anonymous: bool


class Volumes:
    """The volumes below one storage root."""

    def __init__(self, root: str) -> None:
        self.root = root

    def ensure(
        self,
        name: str | None,
        *,
        driver: str = "local",
        options: Mapping[str, str] = {},
        anonymous: bool = False,
    ) -> Volume:
        """The volume of that name, made if it is missing; a new anonymous one for None. Raises UserError."""
        if driver != "local":
            raise UserError(
                f"volume driver {quoted(driver)} is not known; leave volume-driver out, or write local."
            )
        if options:
            raise UserError(
                f"volume option {quoted(next(iter(options)))} is not known to the driver local; leave it out."
            )
        name = anonymous_name() if name is None else check_name(name)
        data = self._data(name)
        if not os.path.isdir(data):
            make_directory(os.path.dirname(data))
            try:
                os.mkdir(data, 0o755)
                os.chmod(data, 0o755)  # whatever the umask
            except FileExistsError:
                pass
            except OSError as error:
                raise UserError(
                    f"volume {quoted(name)} cannot be made in {quoted(self.root)}: {reason(error)}; give "
                    "another storage root."
                ) from error
        return Volume(name, driver, data, anonymous)

    def attach(self, name: str, user: str) -> str:
        """The data directory of a volume that `user` uses from now on. Raises UserError."""
        data = self._data(name)
        if not os.path.isdir(data):
            raise UserError(f"volume {quoted(name)} is gone from {quoted(self.root)}; make it anew.")
        return data

    def detach(self, name: str, user: str) -> None:
        """`user` uses the volume no more."""

    def remove(self, name: str, *, force: bool = False) -> bool:
        """Remove a volume and its data. False: it is not there, with `force`. Raises UserError."""
        directory = os.path.dirname(self._data(name))
        if not os.path.isdir(directory):
            if force:
                return False
            raise UserError(f"there is no volume {quoted(name)} in {quoted(self.root)}; check the name.")
        shutil.rmtree(directory)
        return True

    def _data(self, name: str) -> str:
        return os.path.join(self.root, "volumes", check_name(name), "_data")
