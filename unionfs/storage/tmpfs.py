"""Creates a tmpfs that is not mounted anywhere, as root or in a new user namespace.

Only the fd refers to it, and no mount table lists it. The kernel frees it and its content when its last fd
and last mount are gone.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress

from unionfs.errors import UserError, on_failure, reason
from unionfs.settings.specs import TmpfsOptions
from unionfs.sys import detached
from unionfs.sys.namespaces import CLONE_NEWNS, CLONE_NEWUSER, unshare


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
    """Let a child create it as root of a user namespace.

    Call it while the process has one thread: the child continues in Python after a fork.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                _enter_user_namespace()
                socket.send_fds(theirs, [b"ok"], [_made(options, attributes)])
            except OSError as error:
                theirs.send(f"{error.errno} {error.strerror}".encode())
        finally:
            os._exit(0)
    theirs.close()
    with ours:
        message, fds, _, _ = socket.recv_fds(ours, 4096, 1)
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)
    if fds:
        os.set_inheritable(fds[0], False)
        return fds[0]
    number, _, text = message.decode(errors="replace").partition(" ")
    raise OSError(int(number or errno.EPERM), text or os.strerror(errno.EPERM))


def _enter_user_namespace() -> None:
    try:
        unshare(CLONE_NEWUSER | CLONE_NEWNS)
    except OSError as error:
        raise OSError(error.errno, f"no user namespace can be made: {error.strerror}") from error
