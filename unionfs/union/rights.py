"""What the owner of an object may do in spite of its permission bits, for an ordinary user's daemon.

The kernel checks a caller's rights on the merged tree. The daemon's own accesses may need other ones: a
copy-up puts a name into a directory that nobody may write, removing a directory lists it, a copied file is
read. Such an access is first tried as it is; only if it fails with EACCES,

- what is only opened is opened by a child in a user namespace (`sys.override`).
- If that is not possible, or something is renamed, an object of the upper gets the missing bits of its owner
  for the moment, and never those of others. Before that its mode is noted in work, by a symlink, which a
  journal keeps in order with the change of the mode; after a crash the next mount restores it (`mending`).
  A lower is never changed.

So none of this costs anything where the daemon may do everything, as root may.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final, TypeVar

from unionfs.sys.calls import os_error
from unionfs.sys.fds import Owned, close_quietly
from unionfs.sys.override import Override

T = TypeVar("T")
At = tuple[int, bytes]
"""A name: the fd of its directory, and the name within it."""

_PATH: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
#: A note in work: the target of a symlink, from the mode to restore and the inode number.
NOTE: Final = b"mode=%o ino=%d"
_CHANGED: Final = (stat.S_IFDIR, stat.S_IFREG)
_OWNERS: Final = stat.S_IRWXU


class Rights:
    """The rights of this user over own objects. Not thread-safe, like the union itself."""

    def __init__(self, work_fd: int = -1) -> None:
        """``work_fd``: the work directory; without it nothing is changed in the upper either."""
        self._work_fd = work_fd
        self._override = Override()
        self._numbers = itertools.count()

    def close(self) -> None:
        """Release what it uses."""
        self._override.close()

    # -- reading --------------------------------------------------------------------------------------

    def open(self, dir_fd: int, name: bytes, flags: int, refused: OSError, *, upper: bool) -> int:
        """openat(2) of an existing object, after it was ``refused``. Raises ``OSError``.

        ``upper``: it is in the upper, so its mode may be changed for the moment.
        """
        fd = self._overridden(dir_fd, name, flags, refused, upper=upper)
        if fd is not None:
            return fd
        with self.widened(dir_fd):
            path = os.open(name, _PATH, dir_fd=dir_fd)
            if flags & os.O_PATH:
                return _if_directory(path, flags)
            with Owned(path), self.widened(path):
                return os.open(b"/proc/self/fd/%d" % path, flags & ~os.O_NOFOLLOW)

    def reopen(self, path_fd: int, flags: int, refused: OSError, *, upper: bool) -> int:
        """The same for the object of an O_PATH fd."""
        fd = self._overridden(path_fd, b"", flags, refused, upper=upper)
        if fd is not None:
            return fd
        with self.widened(path_fd):
            return os.open(b"/proc/self/fd/%d" % path_fd, flags)

    def stat(self, dir_fd: int, name: bytes, refused: OSError, *, upper: bool) -> os.stat_result:
        """fstatat(2) without following, after it was ``refused``. Raises ``OSError``."""
        with Owned(self.open(dir_fd, name, _PATH, refused, upper=upper)) as fd:
            return os.fstat(fd)

    def getxattr(self, fd: int, name: bytes, refused: OSError, *, upper: bool) -> bytes:
        """The value of an xattr of the object ``fd`` (O_PATH suffices), after reading it was ``refused``."""
        if refused.errno != errno.EACCES:
            raise refused
        if os.fstat(fd).st_uid == os.geteuid():
            with suppress(PermissionError):
                value = self._override.getxattr(fd, name)
                if value is not None:
                    return value
        if not upper or self._work_fd < 0:
            raise refused
        with self.widened(fd):
            return os.getxattr(b"/proc/self/fd/%d" % fd, name)

    def _overridden(
        self, dir_fd: int, name: bytes, flags: int, refused: OSError, *, upper: bool
    ) -> int | None:
        """Open by the child what this user owns, or what is in this user's directory; None if it cannot, and
        modes of the upper may be widened for it.
        """
        if refused.errno != errno.EACCES:
            raise refused
        uid = os.geteuid()
        with suppress(PermissionError):
            if (
                os.fstat(dir_fd).st_uid == uid
                or (name and os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_uid == uid)
            ):
                fd = self._override.open(dir_fd, name, flags)
                if fd is not None:
                    return fd
        if not upper or self._work_fd < 0:
            raise refused
        return None

    # -- changing -------------------------------------------------------------------------------------

    def again(self, call: Callable[[], T], refused: OSError, *names: At) -> T:
        """Repeat a call in the upper that was ``refused``, with the owner's rights to the directories of
        these names, and to those that are directories themselves: rename(2) to another parent writes to them.
        """
        if refused.errno != errno.EACCES:
            raise refused
        with ExitStack() as restored:
            for dir_fd, name in names:
                restored.enter_context(self.widened(dir_fd))
                with suppress(FileNotFoundError):
                    fd = os.open(name, _PATH, dir_fd=dir_fd)
                    restored.callback(close_quietly, fd)
                    if stat.S_ISDIR(os.fstat(fd).st_mode):
                        restored.enter_context(self.widened(fd))
            return call()

    @contextmanager
    def widened(self, fd: int) -> Iterator[None]:
        """Within the context the owner has all rights to the object ``fd`` (O_PATH suffices) of the upper.

        Does nothing if this user is not the owner, or could not restore the mode.
        """
        st = os.fstat(fd)
        mode = stat.S_IMODE(st.st_mode)
        if mode & _OWNERS == _OWNERS or not _may_restore(st):
            yield
            return
        name = self._note(NOTE % (mode, st.st_ino))
        path = b"/proc/self/fd/%d" % fd
        os.chmod(path, mode | _OWNERS)
        try:
            yield
        finally:
            os.chmod(path, mode)
            os.unlink(name, dir_fd=self._work_fd)

    def _note(self, text: bytes) -> bytes:
        """Put a note into work; returns its name."""
        while True:
            name = b"#mode%x" % next(self._numbers)
            with suppress(FileExistsError):  # that of a crashed daemon, which is being mended
                os.symlink(text, name, dir_fd=self._work_fd)
                return name


def _if_directory(fd: int, flags: int) -> int:
    """The fd itself, unless ``flags`` ask for a directory and it is none (ENOTDIR)."""
    if flags & os.O_DIRECTORY and not stat.S_ISDIR(os.fstat(fd).st_mode):
        close_quietly(fd)
        raise os_error(errno.ENOTDIR)
    return fd


def _may_restore(st: os.stat_result) -> bool:
    """Whether this user may change the mode of an object and restore it: chmod(2) by somebody outside the
    group clears setgid (fs/attr.c, setattr_prepare).
    """
    if stat.S_IFMT(st.st_mode) not in _CHANGED or st.st_uid != os.geteuid():
        return False
    return not st.st_mode & stat.S_ISGID or st.st_gid in (os.getegid(), *os.getgroups())
