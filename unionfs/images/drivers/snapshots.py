"""Drivers whose containers are snapshots: the lowers are copied once, into a base.

    ROOT/drivers/DRIVER/lock               held while a base or a snapshot is made or removed
    ROOT/drivers/DRIVER/KEY/record.json    one base: its lowers; written last. KEY is their fingerprint
    ROOT/containers/NAME/base              the KEY of a container's base

A base stays for the next container with these lowers. When they have changed, or by `container prune`, it is
removed if no container uses it.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from unionfs.errors import UserError, on_failure, quoted
from unionfs.images.drivers import copying
from unionfs.images.drivers.base import Driver, Writable
from unionfs.images.drivers.fingerprint import fingerprint
from unionfs.images.locks import hold
from unionfs.storage import jsonfiles
from unionfs.storage.measuring import Use
from unionfs.storage.root import make_directory
from unionfs.sys.calls import syncfs
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability, is_host_root
from unionfs.sys.fds import directory, exists, is_directory
from unionfs.sys.trees import remove_path

_RECORD = "record.json"


class Snapshots(Driver):
    """What a driver with snapshots adds is how one is made."""

    # -- what each driver does its own way, with the lock held

    @abstractmethod
    def _new_base(self, key: str, layer: Writable) -> Mapping[str, Any]:
        """Make a base with the content of the lowers; return what its record has to keep."""

    @abstractmethod
    def _delete_base(self, key: str) -> None:
        """Remove a base that may be half-done, if it exists."""

    @abstractmethod
    def _has(self, layer: Writable) -> bool:
        """Whether the layer is complete. Raises OSError: one that is not is made anew."""

    @abstractmethod
    def _snapshot(self, key: str, layer: Writable) -> None:
        """Make a writable snapshot of a base."""

    @abstractmethod
    def _delete(self, layer: Writable) -> None:
        """Remove a snapshot that may be half-done, if it exists."""

    @abstractmethod
    def _trees(self, layer: Writable, key: str) -> AbstractContextManager[tuple[str, str]]:
        """Directories with the content of the layer and of its base."""

    @abstractmethod
    def _base_size(self, key: str) -> int:
        """The bytes of a base."""

    def _need_root(self) -> None:
        if not (is_host_root() and has_capability(CAP_SYS_ADMIN)):
            raise UserError(
                f"storage driver {self.name} needs root, and that of a user namespace has too few rights; "
                "run it as root, or choose the storage driver union or vfs."
            )

    # -- the interface

    def create(self, layer: Writable) -> None:
        if self._has(layer):
            return
        key = fingerprint(layer.lowers, self.root)
        with self._locked():
            self._delete(layer)
            if key not in self._bases():
                self._discard(key)
                make_directory(self._home(key))
                try:
                    kept = self._new_base(key, layer)
                except BaseException:
                    with suppress(UserError, OSError):  # `prune` tries it again
                        self._discard(key)  # it may have filled what it is on
                    raise
                lowers = list(layer.lowers)
                with directory(self._home(key)) as fd:
                    syncfs(fd)
                jsonfiles.write(f"{self._home(key)}/{_RECORD}", {"lowers": lowers, **kept})
            with open(f"{layer.path}/base", "w", encoding="ascii") as file:
                file.write(key)
            self._snapshot(key, layer)
            self._remove_unused(lambda record: record.get("lowers") == list(layer.lowers))

    def diff(self, layer: Writable) -> Iterator[tuple[str, bytes]]:
        with self._trees(layer, self._key(layer)) as (tree, base):
            yield from copying.changes_since(tree, [base])

    def size(self, layer: Writable) -> int:
        with self._trees(layer, self._key(layer)) as (tree, base):
            return copying.size_of_changes(tree, [base])

    def remove(self, layer: Writable) -> None:
        with self._locked():
            self._delete(layer)

    def shared(self) -> list[Use]:
        used = self._used()
        return [Use(f"{self.name}/{key}", self._base_size(key), key in used) for key in self._bases()]

    def prune(self) -> list[str]:
        if not is_directory(self._home()):
            return []
        with self._locked():
            return self._remove_unused(lambda record: True)

    # -- bases

    def _home(self, key: str = "") -> str:
        return f"{self.root}/drivers/{self.name}/{key}".rstrip("/")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        make_directory(self._home())
        with hold(f"{self._home()}/lock", alone=True):
            yield

    def _record(self, key: str) -> dict[str, Any]:
        """Raises UserError."""
        path = f"{self._home(key)}/{_RECORD}"
        with on_failure(f"base {key} has no readable record", f"remove {quoted(path)}", OSError, ValueError):
            found: dict[str, Any] = jsonfiles.read(path)
        return found

    def _all(self) -> list[str]:
        """All bases, also those that are half-done."""
        try:
            return sorted(name for name in os.listdir(self._home()) if is_directory(self._home(name)))
        except FileNotFoundError:
            return []

    def _bases(self) -> list[str]:
        return [key for key in self._all() if exists(f"{self._home(key)}/{_RECORD}")]

    def _key(self, layer: Writable) -> str:
        with open(f"{layer.path}/base", encoding="ascii") as file:
            return file.read()

    def _used(self) -> set[str]:
        """The bases of all containers. Raises OSError."""
        found = set()
        with suppress(FileNotFoundError):
            for name in os.listdir(f"{self.root}/containers"):
                with suppress(FileNotFoundError, NotADirectoryError, ValueError):
                    found.add(self._key(Writable(f"{self.root}/containers/{name}", self.root)))
        return found

    def _remove_unused(self, wanted: Callable[[Mapping[str, Any]], bool]) -> list[str]:
        """Remove bases that no container uses: half-done ones, and those whose record is `wanted`."""
        used, complete, gone = self._used(), self._bases(), []
        for key in self._all():
            if key not in used and (key not in complete or wanted(self._record(key))):
                self._discard(key)
                gone.append(f"{self.name}/{key}")
        return gone

    def _discard(self, key: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(f"{self._home(key)}/{_RECORD}")
        self._delete_base(key)
        remove_path(self._home(key))
