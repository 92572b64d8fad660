"""The driver `devicemapper`: a base is a thin device with ext4, a container a snapshot of it.

    ROOT/drivers/devicemapper/data, metadata    sparse files: the pool, on two loop devices
    ROOT/drivers/devicemapper/last              the last number given to a device
    ROOT/containers/NAME/device                 the number of a container's device

The pool and the devices are active only while a container runs, or while a base is made or looked at, so that
nothing is left in the kernel between. Source: dmsetup(8) and the kernel's
Documentation/admin-guide/device-mapper/thin-provisioning.rst.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from unionfs.errors import UserError
from unionfs.images.drivers import copying
from unionfs.images.drivers.base import Wanted, Writable
from unionfs.images.drivers.private import PrivateMount, attach_device, mounted_device
from unionfs.images.drivers.snapshots import Snapshots
from unionfs.storage.mounts import need_program, run_program
from unionfs.storage.usage import size_of_tree
from unionfs.sys import loop
from unionfs.sys.fds import Owned, exists

_SECTOR = 512
_DATA = 100 << 30
_METADATA = 2 << 30
_DEVICE = 10 << 30
"""Bytes; docker's sizes (dm.loopdatasize, dm.loopmetadatasize, dm.basesize). Written blocks take space."""
_POOL_OPTIONS = "128 0 1 skip_block_zeroing"
"""Blocks of 64 KiB, no low water mark."""
_OTHER = "choose another driver"


