"""The storage of containers: ROOT/containers/NAME/{merged,container.json,driver}.

Its storage driver keeps more there (`images.drivers`). The file `driver` holds that driver's name; without it
the driver is `union`.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from unionfs.errors import UserError, on_failure, quoted
from unionfs.settings.drivers import DEFAULT, parse_storage_driver
from unionfs.settings.names import anonymous_name, check_name, is_name
from unionfs.settings.specs import Spec, VolumeSpec
from unionfs.storage import jsonfiles
from unionfs.storage.measuring import Use
from unionfs.storage.removing import refuse_locked, refuse_mounted, remove_all
from unionfs.storage.root import check_directory, is_own_directory, make_directory, open_root
from unionfs.sys.fds import Owned, exists, is_directory
from unionfs.sys.trees import remove_path

if TYPE_CHECKING:
    from unionfs.images.drivers import Driver, Writable

_FACTS = "container.json"
_DRIVER = "driver"
_END_SECONDS = 10.0
_POLL_SECONDS = 0.05


def names(root: str) -> list[str]:
    """The names of all kept containers of a storage root, sorted. Raises OSError."""
    try:
        return sorted(filter(is_name, os.listdir(f"{root}/containers")))
    except FileNotFoundError:
        return []


def uses(root: str) -> list[Use]:
    """The containers with the size of their changes; active are those that run."""
    found = []
    for name in names(root):
        container = Container(root, name)
        size = 0
        with suppress(OSError, UserError):
            size = container.storage_driver().size(container.layer())
        found.append(Use(name, size, container.is_running()))
    return found


def lowers_of_all(root: str) -> dict[str, str]:
    """The lowers of all kept containers of a storage root, and which container has them. Raises UserError."""
    found = {}
    for name in names(root):
        for lower in Container(root, name).lowers():
            found[lower] = f"container {quoted(name)}"
    return found


def new_name() -> str:
    """A name for a container without one: 12 hexadecimal digits."""
    return os.urandom(6).hex()


def _lock(fd: int) -> bool:
    """Lock a file, if nobody has locked it; return whether it is locked."""
    with suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


class Container:
    """One container's directory. Its layers stay until the container is removed."""

    def __init__(self, root: str, name: str) -> None:
        self.name = check_name(name, "container")
        self.root = root
        self.above = f"{root}/containers"
        self.path = f"{self.above}/{name}"
        self.merged = f"{self.path}/merged"

    def exists(self) -> bool:
        """Raises UserError if that is not known."""
        with on_failure(f"container {quoted(self.name)} cannot be used", "check the storage root"):
            return is_directory(self.path)

    def check(self) -> None:
        """Refuse one that another user could have changed. Raises UserError."""
        if os.path.lexists(self.root):
            open_root(self.root)
            check_directory(self.above)
            check_directory(self.path)

    def is_running(self) -> bool:
        """Return whether a process holds the lock of the container."""
        try:
            with Owned(os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    @contextmanager
    def claimed(self, *, make: bool, ends: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Lock the directory. Raises UserError, also if it is missing and `make` is false.

        Waits for a process that holds it while `ends` says that its command has ended, for some seconds.
        """
        if make or os.path.lexists(self.root):
            open_root(self.root)
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
            deadline = time.monotonic() + _END_SECONDS
            while not (locked := _lock(fd)) and ends() and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
            if not locked:
                stop = f"stop it by `unionfs stop {quoted(self.name)}`"
                cure = "wait until it ends, or choose another name" if make else f"{stop}, or use --force"
                raise UserError(f"container {quoted(self.name)} is running; {cure}.")
            yield

    def lowers(self) -> tuple[str, ...]:
        """Return the lowers that it was created with; none for a new container."""
        try:
            with (
                on_failure(f"container {quoted(self.name)} cannot be read", "check the storage root"),
                suppress(FileNotFoundError),
            ):
                return tuple(jsonfiles.read(f"{self.path}/{_FACTS}")["lowers"])
            return ()
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"container {quoted(self.name)} cannot be used: {quoted(self.path)}/{_FACTS} is damaged; "
                f"remove it by `unionfs rm {quoted(self.name)}`."
            ) from error

    def with_its_volumes(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        """The specs with names for anonymous volumes: those that earlier runs had at the same target.

        New ones are remembered. Raises UserError.
        """
        anonymous = [spec for spec in specs if isinstance(spec, VolumeSpec) and spec.name is None]
        if not anonymous:
            return tuple(specs)
        known = self.volumes()
        named = {spec.target: known.get(spec.target) or anonymous_name() for spec in anonymous}
        with on_failure(f"container {quoted(self.name)} cannot be changed", "free space"):
            if exists(f"{self.path}/{_FACTS}"):
                facts = jsonfiles.read(f"{self.path}/{_FACTS}")
                jsonfiles.write(f"{self.path}/{_FACTS}", {**facts, "volumes": {**known, **named}}, sync=False)
        return tuple(
            replace(spec, name=named[spec.target])
            if isinstance(spec, VolumeSpec) and spec.name is None
            else spec
            for spec in specs
        )

    def volumes(self) -> dict[str, str]:
        """Return the names of its anonymous volumes by target. Raises UserError."""
        try:
            with on_failure(f"container {quoted(self.name)} cannot be read", "check the storage root"):
                if not exists(f"{self.path}/{_FACTS}"):
                    return {}
                found = jsonfiles.read(f"{self.path}/{_FACTS}").get("volumes")
        except (ValueError, AttributeError):
            return {}
        if not isinstance(found, dict):
            return {}
        return {
            str(target): name for target, name in found.items() if isinstance(name, str) and is_name(name)
        }

    def driver(self) -> str | None:
        """Return the name of the storage driver that it was created with; None for a new container. Raises
        UserError: another driver would leave its layer.
        """
        with on_failure(f"container {quoted(self.name)} cannot be read", "check the storage root"):
            with (
                suppress(FileNotFoundError),
                open(f"{self.path}/{_DRIVER}", encoding="ascii", errors="replace") as file,
            ):
                return file.read().strip()
            return DEFAULT if exists(f"{self.path}/{_FACTS}") else None

    def storage_driver(self) -> Driver:
        """Return its driver. Raises UserError."""
        # For start-up time: many commands use none.
        from unionfs.images.drivers import open_driver

        return open_driver(parse_storage_driver(self.driver() or DEFAULT), self.root)

    def layer(self) -> Writable:
        """Return its writable layer, for its driver. Raises UserError."""
        # For start-up time: many commands use none.
        from unionfs.images.drivers.base import Writable

        return Writable(self.path, self.root, self.lowers())

    def image(self) -> str | None:
        """Return the id of the image that it was created from, if any. Raises UserError."""
        found = None
        with (
            on_failure(f"container {quoted(self.name)} cannot be read", "check the storage root"),
            suppress(ValueError, AttributeError, FileNotFoundError),
        ):
            found = jsonfiles.read(f"{self.path}/{_FACTS}").get("image")
        return found if isinstance(found, str) else None

    def make(self, layer: Writable, driver: Driver | None, *, image: str | None = None) -> None:
        """Create the mountpoint, and with a driver the writable layer; None: the caller has an upper.

        `image` is the id of the image that has the lowers.
        """
        with on_failure(
            f"container {quoted(self.name)} cannot be created in {quoted(self.above)}",
            "check the lowers, or give another --root",
        ):
            with suppress(FileExistsError):
                os.mkdir(self.merged, 0o700)
            if driver is None:
                return
            if driver.name != DEFAULT and self.driver() is None:
                # First, so that `remove` knows what a killed process has begun.
                with open(f"{self.path}/{_DRIVER}", "w", encoding="ascii") as file:
                    file.write(f"{driver.name}\n")
            driver.create(layer)
            if not exists(f"{self.path}/{_FACTS}"):
                facts = {"lowers": list(layer.lowers), **({"image": image} if image else {})}
                jsonfiles.write(f"{self.path}/{_FACTS}", facts, sync=False)

    def remove(self) -> None:
        """Remove it with all its changes. Raises UserError; an immutable file in it prevents any removal."""
        complaint = f"container {quoted(self.name)} cannot be removed"
        if self.driver() not in (None, DEFAULT):
            # For start-up time: many commands use none.
            from unionfs.images.drivers.base import Writable

            refuse_mounted(self.path, complaint)
            with on_failure(complaint, "check the storage driver"):
                self.storage_driver().remove(Writable(self.path, self.root))
        refuse_locked(self.path, complaint)
        self._sweep()
        # Rename it to an invalid container name first, so that a partly removed one is not taken for a
        # container.
        doomed = f"{self.above}/.removed-{os.urandom(8).hex()}"
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
