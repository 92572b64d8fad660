"""Owners of file descriptors."""

from __future__ import annotations

import os
from types import TracebackType


class Owned:
    """Closes an fd at the end of a `with` block, which gets its number."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> int:
        return self._fd

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)


def directory(path: str) -> Owned:
    """A directory, opened for reading. Raises OSError."""
    return Owned(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
