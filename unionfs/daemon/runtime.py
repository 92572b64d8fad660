"""The directory for files of the running system: registry, sockets, locks and log of this user's daemons.

Its files are reached from a descriptor of the directory, never by a path, and read only when they are regular
files of this user: nothing that another user has put in the way is followed, waited for or believed.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import Final

from unionfs.errors import UserError
from unionfs.sys.capabilities import is_host_root, uid_outside

_SYSTEM: Final = "/run/unionfs"
_LARGEST: Final = 4 << 20
_FLAGS: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class RuntimeDirectory:
    """A directory of this user that nobody else may write, held open."""

    def __init__(self, path: str) -> None:
        """Open the directory. Raises OSError; PermissionError for one that others could have filled."""
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        status = os.fstat(self.fd)
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            self.close()
            raise PermissionError(1, "it belongs to another user, or others may write it", path)

    def close(self) -> None:
        """Let go of the directory."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> RuntimeDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def names(self) -> list[str]:
        """The names in it, sorted. Raises OSError."""
        return sorted(os.listdir(self.fd))

    def open(self, name: str, flags: int) -> int:
        """An fd of a regular file of this user, made with mode 0600 where `flags` say so. Raises OSError."""
        fd = os.open(name, flags | _FLAGS, 0o600, dir_fd=self.fd)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            os.close(fd)
            raise PermissionError(1, "it is not a regular file of this user", name)
        return fd

    def read(self, name: str) -> bytes:
        """The content of a file of at most 4 MiB. Raises OSError, ValueError when it is larger."""
        with open(self.open(name, os.O_RDONLY), "rb", buffering=0) as source:
            content = source.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ValueError(f"{name} is larger than {_LARGEST} bytes")
        return content

    def write(self, name: str, content: bytes) -> None:
        """Give a file new content in one step. Raises OSError."""
        temporary = f"{name}.new"
        with open(self.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as out:
            out.write(content)
        os.replace(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def remove(self, *names: str) -> None:
        """Remove files, those that are there."""
        for name in names:
            with suppress(OSError):
                os.unlink(name, dir_fd=self.fd)

    def address(self, name: str) -> str:
        """A path for a socket in it, short enough for unix(7), which has room for 108 bytes."""
        return f"/proc/self/fd/{self.fd}/{name}"


def candidates() -> list[str]:
    """Directories that may be this user's, the preferred one first.

    What logind makes comes before /tmp, where another user may have taken the name. Uid 0 of a user namespace
    is the user outside that it stands for (XDG Base Directory Specification; user_namespaces(7)).
    """
    uid = os.geteuid()
    if is_host_root():
        return [_SYSTEM, "/tmp/unionfs-0"]
    uid = uid_outside(uid)
    chosen = os.environ.get("XDG_RUNTIME_DIR", "")
    found = [f"{chosen}/unionfs"] if chosen.startswith("/") else []
    if os.path.isdir(f"/run/user/{uid}"):
        found.append(f"/run/user/{uid}/unionfs")
    return list(dict.fromkeys([*found, f"/tmp/unionfs-{uid}"]))


def runtime_directory() -> RuntimeDirectory:
    """The directory for new files, made with mode 0700. Raises UserError."""
    for path in candidates():
        with suppress(OSError):
            os.mkdir(path, 0o700)
        with suppress(OSError):
            directory = RuntimeDirectory(path)
            try:
                os.fchmod(directory.fd, 0o700)
            except OSError:  # on a filesystem that is mounted read-only
                directory.close()
                raise
            return directory
    raise UserError(
        f"none of {', '.join(candidates())} can be used for runtime files (not a directory of this user "
        "that nobody else may write); remove what is there, or set XDG_RUNTIME_DIR."
    )


def runtime_directories() -> list[RuntimeDirectory]:
    """Every one that this user has, to be closed by the caller."""
    found = []
    for path in candidates():
        with suppress(OSError):
            found.append(RuntimeDirectory(path))
    return found
