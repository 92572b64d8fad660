"""Creates files as another user while keeping the daemon's capabilities.

With ``setfsuid(2)`` the kernel itself sets the owner of a new file and applies setgid directories and default
ACLs, atomically with its creation. Leaving uid 0 drops the thread's filesystem capabilities (capabilities(7),
"Effect of user ID changes"), so they are raised again: the kernel has checked the caller's permissions on the
merged tree (``default_permissions``), and the layer must not check them again. All of this is per thread.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

from unionfs.core.creds import Creator
from unionfs.sys.capabilities import CAP_SETGID, CAP_SETUID, capability_sets, has_capability
from unionfs.sys.fds import Owned
from unionfs.sys.process import status_field

_PROBE: Final = b"#probe"
_AS_WE_ARE: Final = nullcontext()


class Identity(Creator):
    """The daemon's own ids, and creating files as another user."""

    def __init__(self, work_fd: int = -1) -> None:
        """``work_fd``: a directory in which to test whether new files get the requested attributes."""
        can_switch = has_capability(CAP_SETUID) and has_capability(CAP_SETGID)
        super().__init__(os.geteuid(), os.getegid(), bytes(capability_sets()), can_switch=can_switch)
        #: The permission bits that new files get if requested: all except those of the current umask.
        #: (Without setuid, setgid and sticky, which a change of owner may clear.) None of them if the
        #: umask is unknown (before Linux 4.7).
        self.sets = 0o777 & ~int(status_field("Umask") or "777", 8)
        self._is_obeyed = work_fd < 0 or self._creates_as_asked(work_fd)
        if not self._is_obeyed:
            self.sets = 0

    def owns(self, st: os.stat_result) -> bool:
        """Return whether new files get the same owner and group as the object with these attributes."""
        return st.st_uid == self.uid and st.st_gid == self.gid and self._is_obeyed

    def _creates_as_asked(self, work_fd: int) -> bool:
        """Test file creation; NFS servers, for example, may squash root or make files inherit ACLs."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            try:
                with Owned(os.open(_PROBE, flags, 0o777, dir_fd=work_fd)) as fd:
                    st = os.fstat(fd)
            finally:
                os.unlink(_PROBE, dir_fd=work_fd)
        except OSError:
            return False  # cannot be tested now
        return (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) == (self.uid, self.gid, self.sets)

    def acting_as(self, uid: int, gid: int) -> AbstractContextManager[None]:
        """Within the block, files that this thread creates belong to ``uid`` and ``gid``.

        Raises ``PermissionError`` if the daemon may not create files for others (an ordinary user's daemon).
        """
        if uid == self.uid and gid == self.gid:
            return _AS_WE_ARE
        if not self.can_switch:
            raise PermissionError(errno.EPERM, "the daemon cannot create files for another user")
        return self._switched(uid, gid)

    @contextmanager
    def _switched(self, uid: int, gid: int) -> Iterator[None]:
        self.switch(uid, gid)
        try:
            yield
        finally:
            self.switch_back()
