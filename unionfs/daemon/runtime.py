"""The runtime directory: registry, sockets, locks and log of this user's daemons.

Its files are opened relative to a directory fd, never by path, and read only if they are regular files of
this user: nothing that another user has planted is followed, waited for or trusted.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack, suppress
from typing import Final

from unionfs.errors import UserError, quoted, reason
from unionfs.sys.capabilities import in_initial_user_namespace, is_host_root, uid_outside
from unionfs.sys.fds import Owned, Returned, close_quietly

_SYSTEM: Final = "/run/unionfs"
_LARGEST: Final = 4 << 20
_NOTHING: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EPERM, errno.EACCES)
_FLAGS: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class RuntimeDirectory:
    """An open directory of this user that nobody else may write."""

    def __init__(self, path: str) -> None:
        """Open the directory. Raises OSError; PermissionError if other users own it or may write it."""
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        status = os.fstat(self.fd)
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            self.close()
            raise PermissionError(1, "it belongs to another user, or others may write it", path)

    def close(self) -> None:
        if self.fd >= 0:
            close_quietly(self.fd)
            self.fd = -1

    def __enter__(self) -> RuntimeDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def names(self) -> list[str]:
        """Return the sorted names in it. Raises OSError."""
        return sorted(os.listdir(self.fd))

    def open(self, name: str, flags: int) -> int:
        """Open a regular file of this user; O_CREAT creates it with mode 0600. Raises OSError."""
        with Returned(os.open(name, flags | _FLAGS, 0o600, dir_fd=self.fd)) as fd:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise PermissionError(1, "it is not a regular file of this user", name)
        return fd

    def read(self, name: str) -> bytes:
        """Return the content of a file. Raises OSError, and ValueError if it is larger than 4 MiB."""
        with Owned(self.open(name, os.O_RDONLY)) as fd, open(fd, "rb", buffering=0, closefd=False) as source:
            content = source.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ValueError(f"{name} is larger than {_LARGEST} bytes")
        return content

    def write(self, name: str, content: bytes) -> None:
        """Replace the content of a file atomically. Raises OSError."""
        temporary = f"{name}.new"
        with open(self.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as out:
            out.write(content)
        os.replace(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def remove(self, *names: str) -> None:
        """Remove files; missing ones are ignored."""
        for name in names:
            with suppress(OSError):
                os.unlink(name, dir_fd=self.fd)

    def address(self, name: str) -> str:
        """Return a path for a socket in it that fits into the 108 bytes of unix(7)."""
        return f"/proc/self/fd/{self.fd}/{name}"


def is_nothing(error: OSError) -> bool:
    """Return whether what could not be opened is missing, or nothing of this user's.

    After other errors, such as EMFILE, it is not known what is there: a mount that nobody sees counts as
    unused layers.
    """
    return error.errno in _NOTHING


def candidates() -> list[str]:
    """Return the possible directories of this user, the preferred one first.

    logind's directory comes before /tmp, where another user may have taken the name. Uid 0 of a user
    namespace counts as the uid outside (XDG Base Directory Specification; user_namespaces(7)). But it never
    is the host's root, and the uid outside may be that of a namespace that is nested itself: so the last one
    there has the namespace in its name. The launcher has the same order (launcher/fuse-unionfs.c).
    """
    uid = os.geteuid()
    if is_host_root():
        return [_SYSTEM, "/tmp/unionfs-0"]
    nested = not in_initial_user_namespace()
    uid = uid_outside(uid)
    chosen = os.environ.get("XDG_RUNTIME_DIR", "")
    found = [f"{chosen}/unionfs"] if chosen.startswith("/") else []
    if os.path.isdir(f"/run/user/{uid}"):
        found.append(f"/run/user/{uid}/unionfs")
    if not nested or uid != 0:
        found.append(f"/tmp/unionfs-{uid}")
    if nested:
        with suppress(OSError):
            found.append(f"/tmp/unionfs-{uid}-userns-{os.stat('/proc/self/ns/user').st_ino}")
    return list(dict.fromkeys(found))


def runtime_directory() -> RuntimeDirectory:
    """Return the directory for new files, created with mode 0700. Raises UserError."""
    for path in candidates():
        with suppress(OSError):
            os.mkdir(path, 0o700)
        with suppress(OSError):
            directory = _opened(path)
            with Returned(directory.fd) as fd:  # on a read-only filesystem it fails
                os.fchmod(fd, 0o700)
            return directory
    raise UserError(
        f"none of {', '.join(candidates())} can be used for runtime files (not a directory of this user "
        "that nobody else may write); remove what is there, or set XDG_RUNTIME_DIR."
    )


def runtime_directories() -> list[RuntimeDirectory]:
    """Return all existing directories of this user; the caller closes them. Raises UserError."""
    with ExitStack() as opened:
        found = []
        for path in candidates():
            try:
                found.append(opened.enter_context(_opened(path)))
            except OSError as error:
                if not is_nothing(error):
                    raise UserError(f"{quoted(path)} cannot be read: {reason(error)}; try again.") from error
        opened.pop_all()
    return found


def _opened(path: str) -> RuntimeDirectory:
    """Open a directory. Raises OSError; UserError if it is the host's own, and others may write it.

    Any user can be in the way in /tmp, but only root in /run: with another directory instead, what runs would
    not be found any more.
    """
    try:
        return RuntimeDirectory(path)
    except PermissionError as error:
        if path != _SYSTEM:
            raise
        raise UserError(
            f"{path} cannot be used for runtime files: {error.strerror}; check what is in it, and run "
            f"`chown root {path} && chmod 700 {path}`."
        ) from error
