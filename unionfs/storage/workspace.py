"""Prepares new content inside the volume itself, where other users may write too.

    DATA/.unionfs-XXXXXXXXXXXXXXXX/new                the new content
    DATA/.unionfs-XXXXXXXXXXXXXXXX/old                the content it replaces
    ROOT/volumes/NAME/.unionfs-XXXXXXXXXXXXXXXX.json  the workspace's record, with the journal

The name is random, and only this user can enter the directory. The remaining steps come from the record
alone, never from files in a volume. After a crash the next use of the volume removes the workspace, or
finishes an exchange that has begun.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from unionfs.errors import UserError, on_failure, quoted, reason
from unionfs.storage.model import VolumeUser
from unionfs.storage.workspace_record import Journal, Record, forget, names, read, write
from unionfs.sys import attributes
from unionfs.sys.calls import FUSE_MAGIC, NFS_MAGIC, filesystem_magic
from unionfs.sys.fds import Owned, directory, names_in
from unionfs.sys.openat2 import RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, openat2
from unionfs.sys.trees import empty_directory, find_locked

__all__ = ["Workspace", "names", "recover", "workspace"]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_WITHIN = RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS
_TRIES = 100


class Workspace:
    """A workspace whose new content is incomplete."""

    def __init__(
        self, home: str, root: int, fd: int, new: int, record: Record, settle: Callable[[], None] | None
    ) -> None:
        self._home = home
        self._root = root
        self._fd = fd
        self._record = record
        self._settle = settle
        self.new = new
        """An fd of the empty directory for the new content; the volume's root takes over its attributes."""
        self.committed = False

    @property
    def path(self) -> str:
        """The same directory as a path that a rename cannot redirect."""
        return f"/proc/self/fd/{self.new}"

    def commit(self, *, keep: bool = False) -> None:
        """Put the new content in the volume: in place of the old content, or with `keep` beside it.

        `new` must be on disk. Raises UserError and OSError, nearly always with nothing changed.
        """
        if self._settle is not None:
            self._settle()
        ours = names(self._home)
        old = [] if keep else [name for name in names_in(self._root) if os.fsencode(name) not in ours]
        _refuse_immovable(self._root, old)
        status = os.fstat(self.new)
        xattrs = attributes.read_xattrs(self.new, lambda name: True, _leave_out)
        journal = Journal(
            old, names_in(self.new), stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid,
            status.st_mtime_ns, {os.fsdecode(name): value.hex() for name, value in xattrs.items()},
        )  # fmt: skip
        record = replace(self._record, journal=journal)
        write(self._home, record)
        self.committed = True
        with on_failure(
            "only a part of the volume's new content is in its place",
            "stop whatever changes the volume; its next use finishes the replacement",
        ):
            _finish(self._home, self._root, self._fd, record)


@contextmanager
def workspace(
    home: str, root: int, kind: str, settle: Callable[[], None] | None = None
) -> Iterator[Workspace]:
    """A new workspace for a `kind` of work ("restore") in the volume's root, an fd.

    `home` is ROOT/volumes/NAME. `settle` is called before the exchange, and may wait until all written files
    can be renamed. Raises OSError, and UserError when another user interferes.
    """
    record = Record(f".unionfs-{os.urandom(8).hex()}", VolumeUser.of_this_process(kind))
    write(home, record)
    try:
        os.mkdir(record.name, 0o700, dir_fd=root)
        opened = Owned(openat2(root, os.fsencode(record.name), _DIRECTORY, _WITHIN))
    except BaseException:
        forget(home, record)
        raise
    with opened as fd:
        place: Workspace | None = None
        try:
            record = _claim(root, fd, record)
            write(home, record)
            with Owned(_make_inner(fd, "new")) as new:
                place = Workspace(home, root, fd, new, record, settle)
                yield place
        finally:
            if record.uid < 0:
                forget(home, record)  # the directory belongs to another user
            elif place is None or not place.committed:
                # After a commit the next use of the volume finishes the exchange if necessary.
                _sweep(home, root, fd, record)


