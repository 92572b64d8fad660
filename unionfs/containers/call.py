"""The call of a container runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from unionfs.containers.description import Description


@dataclass(frozen=True, slots=True)
class Bundle:
    """What an OCI runtime needs in the small root besides its program."""

    path: str
    """A directory in memory for `files`, where the runtime may write."""
    root: str
    """Where the union is once more: a runtime mounts over its root, and then no longer sees what is below."""
    files: Callable[[str | None], Mapping[str, bytes]]
    """Returns the files by name; gets the path of the container's terminal."""
    owner: tuple[int, int]
    """uid and gid of whom the runtime is."""
    privileged: bool
    """Whether the container gets the host's /dev and /sys."""


@dataclass(frozen=True, slots=True)
class Call:
    """A program that makes a container, and what it inherits."""

    title: str
    """Its name in messages."""
    program: str
    words: Sequence[str]
    fds: Sequence[int]
    bundle: Bundle | None = None
    """Of an OCI runtime, which gets `fds` as 3, 4 and so on, and starts a command in a session of its own."""


class Runtime(Protocol):
    """What makes containers."""

    @property
    def title(self) -> str: ...

    def call(self, container: Description, held: ExitStack, info: int, block: int | None) -> Call:
        """Return its call, with fds that `held` closes.

        The runtime reports on `info` when the container exists, and starts the command at the end of `block`.
        """
