"""The driver `union`: the volume is a union."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from unionfs.errors import UserError, on_failure, quoted, reason
from unionfs.settings.options import split_lowers
from unionfs.storage.drivers.base import Driver, Prepared, Replacement
from unionfs.storage.drivers.replacing import exchange
from unionfs.storage.filters import truth
from unionfs.storage.model import Volume
from unionfs.storage.mounts import mount_at, run_program
from unionfs.storage.removing import refuse_locked
from unionfs.sys.fds import sync_directory
from unionfs.sys.filelocks import holders
from unionfs.sys.liveness import is_dead
from unionfs.sys.mountusers import users_of_mount
from unionfs.sys.process import pid_and_start, wait_gone
from unionfs.sys.trees import remove_path
from unionfs.sys.unmount import unmount

# How long a daemon may take to notice the unmount.
_NOTICE_SECONDS = 5.0


class UnionDriver(Driver):
    """A volume over read-only lowers.

    Every user has a separate view, whose changes end with it; with `shared` all users have one view, whose
    changes persist.
    """

    name = "union"
    known_options: Mapping[str, str] = {
        "lower": "the lowers, topmost first, as A:B",
        "shared": "one view for all, whose changes stay",
    }

    def check(self, options: Mapping[str, str]) -> None:
        super().check(options)
        if not options.get("lower"):
            raise UserError(
                "the volume option lower is missing; name the lowers, topmost first, as -o lower=A:B."
            )
        for lower in split_lowers(options["lower"]):
            if not lower.startswith("/"):
                raise UserError(f"the lower {quoted(lower)} is relative; give absolute paths.")
            if not os.path.isdir(lower):
                raise UserError(f"the lower {quoted(lower)} is not a directory; create it first.")
        self._shared(options)

    def _shared(self, options: Mapping[str, str]) -> bool:
        value = options.get("shared", "false")
        return truth(value, "shared") if value else True

    def one_mount_each(self, volume: Volume) -> bool:
        return not self._shared(volume.options)

    def create(self, volume: Volume) -> None:
        for name in ("_data", "upper", "work") if self._shared(volume.options) else ("views",):
            os.mkdir(f"{volume.directory}/{name}", 0o755)

    def mountpoint(self, volume: Volume) -> str:
        return f"{volume.directory}/_data" if self._shared(volume.options) else ""

    def remove(self, volume: Volume) -> None:
        if self._shared(volume.options):
            self.unmount(volume, "")
            _sweep(volume)
            return
        views = f"{volume.directory}/views"
        for name in os.listdir(views) if os.path.isdir(views) else ():
            _unmount(f"{views}/{name}/merged")

    def _view(self, volume: Volume, user: str) -> str:
        return f"{volume.directory}/views/{hashlib.sha256(os.fsencode(user)).hexdigest()[:24]}"

    def mount(self, volume: Volume, user: str) -> str:
        if self._shared(volume.options):
            data = f"{volume.directory}/_data"
            if _is_alive(data):
                return data
            _mount(volume, f"{volume.directory}/upper", f"{volume.directory}/work", data)
            return data
        view = self._view(volume, user)
        merged = f"{view}/merged"
        if _is_alive(merged):
            return merged
        _remove(view)  # left by an earlier user of the same text
        for name in ("", "/upper", "/work", "/merged"):
            os.mkdir(view + name, 0o755)
        # The root of a view has the attributes of the topmost lower.
        shutil.copystat(split_lowers(volume.options["lower"])[0], f"{view}/upper")
        try:
            _mount(volume, f"{view}/upper", f"{view}/work", merged)
        except UserError:
            _remove(view)
            raise
        return merged

    def unmount(self, volume: Volume, user: str) -> None:
        if self._shared(volume.options):
            _unmount(f"{volume.directory}/_data")
            return
        view = self._view(volume, user)
        _unmount(f"{view}/merged")
        _remove(view)

    @contextmanager
    def replacement(self, volume: Volume) -> Iterator[Replacement]:
        if not self._shared(volume.options):
            raise UserError(
                f"volume {quoted(volume.name)} cannot be restored: each user gets a new view of the lowers, "
                "which is discarded afterwards; use a union with -o shared."
            )
        _sweep(volume)
        place = tempfile.mkdtemp(prefix=".restore-", dir=volume.directory)
        merged = f"{place}/merged"

        def commit() -> None:
            refuse_locked(f"{volume.directory}/upper", "the volume's content cannot be replaced")
            _unmount(merged)
            _unmount(f"{volume.directory}/_data")
            exchange(f"{volume.directory}/upper", f"{place}/upper")
            sync_directory(volume.directory)

        try:
            for name in ("upper", "work", "merged"):
                os.mkdir(f"{place}/{name}", 0o755)
            _hide(split_lowers(volume.options["lower"]), f"{place}/upper")
            _mount(volume, f"{place}/upper", f"{place}/work", merged)
            yield Prepared(merged, commit)
        finally:
            with suppress(UserError):
                _unmount(merged)
            if mount_at(merged) is None:
                _remove(place)

    def check_clone(self, volume: Volume) -> None:
        if not self._shared(volume.options):
            raise UserError(
                f"volume {quoted(volume.name)} has no content of its own to clone; make another volume with "
                "the same lowers."
            )

    def status(self, volume: Volume) -> Mapping[str, object]:
        return {"shared": self._shared(volume.options)}


def _remove(path: str) -> None:
    """Remove a view or a restore's directory; after a failure the next use of the name tries again."""
    with suppress(OSError):
        remove_path(path, unlock=True)


