"""Creates a tmpfs that is not mounted anywhere, as root or in a new user namespace.

Only the fd refers to it, and no mount table lists it. The kernel frees it and its content when its last fd
and last mount are gone.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import socket
from contextlib import suppress

from unionfs.errors import UserError, on_failure, reason
from unionfs.settings.specs import TmpfsOptions
from unionfs.sys import detached

_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNS = 0x00020000


def make(options: TmpfsOptions, flags: tuple[str, ...] = (), *, owner: str) -> int:
    """An fd (O_PATH) of a new tmpfs's root. `flags` are words of mount(8). Raises UserError.

    `owner` names the tmpfs in error messages.
    """
    attributes = 0
    for flag in flags:
        attributes |= detached.ATTRIBUTES[flag]
    try:
        return _made(options, attributes)
    except OSError as error:
        if error.errno != errno.EPERM:
            raise UserError(f"{owner} cannot be made: {reason(error)}; check its options.") from error
    with on_failure(
        f"{owner} cannot be made without root",
        "allow unprivileged user namespaces (`unionfs doctor` tells what forbids them), or run as root",
    ):
        return _in_user_namespace(options, attributes)


def _made(options: TmpfsOptions, attributes: int) -> int:
    parameters = [("source", "tmpfs"), *options.parameters()]
    if options.swap is not True:
        try:
            return detached.new_filesystem("tmpfs", [*parameters, ("noswap", "")], attributes)
        except OSError as error:
            # EINVAL: kernels before 6.4 do not have the option, user namespaces may not set it (mm/shmem.c).
            if error.errno != errno.EINVAL or options.swap is False:
                raise
    return detached.new_filesystem("tmpfs", parameters, attributes)


def _in_user_namespace(options: TmpfsOptions, attributes: int) -> int:
    """Let a child create it as root of a user namespace that maps this user's ids to themselves.

    Call it while the process has one thread: the child continues in Python after a fork.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    uid, gid = os.geteuid(), os.getegid()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            try:
                _enter_user_namespace(uid, gid)
                fd = _made(options, attributes)
                theirs.sendmsg(
                    [b"ok"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
                )
                code = 0
            except OSError as error:
                theirs.send(f"{error.errno} {error.strerror}".encode())
        finally:
            os._exit(code)
    theirs.close()
    with ours:
        message, ancillary, _, _ = ours.recvmsg(4096, socket.CMSG_SPACE(4))
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fd = array.array("i", data[:4])[0]
            os.set_inheritable(fd, False)
            return fd
    number, _, text = message.decode(errors="replace").partition(" ")
    raise OSError(int(number or errno.EPERM), text or os.strerror(errno.EPERM))


def _enter_user_namespace(uid: int, gid: int) -> None:
    """user_namespaces(7): the ids map to themselves, so files inside belong to the user outside."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"no user namespace can be made: {os.strerror(number)}")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as setting:
            setting.write(text)