def recover(home: str, data: str) -> None:
    """Finish or remove workspaces that dead processes left in the volume's root `data`. Raises UserError.

    The caller holds the volume's short lock.
    """
    for name in sorted(names(home)):
        path = f"{home}/{os.fsdecode(name)}.json"
        try:
            record = read(path)
            if not VolumeUser(record.user, "").is_gone:
                continue
            with directory(data) as root:
                _recover(home, root, record)
        except (OSError, ValueError, KeyError, TypeError) as error:
            cause = reason(error) if isinstance(error, OSError) else str(error)
            raise UserError(
                f"an interrupted restore in {quoted(data)} cannot be finished: {cause}; look at its "
                f"directory {quoted(name)}, and remove {quoted(path)} to leave it as it is."
            ) from error


def _recover(home: str, root: int, record: Record) -> None:
    known = _open_known(root, record)
    if known is None:
        # Another process moved or removed it; object stores do not keep empty directories either.
        journal = record.journal
        if journal is not None and not journal.done and not set(journal.new) <= set(names_in(root)):
            raise FileNotFoundError(2, "its directory with the volume's content is gone")
        forget(home, record)
        return
    with known as fd:
        if record.journal is None:
            _sweep(home, root, fd, record)
        else:
            _finish(home, root, fd, record)


# -- the directory -----------------------------------------------------------------------------------------


def _claim(root: int, fd: int, record: Record) -> Record:
    """The record with the owner and inode of the new directory. Raises UserError if it was replaced.

    Any writer of the volume's root may have put another directory in its place: one that it owns, or an empty
    directory of this user that others may write to.
    """
    uid = os.fstat(fd).st_uid
    with suppress(OSError):
        os.fchmod(fd, 0o700)
    with suppress(OSError):
        os.removexattr(fd, attributes.ACL_DEFAULT)  # the new content would inherit it
    status = os.fstat(fd)
    if (
        (uid != os.geteuid() and uid != _own_uid(root))
        or (uid == os.geteuid() and status.st_mode & 0o022)
        or names_in(fd)
    ):
        raise UserError(
            f"the directory {quoted(record.name)} in the volume was replaced while it was made; end what "
            "changes the volume meanwhile."
        )
    ino = 0 if filesystem_magic(fd) == FUSE_MAGIC else status.st_ino
    return replace(record, uid=uid, ino=ino)


def _own_uid(root: int) -> int:
    """The owner of new files of this user in a directory; a server may choose it (root_squash, sshfs)."""
    name = f".unionfs-{os.urandom(8).hex()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    probe = Owned(os.open(name, flags, 0o600, dir_fd=root))
    try:
        with probe as fd:
            return os.fstat(fd).st_uid
    finally:
        os.unlink(name, dir_fd=root)


def _open_known(root: int, record: Record) -> Owned | None:
    """The recorded directory; None if it is gone or another one has its name."""
    try:
        if record.uid < 0:
            os.rmdir(record.name, dir_fd=root)
            return None
        found = Owned(openat2(root, os.fsencode(record.name), _DIRECTORY, _WITHIN))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.ENOTEMPTY):
            return None
        raise
    status = os.fstat(found.fd)
    if status.st_uid == record.uid and record.ino in (0, status.st_ino):
        return found
    found.close()
    return None


def _make_inner(fd: int, name: str) -> int:
    """An fd of a directory in the workspace, created if missing."""
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=fd)
    return os.open(name, _DIRECTORY, dir_fd=fd)


def _refuse_immovable(root: int, old: list[str]) -> None:
    """Raise UserError for entries that cannot be moved away: the exchange would end half-way."""
    has_flags = filesystem_magic(root) not in (FUSE_MAGIC, NFS_MAGIC)
    for name in old:
        try:
            os.close(openat2(root, os.fsencode(name), os.O_PATH | os.O_NOFOLLOW, RESOLVE_NO_XDEV))
            found = find_locked(root, os.fsencode(name)) if has_flags else None
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            raise UserError(
                f"the volume's content cannot be replaced: something is mounted at {quoted(name)} in it; "
                "unmount that first."
            ) from error
        if found is not None:
            shown = quoted(found)
            raise UserError(
                f"the volume's content cannot be replaced: {shown} in it is immutable or append-only; run "
                "`chattr -i -a` on it first."
            )