def _sweep(volume: Volume) -> None:
    for name in os.listdir(volume.directory):
        if name.startswith(".restore-"):
            _unmount(f"{volume.directory}/{name}/merged")
            _remove(f"{volume.directory}/{name}")


def _hide(lowers: Sequence[str], upper: str) -> None:
    """Hide all entries of the lowers with whiteouts (Documentation/filesystems/overlayfs.rst)."""
    for name in {name for lower in lowers for name in os.listdir(lower)}:
        with on_failure(f"whiteouts cannot be made in {quoted(upper)}", "use another storage root"):
            os.mknod(f"{upper}/{name}", stat.S_IFCHR, 0)


def _mount(volume: Volume, upper: str, work: str, target: str) -> None:
    command = [sys.executable, "-m", "unionfs", "mount"]
    for lower in split_lowers(volume.options["lower"]):
        command += ["-l", lower]
    run_program(
        (*command, "-u", upper, "-w", work, target), f"volume {quoted(volume.name)} cannot be mounted"
    )


def _is_alive(target: str) -> bool:
    """Whether a union is mounted and answers; unmounts one whose daemon is dead."""
    if mount_at(target) is None:
        return False
    if is_dead(os.path.realpath(os.path.dirname(target)) + "/" + os.path.basename(target)):
        _unmount(target)
        return False
    return True


def _unmount(target: str) -> None:
    mount = mount_at(target)
    if mount is None:
        return
    daemons = _daemons(f"{os.path.dirname(target)}/upper")
    try:
        unmount(mount, lazy=is_dead(mount.mountpoint))
    except OSError as error:
        if mount_at(target) is not None:
            users = users_of_mount(mount.mount_id, mount.device)
            cause = "used by " + ", ".join(map(str, users)) if users else reason(error)
            raise UserError(f"{quoted(target)} is busy: {cause}; stop that first.") from error
    began = time.monotonic()
    for pid, started in daemons:
        while not wait_gone(pid, started, 0.2):
            # It may live on in another mount namespace created after it; here it is gone.
            if time.monotonic() > began + _NOTICE_SECONDS and _serves(pid):
                break


def _daemons(upper: str) -> list[tuple[int, int]]:
    """The daemons that hold an upper's lock, with their start times."""
    with suppress(OSError):
        return [pid_and_start(pid) for pid in holders(os.stat(upper)) if _serves(pid)]
    return []


def _serves(pid: int) -> bool:
    """Whether a process has not closed its connection to FUSE, as a daemon does that ends."""
    with suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/fuse":
                    return True
    return False
