"""The interface of a volume driver, including the atomic replacement of a volume's content."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from unionfs.errors import UserError, quoted
from unionfs.storage.model import Volume


class Replacement(Protocol):
    """A place for a volume's new content, beside the old content."""

    @property
    def path(self) -> str:
        """An empty directory; its content and attributes become those of the volume's root."""

    def commit(self) -> None:
        """Replace the old content with the new. The content of `path` must be on disk."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A `Replacement`: its path, and what `commit` does."""

    path: str
    commit: Callable[[], None]


class Driver:
    """A type of storage for volumes. A subclass sets `name` and `known_options`, and overrides methods.

    Every method may raise UserError with a full sentence. The caller holds the volume's lock, so methods
    never run concurrently for one volume. A driver stores its state in `volume.directory`, not in memory: the
    next call may come from another process. Completed work (an existing mount, a missing directory) is not an
    error: an earlier process may have been killed half-way.
    """

    name: str = ""
    scope: str = "local"
    """`global` if every host sees the same volume."""
    keeps_names_apart: bool = True
    """Whether the storage does not depend on the volume's name, which then can be changed."""
    known_options: Mapping[str, str] = {}
    """The valid options of a volume, with a line about each."""

    def hurried(self) -> Driver:
        """The same driver with a time limit of a few seconds, even if the storage takes longer."""
        return self

    def spelled_out(self, options: Mapping[str, str]) -> Mapping[str, str]:
        """The options without abbreviations, which are checked and recorded."""
        return options

    def check(self, options: Mapping[str, str]) -> None:
        """Refuse unknown or conflicting options, before anything is created."""
        for key in options:
            if key not in self.known_options:
                known = ", ".join(self.known_options) or "none"
                raise UserError(
                    f"volume option {quoted(key)} is not known to the driver {self.name}; its options are: "
                    f"{known}."
                )

    def one_mount_each(self, volume: Volume) -> bool:
        """Whether every user has a separate mount; else all share one, from the first user to the last."""
        return False

    def create(self, volume: Volume) -> None:
        """Create the volume's storage. `volume.directory` is empty and gets its final name afterwards, so
        paths below it must not be stored.
        """

    def remove(self, volume: Volume) -> None:
        """Release storage outside `volume.directory`, which the caller removes afterwards."""

    def mountpoint(self, volume: Volume) -> str:
        """The path of the mounted data; empty if only `mount` knows it."""
        return f"{volume.directory}/_data"

    def mount(self, volume: Volume, user: str) -> str:
        """Mount the data, and return its absolute path. Called for every user."""
        raise NotImplementedError

    def unmount(self, volume: Volume, user: str) -> None:
        """Undo `mount`, after the last user (after each user with `one_mount_each`)."""

    def replacement(self, volume: Volume) -> AbstractContextManager[Replacement]:
        """A place for new content. Without `commit` the old content stays unchanged.

        Until then the volume is mounted for the caller only.
        """
        raise UserError(
            f"volume {quoted(volume.name)} cannot be restored: the driver {self.name} does not support "
            "replacing its content."
        )

    def restores_mounted(self, volume: Volume) -> bool:
        """Whether `replacement` needs the volume mounted; else it needs it unmounted."""
        return False

    def check_clone(self, volume: Volume) -> None:
        """Refuse a clone whose options would make it the same storage as the original."""

    def may_share(self, volume: Volume) -> str | None:
        """A directory outside the data on the same filesystem, for reflinks; None if unsupported."""
        return None

    def resize(self, volume: Volume, size: str, *, mounted: bool) -> Mapping[str, str]:
        """Change the volume's size, and return its new options."""
        raise UserError(
            f"volume {quoted(volume.name)} cannot be resized: its driver {self.name} does not support sizes."
        )

    def status(self, volume: Volume) -> Mapping[str, object]:
        """The Status field of `inspect`, if any."""
        return {}


class Forced(Driver):
    """A driver for forced removal: reports failures to `tell` instead of raising them."""

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
