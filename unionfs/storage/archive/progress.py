"""How far a long operation is: entries and bytes, and the share of the whole as soon as that is known."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Final, TextIO

_Input = tuple[int, Callable[[], int]]
_SECONDS = 0.1
"""Between two calls of `show`."""


class Progress:
    """Called from time to time with the entries and bytes so far; a subclass shows them in `show`."""

    def __init__(self) -> None:
        self.entries = 0
        self.size = 0
        self._next_call = 0.0
        self._total: int | None = None
        self._inputs: dict[int, _Input] = {}
        self._expected = 0

    def __call__(self, entries: int, size: int) -> None:
        self.entries, self.size = entries, size
        if (now := time.monotonic()) >= self._next_call:
            self._next_call = now + _SECONDS
            self.show()

    def along(self, pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        """Count the bytes of one file's pieces while they pass."""
        told, size = self.within(), 0
        for offset, data in pieces:
            yield offset, data
            size += len(data)
            told(size)

    def within(self) -> Callable[[int], None]:
        """Return what is called with the bytes of one file so far."""
        entries, before = self.entries, self.size
        return lambda size: self(entries, before + size)

    def show(self) -> None:
        pass

    def reads_tree(self, path: str) -> None:
        """Measure the tree that is read, in a thread: the operation does not wait for it."""

        # For start-up time: most progress is of files.
        from unionfs.storage.usage import size_of_tree

        self.measures(lambda: size_of_tree(path))

    def measures(self, size: Callable[[], int]) -> None:
        """Call what measures all that is read, in a thread."""

        def measure() -> None:
            with suppress(OSError):
                self._total = size()

        threading.Thread(target=measure, name="measurement", daemon=True).start()

    def reads_file(self, fd: int) -> None:
        """Count a file that is read, as long as it is open."""
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            self._inputs[fd] = status.st_size, partial(_position, fd, status.st_size)

    def reads(self, size: int, position: Callable[[], int]) -> None:
        """Count an input of `size` bytes, of which `position` says how many were read."""
        self._inputs[-1 - len(self._inputs)] = size, position

    def expects(self, size: int) -> None:
        """Set the bytes of all inputs together, also of those to come."""
        self._expected = size

    @property
    def share(self) -> float | None:
        """The share of the work that is done, 0 to 1; None if it is not known."""
        if self._inputs:
            at = sum(position() for _, position in self._inputs.values())
            whole = max(sum(size for size, _ in self._inputs.values()), self._expected, 1)
            return min(at / whole, 1.0)
        return None if not self._total else min(self.size / self._total, 1.0)


class _Unseen(Progress):
    """Shown to nobody: neither counts nor measures."""

    def __call__(self, entries: int, size: int) -> None:
        pass

    def along(self, pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        return iter(pieces)

    def measures(self, size: Callable[[], int]) -> None:
        pass

    def reads_file(self, fd: int) -> None:
        pass

    def reads(self, size: int, position: Callable[[], int]) -> None:
        pass


UNSEEN: Final[Progress] = _Unseen()


def _position(fd: int, size: int) -> int:
    try:
        return os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        return size


Shows = Callable[[str, TextIO], AbstractContextManager[Progress]]
"""Shows on a stream how far the operation is that is named."""

Shown = Callable[[str], AbstractContextManager[Progress]]
"""Shows how far the operation is that is named, if anybody looks; else the progress is UNSEEN."""


def unseen(what: str) -> AbstractContextManager[Progress]:
    """Show nothing: a `Shown`."""
    return nullcontext(UNSEEN)
