"""Creating files as somebody else while keeping the daemon's capabilities.

``setfsuid(2)`` makes the kernel itself give a new file its owner, apply a setgid directory and a default
ACL, in the same step that creates it. Leaving uid 0 drops the filesystem capabilities of the thread
(capabilities(7), "Effect of user ID changes"), so they are raised again: the caller's permissions on the
merged tree were checked by the kernel (``default_permissions``), and the layer must not be asked twice.
All of this is a property of the calling thread only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

from unionfs.sys.capabilities import (
    CAP_SETGID,
    CAP_SETUID,
    capability_sets,
    has_capability,
    set_capabilities,
)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.setfsuid.argtypes = (ctypes.c_uint,)
_libc.setfsgid.argtypes = (ctypes.c_uint,)

_PROBE: Final = b"#probe"
_AS_WE_ARE: Final = nullcontext()


def _umask() -> int:
    """The umask, without changing it (proc_pid_status(5))."""
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    return 0o777  # unknown: before Linux 4.7


class Identity:
    """Who the daemon is, and the power to create files as others."""

    def __init__(self, work_fd: int = -1) -> None:
        """``work_fd``: a directory where files will be created, to see whether they come out as asked for."""
        self.uid = os.geteuid()
        self.gid = os.getegid()
        #: The permission bits that what it creates has if it asks for them: all but those of its umask, as
        #: it is now. (Setuid, setgid and sticky are none of them: a change of the owner may clear them.)
        self.sets = 0o777 & ~_umask()
        self._is_obeyed = work_fd < 0 or self._creates_as_asked(work_fd)
        if not self._is_obeyed:
            self.sets = 0
        self.can_switch = has_capability(CAP_SETUID) and has_capability(CAP_SETGID)
        self._capabilities = capability_sets()

    def owns(self, st: os.stat_result) -> bool:
        """Whether what it creates has the owner and the group of the object with these attributes."""
        return st.st_uid == self.uid and st.st_gid == self.gid and self._is_obeyed

    def _creates_as_asked(self, work_fd: int) -> bool:
        """Not so, for one, on NFS whose server takes root for nobody, or lets files inherit its own ACLs."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(_PROBE, flags, 0o777, dir_fd=work_fd)
            try:
                st = os.fstat(fd)
            finally:
                os.close(fd)
                os.unlink(_PROBE, dir_fd=work_fd)
        except OSError:
            return False  # not to be found out now
        return (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) == (self.uid, self.gid, self.sets)

    def acting_as(self, uid: int, gid: int) -> AbstractContextManager[None]:
        """Within the block, what this thread creates belongs to ``uid`` and ``gid``.

        Raises ``PermissionError`` when the daemon may not create for others (an ordinary user's daemon).
        """
        if uid == self.uid and gid == self.gid:
            return _AS_WE_ARE
        if not self.can_switch:
            raise PermissionError(errno.EPERM, "the daemon cannot create files for another user")
        return self._switched(uid, gid)

    @contextmanager
    def _switched(self, uid: int, gid: int) -> Iterator[None]:
        _libc.setfsgid(gid)
        _libc.setfsuid(uid)
        try:
            set_capabilities(self._capabilities)
            yield
        finally:
            _libc.setfsuid(self.uid)
            _libc.setfsgid(self.gid)
            set_capabilities(self._capabilities)
