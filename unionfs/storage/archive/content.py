"""The content of files that may change during the read: as of one moment where possible, else read again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

from unionfs.storage.archive.entry import FILE, SPARSE, Entry
from unionfs.storage.archive.walk import Walker, sparse_segments
from unionfs.sys.calls import clone_file
from unionfs.sys.fds import Owned

SMALL = 256 << 10
"""A file of up to this size (bytes) is read at once."""
_CHUNK = 1 << 20
_TRIES = 3
_ZEROS = bytes(_CHUNK)


class Contents:
    """Reads the files of a walk.

    `unstable` is called with each file that changed during every attempt. `scratch` is a directory on the
    tree's filesystem for clones of files (reflinks).
    """

    def __init__(
        self, walker: Walker, unstable: Callable[[Entry], None], *, scratch: str | None = None
    ) -> None:
        self._walker = walker
        self._unstable = unstable
        self._scratch = scratch

    def small(self, entry: Entry, fd: int) -> tuple[Entry, bytes | None]:
        """A file's content with matching attributes; None if the file is no longer small."""
        for left in range(_TRIES, -1, -1):
            data = os.pread(fd, entry.size + 1, 0) if entry.size else b""
            while 0 < len(data) < entry.size and (
                more := os.pread(fd, entry.size - len(data), len(data))
            ):
                data += more
            if len(data) == entry.size and is_unchanged(entry, fd):
                return entry, data
            if not left:
                break
            entry = self._again(entry, fd)
            if entry.kind != FILE or entry.size > SMALL:
                return entry, None
        self._unstable(entry)
        return entry, data[: entry.size].ljust(entry.size, b"\0")

    def attempts(self, entry: Entry, fd: int) -> Iterator[tuple[Entry, int]]:
        """Yield the file's attributes and an fd to read it, again while it changes; the last attempt counts.

        The change is detected when the caller requests the next attempt.
        """
        for left in range(_TRIES, -1, -1):
            if (clone := self._clone(entry, fd)) is not None:
                with Owned(clone[1]):
                    yield clone
                return
            yield entry, fd
            if is_unchanged(entry, fd):
                return
            if left:
                entry = self._again(entry, fd)
        self._unstable(entry)

    def _again(self, entry: Entry, fd: int) -> Entry:
        status = os.fstat(fd)
        again = self._walker.file_entry(fd, entry.path, status)
        if again.kind in (FILE, SPARSE):
            return again
        # The file got a second name, which becomes the link.
        return again._replace(kind=FILE, link=b"", size=status.st_size, xattrs=entry.xattrs)

    def _clone(self, entry: Entry, fd: int) -> tuple[Entry, int] | None:
        """A clone of the file and its attributes as of the same moment; None if cloning is impossible."""
        if self._scratch is None:
            return None
        try:
            clone = os.open(self._scratch, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:
            self._scratch = None
            return None
        try:
            for _ in range(_TRIES):
                clone_file(clone, fd)
                status = os.fstat(fd)
                if status.st_size == os.fstat(clone).st_size:
                    segments = sparse_segments(clone, status.st_size) if entry.kind == SPARSE else ()
                    return entry._replace(
                        kind=SPARSE if segments else FILE, segments=segments, size=status.st_size,
                        mtime=status.st_mtime_ns, ctime=status.st_ctime_ns,
                    ), clone  # fmt: skip
                os.ftruncate(clone, 0)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                self._scratch = None  # no reflinks here
        os.close(clone)
        return None


def is_unchanged(entry: Entry, fd: int) -> bool:
    status = os.fstat(fd)
    return (status.st_mtime_ns, status.st_ctime_ns, status.st_size) == (entry.mtime, entry.ctime, entry.size)


def pieces(entry: Entry, fd: int) -> Iterator[tuple[int, bytes]]:
    """(offset, data) of exactly the bytes that the entry declares; missing bytes are zeros."""
    for offset, length in entry.segments if entry.kind == SPARSE else ((0, entry.size),):
        end = offset + length
        while offset < end:
            size = min(end - offset, _CHUNK)
            data = os.pread(fd, size, offset) or _ZEROS[:size]
            yield offset, data
            offset += len(data)
