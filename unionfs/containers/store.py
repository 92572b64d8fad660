"""Where containers keep what they change: ROOT/containers/NAME/{upper,work,merged,container.json}."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from unionfs.daemon.errors import UserError, quoted, reason
from unionfs.storage.names import check_name
from unionfs.storage.root import make_directory
from unionfs.sys import calls
from unionfs.union.removal import remove_tree

_FACTS = "container.json"


def new_name() -> str:
    """A name for a container that is given none: 12 hexadecimal digits."""
    return secrets.token_hex(6)


class Container:
    """One container's directory. Its layers stay when it ends, until it is removed."""

    def __init__(self, root: str, name: str) -> None:
        self.name = check_name(name, "container")
        self.above = f"{root}/containers"
        self.path = f"{self.above}/{name}"

    @property
    def upper(self) -> str:
        return f"{self.path}/upper"

    @property
    def work(self) -> str:
        return f"{self.path}/work"

    @property
    def merged(self) -> str:
        return f"{self.path}/merged"

    def exists(self) -> bool:
        """Whether it was made before."""
        return os.path.isdir(self.path)

    @contextmanager
    def claimed(self, *, make: bool) -> Iterator[None]:
        """Keep everybody else out of the directory. Raises UserError, also if it is missing and not made."""
        if make:
            make_directory(self.above)
            with suppress(FileExistsError):
                os.mkdir(self.path, 0o700)
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise UserError(
                f"there is no container {quoted(self.name)} in {quoted(self.above)}; check the name and the "
                "storage root."
            ) from error
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"container {quoted(self.name)} is running; wait for its end, or choose another name."
                ) from error
            yield
        finally:
            os.close(fd)

    def lowers(self) -> tuple[str, ...]:
        """The lowers that it was made over; none for a new container."""
        try:
            with open(f"{self.path}/{_FACTS}", encoding="utf-8", errors="surrogateescape") as source:
                return tuple(json.load(source)["lowers"])
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"container {quoted(self.name)} cannot be used: {quoted(self.path)}/{_FACTS} cannot be read; "
                f"remove it by `unionfs rm {quoted(self.name)}`."
            ) from error

    def make(self, lowers: Sequence[str], *, layers: bool) -> None:
        """Make the mountpoint, and with `layers` an upper that looks like the topmost lower, and work."""
        try:
            with suppress(FileExistsError):
                os.mkdir(self.merged, 0o700)
            if not layers:
                return
            if not os.path.isdir(self.upper):
                st = os.stat(lowers[0])
                os.mkdir(self.upper, 0o700)
                with suppress(PermissionError):
                    os.chown(self.upper, st.st_uid, st.st_gid)
                os.chmod(self.upper, stat.S_IMODE(st.st_mode))
            with suppress(FileExistsError):
                os.mkdir(self.work, 0o700)
            if not os.path.exists(f"{self.path}/{_FACTS}"):
                temporary = f"{self.path}/{_FACTS}.new"
                with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as out:
                    json.dump({"lowers": list(lowers)}, out)
                os.replace(temporary, f"{self.path}/{_FACTS}")
        except OSError as error:
            raise UserError(
                f"container {quoted(self.name)} cannot be made in {quoted(self.above)}: {reason(error)}; "
                "check the lowers, or give another --root."
            ) from error

    def remove(self) -> None:
        """Throw it away with all that it changed. Raises UserError."""
        try:
            above = os.open(self.above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        # A name that no container can have: what is half removed is none any more.
        doomed = f".removed-{secrets.token_hex(6)}".encode()
        try:
            calls.renameat2(above, os.fsencode(self.name), above, doomed, calls.RENAME_NOREPLACE)
            _open_up(f"{self.above}/{os.fsdecode(doomed)}")
            inner = os.open(doomed, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
            try:
                for entry in os.listdir(inner):
                    name = os.fsencode(entry)
                    if stat.S_ISDIR(os.stat(name, dir_fd=inner, follow_symlinks=False).st_mode):
                        remove_tree(inner, name)
                    else:
                        os.unlink(name, dir_fd=inner)
            finally:
                os.close(inner)
            os.rmdir(doomed, dir_fd=above)
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(
                f"container {quoted(self.name)} cannot be removed: {reason(error)}; remove "
                f"{quoted(self.above)}/{os.fsdecode(doomed)} by hand."
            ) from error
        finally:
            os.close(above)


def _open_up(path: str) -> None:
    """An ordinary user has to be able to enter what he removes, whatever mode the container gave it."""
    if os.geteuid() == 0:
        return
    for directory, names, _ in os.walk(path):
        for name in names:
            inner = os.path.join(directory, name)
            if not os.path.islink(inner):
                with suppress(OSError):
                    os.chmod(inner, 0o700)
