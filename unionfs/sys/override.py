"""Access to this user's own files regardless of their permission bits, which stay unchanged.

In a user namespace a process has CAP_DAC_OVERRIDE over the files whose owner and group are both mapped into
it (kernel/capability.c, capable_wrt_inode_uidgid). A child in a namespace that maps only the ids of this user
thus reads exactly files that the user could make readable by chmod(2) as well. A command without threads
may enter such a namespace itself.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from contextlib import suppress
from typing import Final, NoReturn

from unionfs.sys.calls import prctl
from unionfs.sys.capabilities import CAP_DAC_OVERRIDE, has_capability, is_host_root, keep_capabilities
from unionfs.sys.fds import Owned
from unionfs.sys.namespaces import CLONE_NEWUSER, unshare

_PR_SET_NAME: Final = 15  # include/uapi/linux/prctl.h
_REQUEST: Final = struct.Struct("=?i")  # whether it asks for an xattr; flags of open(2)
_ANSWER: Final = struct.Struct("=i")  # an errno
_LONGEST: Final = 70_000  # more than the largest value of an xattr (XATTR_SIZE_MAX)


def override_modes() -> None:
    """Give this process CAP_DAC_OVERRIDE over the own files of this user and the first group, for good.

    Has no effect where user namespaces are not available. Only for a process without other threads.
    """
    if has_capability(CAP_DAC_OVERRIDE):
        return
    # In a namespace without maps the user would be nobody, so another process tries first.
    pid = os.fork()
    if pid == 0:
        try:
            unshare(CLONE_NEWUSER)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1] == 0:
        unshare(CLONE_NEWUSER)
        keep_capabilities([CAP_DAC_OVERRIDE])


class Override:
    """Opens files through the child, which is started by the first call and ends with this process.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._pid = 0
        self._impossible = False
        self._lock = threading.Lock()

    def open(self, dir_fd: int, name: bytes, flags: int) -> int | None:
        """openat(2) with O_CLOEXEC, not for creating files; None where user namespaces are not available.

        With an empty name it opens the object of ``dir_fd`` itself (O_PATH suffices).

        Raises ``OSError``: EACCES also for files of other users, and of groups other than the user's first.
        """
        answer = self._ask(False, dir_fd, name, flags)
        if answer is None:
            return None
        _, fds = answer
        if not fds:  # no free number: unix(7), recvmsg(2) then drops it (MSG_CTRUNC)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return fds[0]

    def getxattr(self, fd: int, name: bytes) -> bytes | None:
        """The value of an xattr of the object ``fd`` (O_PATH suffices); None as for :meth:`open`."""
        answer = self._ask(True, fd, name, 0)
        return None if answer is None else answer[0]

    def close(self) -> None:
        """End the child."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            with suppress(ChildProcessError):
                os.waitpid(self._pid, 0)

    def _ask(self, xattr: bool, fd: int, name: bytes, flags: int) -> tuple[bytes, list[int]] | None:
        with self._lock:
            for _ in range(2):  # again if the child was killed since the last call
                if self._socket is None:
                    self._start()
                if self._socket is None:
                    return None
                try:
                    socket.send_fds(self._socket, [_REQUEST.pack(xattr, flags) + name], [fd])
                    data, fds, _, _ = socket.recv_fds(self._socket, _LONGEST, 1)
                except (BrokenPipeError, ConnectionResetError):
                    data = b""
                if data:
                    (code,) = _ANSWER.unpack_from(data)
                    if code:
                        raise OSError(code, os.strerror(code))
                    return data[_ANSWER.size :], fds
                self.close()
        return None

    def _start(self) -> None:
        if self._impossible or is_host_root():
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                pid = os.fork()
            except OSError:
                ours.close()
                return
            if pid == 0:
                _serve(theirs.fileno())
        # The child sends one byte when it is in its namespace.
        if ours.recv(1):
            self._socket, self._pid = ours, pid
        else:
            self._impossible = True
            ours.close()
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _serve(fd: int) -> NoReturn:
    """Be the child: answer until the other end is closed."""
    try:
        os.setsid()  # a signal of the terminal is for the daemon
        os.chdir("/")
        os.dup2(fd, 3, inheritable=False)
        # The daemon's /dev/fuse, locks and files must not outlive it.
        os.closerange(4, 2**31 - 1)
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        os.close(null)
        prctl(_PR_SET_NAME, b"unionfs-open")
        unshare(CLONE_NEWUSER)
        with socket.socket(fileno=3) as end:
            end.send(b".")
            while True:
                data, fds, _, _ = socket.recv_fds(end, _LONGEST, 1)
                if not data:
                    break
                if not fds:
                    end.send(_ANSWER.pack(errno.EMFILE))
                    continue
                with Owned(fds[0]) as at:
                    _answer(end, at, data)
    finally:
        os._exit(0)


def _answer(end: socket.socket, at: int, data: bytes) -> None:
    xattr, flags = _REQUEST.unpack_from(data)
    name = data[_REQUEST.size :]
    try:
        if xattr:
            value = os.getxattr(b"/proc/self/fd/%d" % at, name)
            end.send(_ANSWER.pack(0) + value)
        else:
            path = name or b"/proc/self/fd/%d" % at
            with Owned(os.open(path, flags | os.O_CLOEXEC, dir_fd=at)) as opened:
                socket.send_fds(end, [_ANSWER.pack(0)], [opened])
    except OSError as error:
        end.send(_ANSWER.pack(error.errno or 5))
