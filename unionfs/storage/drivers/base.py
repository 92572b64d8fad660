"""The interface of a volume driver, and how new content gets into a volume all at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from unionfs.errors import UserError, quoted
from unionfs.storage.model import Volume


class Replacement(Protocol):
    """A place for a volume's new content, beside the old."""

    @property
    def path(self) -> str:
        """An empty directory, which is to get the attributes of the volume's root too."""

    def commit(self) -> None:
        """Put the new content in the old one's place. What is in `path` must be on disk."""


class Driver:
    """One way to keep volumes. A subclass sets `name` and `known_options`, and does what is its own.

    Every method may raise UserError with a full sentence. They are called under the volume's lock, so never
    twice at once for one volume. A driver keeps what it needs in `volume.directory`, and nothing in memory:
    the next call may come from another process. A call that finds its work already done (a mount that is
    there, a directory that is gone) is content: the process before it may have been killed half-way.
    """

    name: str = ""
    scope: str = "local"
    """`global` when the same volume is seen from every host."""
    known_options: Mapping[str, str] = {}
    """The options a volume may have, with a line about each."""

    def hurried(self) -> Driver:
        """The same driver for a caller that waits some seconds at most, even if the storage needs longer."""
        return self

    def check(self, options: Mapping[str, str]) -> None:
        """Refuse options that are unknown or make no sense together. Nothing is made yet."""
        for key in options:
            if key not in self.known_options:
                known = ", ".join(self.known_options) or "none"
                raise UserError(
                    f"volume option {quoted(key)} is not known to the driver {self.name}; its options are: "
                    f"{known}."
                )

    def one_mount_each(self, volume: Volume) -> bool:
        """Whether every user gets a mount of his own; else the first user mounts and the last one
        unmounts.
        """
        return False

    def create(self, volume: Volume) -> None:
        """Make what the volume needs. `volume.directory` is there and empty, and becomes ROOT/volumes/NAME.

        Until this returns it has another name, so paths below it must not be kept.
        """

    def remove(self, volume: Volume) -> None:
        """Give up what lies outside `volume.directory`, which is removed afterwards."""

    def mountpoint(self, volume: Volume) -> str:
        """Where the data is when it is mounted; empty when only `mount` knows."""
        return f"{volume.directory}/_data"

    def mount(self, volume: Volume, user: str) -> str:
        """Make the data reachable, and return the directory's absolute path. Called for every user."""
        raise NotImplementedError

    def unmount(self, volume: Volume, user: str) -> None:
        """The reverse of `mount`, after the last user (after each one, with a mount each)."""

    def replacement(self, volume: Volume) -> AbstractContextManager[Replacement]:
        """A place for new content; leaving the context without `commit` leaves the old as it was.

        The volume is mounted for nobody but the caller meanwhile.
        """
        raise UserError(
            f"volume {quoted(volume.name)} cannot be restored: the driver {self.name} has no way to replace "
            "its content."
        )

    def restores_mounted(self, volume: Volume) -> bool:
        """Whether `replacement` works on the mounted volume; else it is called while the volume isn't
        mounted.
        """
        return False

    def check_clone(self, volume: Volume) -> None:
        """Refuse to make a second volume with the same options, where both would be the same storage."""

    def may_share(self, volume: Volume) -> str | None:
        """A directory on the same filesystem as the data and outside it, for reflinks; None: there is
        none.
        """
        return None

    def resize(self, volume: Volume, size: str, *, mounted: bool) -> Mapping[str, str]:
        """Give the volume another size; returns its options as they are then."""
        raise UserError(
            f"volume {quoted(volume.name)} cannot be resized: its driver {self.name} has no sizes."
        )

    def status(self, volume: Volume) -> Mapping[str, object]:
        """What `inspect` shows as Status; empty for nothing."""
        return {}


class Forced(Driver):
    """A driver for a volume that is given up: `tell` gets what it complains about, and nothing fails."""

    def __init__(self, driver: Driver, tell: Callable[[str], object]) -> None:
        self._driver = driver
        self._tell = tell

    def one_mount_each(self, volume: Volume) -> bool:
        return self._driver.one_mount_each(volume)

    def unmount(self, volume: Volume, user: str) -> None:
        try:
            self._driver.unmount(volume, user)
        except UserError as error:
            self._tell(str(error))

    def remove(self, volume: Volume) -> None:
        try:
            self._driver.remove(volume)
        except UserError as error:
            self._tell(str(error))
