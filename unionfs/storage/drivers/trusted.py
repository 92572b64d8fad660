"""Files and sockets that only root, or the user of the command, can have created or replaced.

Walks a path once, from directory to directory by fds, as the kernel does. Checks each directory and symlink
on the way, including the way of a symlink. The result is used through its fd.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from unionfs.errors import UserError, quoted, reason
from unionfs.sys.attributes import ACL_ACCESS
from unionfs.sys.fds import Owned
from unionfs.sys.walking import Step, walk

_MOST_BYTES = 1 << 20
"""The maximum length of a description or certificate (bytes)."""


@contextmanager
def opened(path: str, what: str) -> Iterator[str]:
    """A name for the file at `path`, valid within the context. `what` is the word for it in messages.

    Raises OSError, and UserError for a file that another user created or could replace.
    """
    with Owned(walk(path, lambda step: _check(path, what, step))) as fd:
        yield f"/proc/self/fd/{fd}"


def read(path: str, what: str) -> str:
    """The text of a small regular file. Raises UserError."""
    try:
        with opened(path, what) as name:
            # Opening a FIFO would block, and opening a device may have effects.
            if not stat.S_ISREG(os.stat(name).st_mode):
                raise ValueError("it is not a regular file")
            with open(name, "rb", opener=_opener) as source:
                content = source.read(_MOST_BYTES + 1)
        if content is None:  # a file of /proc that would block
            raise ValueError("it cannot be read without waiting")
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"the {what} {quoted(path)} is not UTF-8; correct it.") from error
    except (OSError, ValueError) as error:
        cause = reason(error) if isinstance(error, OSError) else str(error)
        raise UserError(f"the {what} {quoted(path)} cannot be read: {cause}; correct it.") from error


def _opener(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _check(path: str, what: str, step: Step) -> None:
    status = step.status
    if status.st_uid not in (0, os.geteuid()):
        cause, cure = f"belongs to uid {status.st_uid}", "chown it"
    elif _is_written_by_others(status, step.fd):
        cause, cure = "can be written by others", "chmod go-w it"
    else:
        return
    subject = "it" if step.is_last else quoted(step.path)
    raise UserError(
        f"the {what} {quoted(path)} is not trusted: {subject} {cause}; {cure}, or remove the description."
    )


def _is_written_by_others(status: os.stat_result, fd: int) -> bool:
    mode = status.st_mode
    # Writers of a socket may only talk to the plugin; in a sticky directory others cannot replace entries.
    if stat.S_ISLNK(mode) or stat.S_ISSOCK(mode) or (stat.S_ISDIR(mode) and mode & stat.S_ISVTX):
        return False
    if mode & stat.S_IWOTH:
        return True
    # With an ACL these bits are the mask of all named users and groups (acl(5)).
    return bool(mode & stat.S_IWGRP) and (status.st_gid != 0 or _has_acl(fd))


def _has_acl(fd: int) -> bool:
    try:
        os.getxattr(f"/proc/self/fd/{fd}", ACL_ACCESS)
    except OSError as error:
        return error.errno not in (errno.ENODATA, errno.EOPNOTSUPP)
    return True