# -- the exchange ------------------------------------------------------------------------------------------


def _finish(home: str, root: int, fd: int, record: Record) -> None:
    """Do the remaining steps of the journal. Raises OSError."""
    journal = record.journal
    assert journal is not None
    if not journal.done:
        _exchange(root, fd, journal)
        journal = replace(journal, done=True)
        # Before removing old entries: afterwards a name in the journal would seem not moved away yet, but
        # would already belong to the new file.
        write(home, replace(record, journal=journal))
    _sweep(home, root, fd, record)
    with suppress(OSError):
        os.utime(root, ns=(journal.mtime, journal.mtime))


def _exchange(root: int, fd: int, journal: Journal) -> None:
    """Every step may find its work already done."""
    with Owned(_make_inner(fd, "old")) as old, Owned(_make_inner(fd, "new")) as new:
        for name in journal.old:
            if not _exists(old, name):
                _move_away(name, name, root, old)
        for name in journal.new:
            if _exists(new, name):
                _move_in(name, new, root, old)
        _set_attributes(root, journal)
        os.fsync(root)


def _rename(name: str, source: int, wanted: str, target: int) -> None:
    """Rename into another directory. rename(2) refuses to move a directory that an ordinary user cannot
    write, because its `..` changes: a directory of this user gets that permission for the rename.
    """
    try:
        os.rename(name, wanted, src_dir_fd=source, dst_dir_fd=target)
        return
    except PermissionError as error:
        if error.errno != errno.EACCES:
            raise
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
    with Owned(openat2(source, os.fsencode(name), flags, _WITHIN)) as fd:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        os.chmod(f"/proc/self/fd/{fd}", 0o700)
        try:
            os.rename(name, wanted, src_dir_fd=source, dst_dir_fd=target)
        finally:
            os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(status.st_mode))


def _move_away(name: str, aside: str, root: int, old: int) -> None:
    try:
        _rename(name, root, aside, old)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Another process moved the name to the workspace, which cannot be moved into itself (rename(2)).
        with suppress(FileNotFoundError):
            os.rename(name, f".unionfs-{os.urandom(8).hex()}", src_dir_fd=root, dst_dir_fd=root)


def _move_in(name: str, new: int, root: int, old: int) -> None:
    for left in range(_TRIES, -1, -1):
        try:
            _rename(name, new, name, root)
            return
        except OSError as error:
            in_the_way = (errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR, errno.ENOTDIR)
            if error.errno not in in_the_way or not left:
                raise
        # Another process has just created it.
        _move_away(name, os.urandom(16).hex(), root, old)


def _set_attributes(root: int, journal: Journal) -> None:
    """Set the attributes, ignoring errors: those set on the new content's directory can be set here too."""
    xattrs = {os.fsencode(name): bytes.fromhex(value) for name, value in journal.xattrs.items()}
    new = attributes.FileAttributes(journal.mode, journal.uid, journal.gid, 0, 0, xattrs)
    with suppress(OSError):
        attributes.write(root, None, new, _leave_out, times=False)


def _leave_out(name: bytes, error: OSError) -> None:
    pass


def _sweep(home: str, root: int, fd: int, record: Record) -> None:
    """Remove the workspace, then its record; the next use of the volume retries after a failure."""
    with suppress(OSError):
        with suppress(FileNotFoundError):  # another process may have removed it while it was empty
            empty_directory(fd)
            there = os.stat(record.name, dir_fd=root, follow_symlinks=False)
            if os.path.samestat(there, os.fstat(fd)):
                os.rmdir(record.name, dir_fd=root)
        forget(home, record)


def _exists(at: int, name: str) -> bool:
    with suppress(FileNotFoundError):
        return bool(os.stat(name, dir_fd=at, follow_symlinks=False))
    return False
