"""Exchanging names and leaving whiteouts where the upper's filesystem knows neither, as on NFS.

renameat2(2) with flags is EINVAL there (fs/nfs/dir.c, nfs_rename). What is one step elsewhere then takes two
or three, all with complete objects that were prepared in work. The union's users never see the state between,
since nothing else is answered meanwhile; but when the daemon or the server dies in it, a name of a lower that
was removed or replaced may be seen again, and a file that was renamed may have both names.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from unionfs.sys import calls

NO_FLAGS: Final = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_NO_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)

#: A context manager that gives a name in work, and removes what it stands for at the end.
Temporary = Callable[[], contextlib.AbstractContextManager[bytes]]


def exchange(
    temporary: Temporary, work: int, one_fd: int, one: bytes, other_fd: int, other: bytes
) -> None:
    """Exchange what ``one`` and ``other`` stand for; ``other`` is the name that is missing for the shortest.

    Both are as they were when it raises.
    """
    try:
        calls.renameat2(one_fd, one, other_fd, other, calls.RENAME_EXCHANGE)
        return
    except OSError as error:
        if error.errno not in NO_FLAGS:
            raise
    with temporary() as aside:
        os.rename(other, aside, src_dir_fd=other_fd, dst_dir_fd=work)
        with _undone_by(aside, work, other, other_fd):
            os.rename(one, other, src_dir_fd=one_fd, dst_dir_fd=other_fd)
            with _undone_by(other, other_fd, one, one_fd):
                os.rename(aside, one, src_dir_fd=work, dst_dir_fd=one_fd)


@contextmanager
def _undone_by(name: bytes, fd: int, before: bytes, before_fd: int) -> Iterator[None]:
    """Rename back when the block fails."""
    try:
        yield
    except BaseException:
        os.rename(name, before, src_dir_fd=fd, dst_dir_fd=before_fd)
        raise


def rename_leaving(
    temporary: Temporary,
    work: int,
    whiteout: bytes,
    old: tuple[int, bytes],
    new: tuple[int, bytes],
    *,
    directory: bool,
    occupied: bool,
) -> None:
    """Rename ``old`` (directory fd, name) to ``new``, and put the whiteout in work in its place.

    ``occupied``: there is something at ``new``. Where the filesystem has RENAME_EXCHANGE, that is enough.
    """
    (old_fd, old_name), (new_fd, new_name) = old, new
    try:
        if occupied:
            calls.renameat2(old_fd, old_name, new_fd, new_name, calls.RENAME_EXCHANGE)
            try:
                calls.renameat2(work, whiteout, old_fd, old_name, calls.RENAME_EXCHANGE)
            except BaseException:
                calls.renameat2(old_fd, old_name, new_fd, new_name, calls.RENAME_EXCHANGE)
                raise
            return
        calls.renameat2(work, whiteout, new_fd, new_name, calls.RENAME_NOREPLACE)
        # ext2, jfs and others have this flag but no RENAME_EXCHANGE
        with _undone_by(new_name, new_fd, whiteout, work):
            calls.renameat2(old_fd, old_name, new_fd, new_name, calls.RENAME_EXCHANGE)
    except OSError as error:
        if error.errno not in NO_FLAGS:
            raise
        _rename_leaving_in_steps(temporary, work, whiteout, old, new, directory=directory, occupied=occupied)


def _rename_leaving_in_steps(
    temporary: Temporary,
    work: int,
    whiteout: bytes,
    old: tuple[int, bytes],
    new: tuple[int, bytes],
    *,
    directory: bool,
    occupied: bool,
) -> None:
    """A file has both names in between, so that it is never missing; a directory has none for a moment.

    All is as it was when it raises, but for an empty directory or a file that cannot be linked at ``new``.
    """
    (old_fd, old_name), (new_fd, new_name) = old, new
    if not directory:
        with temporary() as second, temporary() as replaced:
            try:
                os.link(old_name, second, src_dir_fd=old_fd, dst_dir_fd=work, follow_symlinks=False)
                if occupied:
                    os.link(new_name, replaced, src_dir_fd=new_fd, dst_dir_fd=work, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
            else:
                os.rename(second, new_name, src_dir_fd=work, dst_dir_fd=new_fd)
                undone = (replaced, work, new_name, new_fd) if occupied else (new_name, new_fd, second, work)
                with _undone_by(*undone):
                    os.rename(whiteout, old_name, src_dir_fd=work, dst_dir_fd=old_fd)
                return
    os.rename(old_name, new_name, src_dir_fd=old_fd, dst_dir_fd=new_fd)
    with _undone_by(new_name, new_fd, old_name, old_fd):
        os.rename(whiteout, old_name, src_dir_fd=work, dst_dir_fd=old_fd)
