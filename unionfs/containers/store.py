"""The storage of containers: ROOT/containers/NAME/{upper,work,merged,container.json}."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from unionfs.errors import UserError, on_failure, quoted
from unionfs.settings.names import check_name, is_name
from unionfs.storage import jsonfiles
from unionfs.storage.removing import refuse_locked, remove_all
from unionfs.storage.root import check_directory, is_own_directory, make_directory, open_root
from unionfs.sys.fds import Owned
from unionfs.sys.trees import remove_path

_FACTS = "container.json"


def names(root: str) -> list[str]:
    """The names of all kept containers of a storage root, sorted. Raises OSError."""
    try:
        return sorted(filter(is_name, os.listdir(f"{root}/containers")))
    except FileNotFoundError:
        return []


def lowers_of_all(root: str) -> dict[str, str]:
    """The lowers of all kept containers of a storage root, and which container has them. Raises UserError."""
    found = {}
    for name in names(root):
        for lower in Container(root, name).lowers():
            found[lower] = f"container {quoted(name)}"
    return found


def new_name() -> str:
    """A name for a container without one: 12 hexadecimal digits."""
    return secrets.token_hex(6)


class Container:
    """One container's directory. Its layers stay until the container is removed."""

    def __init__(self, root: str, name: str) -> None:
        self.name = check_name(name, "container")
        self._root = root
        self.above = f"{root}/containers"
        self.path = f"{self.above}/{name}"
        self.upper, self.work, self.merged = (f"{self.path}/{part}" for part in ("upper", "work", "merged"))

    def exists(self) -> bool:
        return os.path.isdir(self.path)

    @contextmanager
    def claimed(self, *, make: bool) -> Iterator[None]:
        """Lock the directory. Raises UserError, also if it is missing and `make` is false."""
        if make or os.path.lexists(self._root):
            open_root(self._root)
            check_directory(self.above)
        if make:
            make_directory(self.path)
        check_directory(self.path)
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            opened = Owned(os.open(self.path, flags))
        except FileNotFoundError as error:
            raise UserError(
                f"there is no container {quoted(self.name)} in {quoted(self.above)}; check the name and the "
                "storage root."
            ) from error
        with opened as fd:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"container {quoted(self.name)} is running; wait for it to end, or choose another name."
                ) from error
            yield

    def lowers(self) -> tuple[str, ...]:
        """Return the lowers that it was created with; none for a new container."""
        try:
            return tuple(jsonfiles.read(f"{self.path}/{_FACTS}")["lowers"])
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"container {quoted(self.name)} cannot be used: {quoted(self.path)}/{_FACTS} cannot be read; "
                f"remove it by `unionfs rm {quoted(self.name)}`."
            ) from error

    def image(self) -> str | None:
        """Return the id of the image that it was created from, if any."""
        try:
            found = jsonfiles.read(f"{self.path}/{_FACTS}").get("image")
        except (OSError, ValueError, AttributeError):
            return None
        return found if isinstance(found, str) else None

    def make(self, lowers: Sequence[str], *, layers: bool, image: str | None = None) -> None:
        """Create the mountpoint, and with `layers` work and an upper with the topmost lower's attributes.

        `image` is the id of the image that has the lowers.
        """
        with on_failure(
            f"container {quoted(self.name)} cannot be created in {quoted(self.above)}",
            "check the lowers, or give another --root",
        ):
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
                facts = {"lowers": list(lowers), **({"image": image} if image else {})}
                jsonfiles.write(f"{self.path}/{_FACTS}", facts, sync=False)

    def remove(self) -> None:
        """Remove it with all its changes. Raises UserError; an immutable file in it prevents any removal."""
        complaint = f"container {quoted(self.name)} cannot be removed"
        refuse_locked(self.path, complaint)
        self._sweep()
        # Rename it to an invalid container name first, so that a partly removed one is not taken for a
        # container.
        doomed = f"{self.above}/.removed-{secrets.token_hex(8)}"
        with on_failure(f"{complaint} from {quoted(self.above)}", "check the permissions"):
            try:
                os.rename(self.path, doomed)
            except FileNotFoundError:
                return
        remove_all(doomed, f"container {quoted(self.name)} is removed, but not all of its files")

    def _sweep(self) -> None:
        with suppress(FileNotFoundError):
            for name in os.listdir(self.above):
                path = f"{self.above}/{name}"
                if name.startswith(".removed-") and is_own_directory(path):
                    with suppress(OSError):
                        remove_path(path, unlock=True)