class DeviceMapper(Snapshots):
    name = "devicemapper"

    def check(self) -> None:
        self._need_root()
        need_program("dmsetup", "dmsetup", "storage driver devicemapper")
        need_program("mkfs.ext4", "e2fsprogs", "storage driver devicemapper")
        try:
            # dmsetup loads the module for a table, not for this list: the kernel has device-mapper at all.
            self._dmsetup("targets")
        except UserError as error:
            raise UserError(
                "storage driver devicemapper: this kernel has no device-mapper; load the modules dm_mod and "
                f"dm_thin_pool, or {_OTHER}."
            ) from error

    def mount(self, layer: Writable, wanted: Wanted) -> PrivateMount:
        number = _number(layer)

        def attach() -> None:
            with self._locked():
                attach_device("ext4", self._activate(number), layer.merged)

        def detach() -> None:
            with self._locked():
                self._deactivate(number)

        return PrivateMount(layer, wanted, attach, detach)

    def _new_base(self, key: str, layer: Writable) -> Mapping[str, Any]:
        number = self._next()
        with self._active():
            self._message(f"create_thin {number}")
            device = self._activate(number)
            try:
                self._run("mkfs.ext4", "-q", "-E", "nodiscard,root_owner=0:0", device)
                with mounted_device("ext4", device) as tree:
                    os.rmdir(f"{tree}/lost+found")
                    copying.copy_lowers(layer, tree, f"a thin device of {_DEVICE >> 30} GiB")
                    size = size_of_tree(tree)
            finally:
                self._deactivate(number)
        return {"number": number, "size": size}

    def _delete_base(self, key: str) -> None:
        """The device of a half-done base stays in the pool: only its record has its number."""
        with suppress(UserError, KeyError):
            self._delete_device(int(self._record(key)["number"]))

    def _has(self, layer: Writable) -> bool:
        return exists(f"{layer.path}/device")

    def _snapshot(self, key: str, layer: Writable) -> None:
        number = self._next()
        with self._active():
            # The base is inactive, so it needs not be suspended.
            self._message(f"create_snap {number} {self._record(key)['number']}")
        _write(f"{layer.path}/device", str(number))

    def _delete(self, layer: Writable) -> None:
        if self._has(layer):
            self._delete_device(_number(layer))
            os.unlink(f"{layer.path}/device")

    @contextmanager
    def _trees(self, layer: Writable, key: str) -> Iterator[tuple[str, str]]:
        numbers = _number(layer), int(self._record(key)["number"])
        with self._locked(), ExitStack() as undo:
            running = self._name(numbers[0]) in self._devices()
            for number in numbers[1:] if running else numbers:
                undo.callback(self._deactivate, number)
            tree = undo.enter_context(mounted_device("ext4", self._activate(numbers[0])))
            base = undo.enter_context(mounted_device("ext4", self._activate(numbers[1]), read_only=True))
            yield tree, base

    def _base_size(self, key: str) -> int:
        return int(self._record(key)["size"])

    # -- devices, with the lock held

    def _name(self, number: int | str) -> str:
        return f"unionfs-{hashlib.sha256(os.fsencode(self.root)).hexdigest()[:8]}-{number}"

    def _next(self) -> int:
        path = f"{self._home()}/last"
        number = 1
        with suppress(FileNotFoundError), open(path, encoding="ascii") as file:
            number = int(file.read()) + 1
        _write(path, str(number))
        return number

    def _devices(self) -> dict[str, str]:
        """The active devices of this storage root, and its pool, with their paths.

        Those of devtmpfs: names in /dev/mapper come later, from udev, or never.
        """
        found = {}
        for path in glob.glob("/sys/block/dm-*/dm/name"):
            with suppress(OSError), open(path, encoding="ascii", errors="replace") as file:
                found[file.read().strip()] = f"/dev/{path.split('/')[3]}"
        return {name: path for name, path in found.items() if name.startswith(self._name(""))}

    @contextmanager
    def _active(self) -> Iterator[str]:
        """The path of the pool, active."""
        pool = self._name("pool")
        if pool not in self._devices():
            with ExitStack() as fds:
                devices = []
                for file, size in (("metadata", _METADATA), ("data", _DATA)):
                    opened = fds.enter_context(Owned(self._opened(file, size)))
                    # The kernel releases the loop device with the pool.
                    fd, path = loop.attach(opened, read_only=False)
                    fds.enter_context(Owned(fd))
                    devices.append(path)
                table = f"0 {_DATA // _SECTOR} thin-pool {' '.join(devices)} {_POOL_OPTIONS}"
                self._create(pool, table)
        try:
            yield self._devices()[pool]
        finally:
            self._deactivate_pool()

    def _opened(self, name: str, size: int) -> int:
        fd = os.open(f"{self._home()}/{name}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
        return fd

    def _activate(self, number: int) -> str:
        """Activate a device, and the pool; return its path."""
        name = self._name(number)
        if name not in self._devices():
            with self._active() as pool:
                self._create(name, f"0 {_DEVICE // _SECTOR} thin {pool} {number}")
        return self._devices()[name]

    def _deactivate(self, number: int) -> None:
        with suppress(UserError):  # it was not active, or something still uses it: then until that ends
            self._dmsetup("remove", "--retry", "--noudevsync", self._name(number))
        self._deactivate_pool()

    def _deactivate_pool(self) -> None:
        """Remove the pool unless a device uses it."""
        if list(self._devices()) == [self._name("pool")]:
            self._dmsetup("remove", "--retry", "--noudevsync", self._name("pool"))

    def _delete_device(self, number: int) -> None:
        self._deactivate(number)
        with self._active():
            self._message(f"delete {number}")

    def _create(self, name: str, table: str) -> None:
        self._dmsetup("create", name, "--noudevrules", "--noudevsync", "--table", table)

    def _message(self, text: str) -> None:
        self._dmsetup("message", self._name("pool"), "0", text)

    def _dmsetup(self, *words: str) -> str:
        return self._run("dmsetup", *words)

    def _run(self, *words: str) -> str:
        complaint = f"storage driver devicemapper: `{' '.join(words[:2])}` failed"
        return run_program(words, complaint, cure="see `dmesg`")


def _number(layer: Writable) -> int:
    with open(f"{layer.path}/device", encoding="ascii") as file:
        return int(file.read())


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


DRIVER = DeviceMapper
