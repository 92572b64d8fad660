"""The work directory, where changes of the upper are prepared, and the renames that put them in place.

Each rename is atomic where the upper's filesystem supports the flags of renameat2(2). NFS and others refuse
them with EINVAL (fs/nfs/dir.c, nfs_rename) and need two or three steps, each with complete objects. No
request is answered between them, but if the daemon or the server dies there, a removed or replaced name of a
lower may reappear, and a renamed file may have both names.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Final

from unionfs.core.steps import Workplace
from unionfs.sys import calls
from unionfs.sys.trees import remove
from unionfs.union.rights import At as At
from unionfs.union.rights import Rights

NO_FLAGS: Final = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
NOT_EMPTY: Final = (errno.ENOTEMPTY, errno.EEXIST)
_NO_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)
#: The number of leftovers that each discard retries: there may be thousands.
_AGAIN: Final = 4


class Work(Workplace):
    """The work directory ``fd`` of one union."""

    def __init__(self, fd: int, rights: Rights) -> None:
        """``rights``: for changes that permission bits deny to their owner."""
        super().__init__(fd)
        self.rights = rights
        #: Temporaries that could not be removed yet.
        self._left: list[bytes] = []

    def temporary(self) -> Temporary:
        """A new name in work."""
        return Temporary(self, self.next_name())

    def discard(self, name: bytes) -> None:
        """Remove that name and everything below it from work. Ignores a missing name.

        Later calls, :meth:`close` and the next mount retry after a failure: on NFS a directory stays while a
        removed file in it is in use (EBUSY).
        """
        again = self._left[:_AGAIN]
        del self._left[:_AGAIN]
        for one in (name, *again):
            try:
                self._remove(one)
            except OSError:
                self._left.append(one)

    def close(self) -> None:
        """Remove what could not be removed yet, and close what it has opened."""
        for name in self._left:
            with suppress(OSError):
                self._remove(name)
        super().close()

    def _remove(self, name: bytes) -> None:
        with suppress(FileNotFoundError):
            try:
                os.unlink(name, dir_fd=self.fd)
            except IsADirectoryError:
                try:
                    os.rmdir(name, dir_fd=self.fd)
                except OSError:
                    remove(self.fd, name)

    def exchange(self, one: At, other: At) -> None:
        """Exchange two names; see :func:`exchange_in_steps`."""
        aside = self.temporary().at
        try:
            exchange_in_steps(one, other, aside)
        except PermissionError as error:
            self.rights.again(partial(exchange_in_steps, one, other, aside), error, one, other)

    def rename_leaving(self, whiteout: At, old: At, new: At, *, directory: bool, occupied: bool) -> None:
        """Rename ``old`` to ``new``, and ``whiteout`` (in work) to ``old``.

        ``directory``: ``old`` is a directory. ``occupied``: ``new`` exists.
        """
        try:
            if occupied:
                calls.renameat2(*old, *new, calls.RENAME_EXCHANGE)
                try:
                    calls.renameat2(*whiteout, *old, calls.RENAME_EXCHANGE)
                except BaseException:
                    calls.renameat2(*old, *new, calls.RENAME_EXCHANGE)
                    raise
                return
            calls.renameat2(*whiteout, *new, calls.RENAME_NOREPLACE)
            # ext2, jfs and others support this flag but not RENAME_EXCHANGE
            with _undone_by(new, whiteout):
                calls.renameat2(*old, *new, calls.RENAME_EXCHANGE)
        except OSError as error:
            if error.errno not in NO_FLAGS:
                raise
            if directory or not self._linked_leaving(whiteout, old, new, occupied=occupied):
                rename(old, new)
                with _undone_by(new, old):
                    rename(whiteout, old)

    def _linked_leaving(self, whiteout: At, old: At, new: At, *, occupied: bool) -> bool:
        """The same by hard links, so that a file always has a name; False if it cannot be linked."""
        with self.temporary() as second, self.temporary() as replaced:
            try:
                _link(old, second.at)
                if occupied:
                    _link(new, replaced.at)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return False
            rename(second.at, new)
            with _undone_by(replaced.at, new) if occupied else _undone_by(new, second.at):
                rename(whiteout, old)
            return True


class Temporary:
    """A name in work. Leaving its context discards it unless it was put in place."""

    __slots__ = ("_work", "at", "name", "taken")

    def __init__(self, work: Work, name: bytes) -> None:
        self._work = work
        self.name = name
        self.at: At = work.fd, name
        #: Whether it was neither put in place nor discarded.
        self.taken = True

    def __enter__(self) -> Temporary:
        return self

    def __exit__(self, *exc: object) -> None:
        self.discard()

    def mkdir(self) -> int:
        """Make it a directory that only the daemon may use. Returns a readable fd for the caller to close."""
        os.mkdir(self.name, 0o700, dir_fd=self._work.fd)
        return os.open(self.name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._work.fd)

    def put(self, dir_fd: int, name: bytes) -> None:
        """Rename it into the upper, as rename(2) does."""
        try:
            os.rename(self.name, name, src_dir_fd=self._work.fd, dst_dir_fd=dir_fd)
        except PermissionError as error:
            new = dir_fd, name
            self._work.rights.again(partial(rename, self.at, new), error, self.at, new)
        self.taken = False

    def take(self, dir_fd: int, name: bytes) -> None:
        """Rename a name of the upper to it, as rename(2) does."""
        old = dir_fd, name
        try:
            rename(old, self.at)
        except PermissionError as error:
            self._work.rights.again(partial(rename, old, self.at), error, old)

    def discard(self) -> None:
        """Remove it unless it was put in place."""
        if self.taken:
            self.taken = False
            self._work.discard(self.name)


def exchange_in_steps(one: At, other: At, aside: At) -> None:
    """Exchange two names. In three steps, if necessary, ``other``, which is missing for the shorter time, is
    moved to ``aside``. After an ``OSError`` both are unchanged."""
    try:
        calls.renameat2(*one, *other, calls.RENAME_EXCHANGE)
        return
    except OSError as error:
        if error.errno not in NO_FLAGS:
            raise
    rename(other, aside)
    with _undone_by(aside, other):
        rename(one, other)
        with _undone_by(other, one):
            rename(aside, one)


@contextmanager
def _undone_by(now: At, before: At) -> Iterator[None]:
    """Rename ``now`` to ``before`` if the context fails."""
    try:
        yield
    except BaseException:
        rename(now, before)
        raise


def rename(old: At, new: At) -> None:
    """rename(2)."""
    os.rename(old[1], new[1], src_dir_fd=old[0], dst_dir_fd=new[0])


def _link(old: At, new: At) -> None:
    os.link(old[1], new[1], src_dir_fd=old[0], dst_dir_fd=new[0], follow_symlinks=False)
