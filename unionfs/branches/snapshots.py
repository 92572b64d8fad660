"""`unionfs snapshot`, without its output: asks the daemon of a mount, and reads the record of its upper."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from typing import Any, Final

from unionfs.daemon.live import LiveMount
from unionfs.daemon.orders import ask_for
from unionfs.daemon.snapshotting import LACKS_NAMES
from unionfs.errors import UserError, quoted
from unionfs.settings.names import check_name
from unionfs.storage.snapshots import Record, base, path_of, read

_CURE: Final = "try again"


def take(mount: LiveMount, name: str | None) -> dict[str, Any]:
    """Take a snapshot; returns what the daemon says of it. Raises UserError."""
    if name is not None:
        check_name(name, "snapshot")
    answer = ask_for(mount, {"order": "snapshot", "name": name})
    if answer.get(LACKS_NAMES) is True:
        complete_links(mount.settings.mountpoint)
        answer = ask_for(mount, {"order": "snapshot", "name": name})
    if answer.get(LACKS_NAMES) is True:
        raise UserError(
            f"{quoted(mount.settings.mountpoint)} cannot have a snapshot: hard links of a lower were changed meanwhile; "
            f"{_CURE}."
        )
    return answer


def restore(mount: LiveMount, name: str) -> dict[str, Any]:
    """Go back to a snapshot; returns what the daemon says. Raises UserError."""
    check_name(name, "snapshot")
    return ask_for(mount, {"order": "restore", "name": name})


def record_of(mount: LiveMount) -> tuple[str, Record]:
    """The upper of a mount, and its snapshots. Raises UserError."""
    upper = mount.settings.upper
    if upper is None:
        raise UserError(
            f"{quoted(mount.settings.mountpoint)} can have no snapshots: it has no upper on a disk; mount it with one."
        )
    return upper, read(upper)


def lowers_of(mount: LiveMount, upper: str, record: Record, id_: str | None) -> list[str]:
    """The layers of a snapshot, topmost first: what a mount of it has as lowers."""
    return [*(path_of(upper, one) for one in record.chain(id_)), *base(upper, mount.settings.lowers)]


def complete_links(mountpoint: str) -> None:
    """Copy up all names of hard links that a copy in the index stands for. Raises UserError."""
    try:
        for path, st in _linked(mountpoint):
            # A change of metadata links the copy under this name in the upper.
            os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns), follow_symlinks=False)
    except OSError as error:
        raise UserError(
            f"{quoted(mountpoint)} cannot have a snapshot: hard links cannot be completed: {error.strerror}; {_CURE}."
        ) from error


def _linked(top: str) -> Iterator[tuple[str, os.stat_result]]:
    device = os.lstat(top).st_dev
    waiting = [top]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                st = entry.stat(follow_symlinks=False)
                if st.st_dev != device:
                    continue
                if stat.S_ISDIR(st.st_mode):
                    waiting.append(entry.path)
                elif st.st_nlink > 1:
                    yield entry.path, st


def shown(mount: LiveMount) -> list[dict[str, Any]]:
    """All snapshots of a mount, the oldest first: plain values. Raises UserError."""
    upper, record = record_of(mount)
    current = set(record.chain(record.head))
    found = []
    for one in record.shown():
        parent = one.parent
        while parent is not None and record.layers[parent].removed:
            parent = record.layers[parent].parent
        found.append({
            "name": one.name, "created": one.created, "parent": None if parent is None else record.layers[parent].name,
            "current": one.id in current, "layer": path_of(upper, one.id),
            "lowers": lowers_of(mount, upper, record, one.id), "files": list(one.files),
        })  # fmt: skip
    return found
