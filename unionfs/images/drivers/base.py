"""The interface of storage drivers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from unionfs.settings.specs import Spec
from unionfs.storage.measuring import Use


@dataclass(frozen=True, slots=True)
class Writable:
    """The writable layer of one container, and what lies below it."""

    path: str
    """The container's directory, ROOT/containers/NAME; its driver keeps there what belongs to it alone."""
    root: str
    """The storage root."""
    lowers: tuple[str, ...] = ()
    """Topmost first: directories or images."""

    @property
    def merged(self) -> str:
        """The mountpoint, an empty directory."""
        return f"{self.path}/merged"


@dataclass(frozen=True, slots=True)
class Wanted:
    """How a root filesystem is to be mounted."""

    storage: Sequence[Spec] = ()
    """Volumes, bind mounts and tmpfs; anonymous volumes have names."""
    volatile: bool = False
    """Whether changes need not reach a disk."""
    upper: str | None = None
    """An upper of the caller's own, or `tmpfs:...`, in place of the container's: of the driver union only."""
    work: str | None = None


class Mounted(Protocol):
    """A mounted root filesystem with its storage."""

    @property
    def path(self) -> str:
        """Where its root directory is."""

    @property
    def storage(self) -> Sequence[Spec]:
        """The storage with its real targets."""

    def is_alive(self) -> bool:
        """Whether it still is mounted."""

    def unmount(self) -> None:
        """Unmount it, however it is used, and release its storage. Raises UserError."""

    def abandon(self) -> None:
        """The same in a child of a process that was killed; reports no error."""


class Driver(ABC):
    """What a container's root filesystem is made of. `layer` is its writable layer.

    Before `create` the container's directory has the empty directory `merged`. All methods raise UserError,
    and OSError where a file cannot be read.
    """

    name: ClassVar[str]

    def __init__(self, root: str) -> None:
        self.root = root

    @abstractmethod
    def check(self) -> None:
        """Refuse a host that lacks what the driver needs, with the cause and the cure. Changes nothing."""

    @abstractmethod
    def create(self, layer: Writable) -> None:
        """Make the writable layer, unless it exists. What a killed process left half-done is made again."""

    @abstractmethod
    def mount(self, layer: Writable, wanted: Wanted) -> Mounted:
        """Mount the layer over its lowers; call it in a process with one thread."""

    @abstractmethod
    def diff(self, layer: Writable) -> Iterator[tuple[str, bytes]]:
        """Yield the changes: A, C or D, and the path; sorted by path."""

    @abstractmethod
    def size(self, layer: Writable) -> int:
        """The bytes of the changes on this host."""

    def remove(self, layer: Writable) -> None:  # noqa: B027 - some drivers have nothing to remove
        """Remove what belongs to the layer but is not a file below its directory; the caller removes that
        directory afterwards. Called again after a failure, it removes the rest.
        """

    def shared(self) -> list[Use]:
        """What containers of this driver share: the bases, and whether a container uses them."""
        return []

    def prune(self) -> list[str]:
        """Remove the bases that no container uses, and return their names."""
        return []
