"""`unionfs snapshot`, without its output: asks the daemon of a mount, and reads the record of its upper."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

from unionfs.branches.view import View
from unionfs.daemon.live import LiveMount, live_mounts
from unionfs.daemon.orders import ask_for, give
from unionfs.daemon.snapshotting import LACKS_NAMES
from unionfs.errors import UserError, cure_for, on_failure, path_in, quoted, reason
from unionfs.images.indexed import opened_index
from unionfs.settings.names import check_name
from unionfs.storage.snapshot_record import Record
from unionfs.storage.snapshots import base, opened, path_of, read
from unionfs.sys.fds import Owned
from unionfs.sys.mountinfo import read_mountinfo
from unionfs.sys.stopping import Stopped, writers
from unionfs.union.diff import between
from unionfs.union.joining import join
from unionfs.union.markers import Markers

_CURE: Final = "try again"
_STOP_SECONDS: Final = 5.0
_LONGEST_STOP: Final = 120.0


def take(mount: LiveMount, name: str | None, *, stop: bool = True) -> dict[str, Any]:
    """Take a snapshot. Returns the daemon's answer, and the number of processes that were `stopped` for it:
    those that have files open for writing, unless `stop` is False. Raises UserError."""
    _check_own(mount)
    if name is not None:
        check_name(name, "snapshot")
    answer = _take(mount, name, stop=stop)
    if answer.get(LACKS_NAMES) is True:
        complete_links(mount.settings.mountpoint)
        answer = _take(mount, name, stop=stop)
    if answer.get(LACKS_NAMES) is True:
        raise UserError(
            f"{quoted(mount.settings.mountpoint)} cannot have a snapshot: hard links of a lower were changed "
            "meanwhile; "
            f"{_CURE}."
        )
    return answer


def _take(mount: LiveMount, name: str | None, *, stop: bool) -> dict[str, Any]:
    question = {"order": "snapshot", "name": name}
    if stop:  # so that less is left to be written while programs are stopped
        give(mount, "sync", "written to disk", "check the disk of the upper")
    # So that those who are stopped go on in any case.
    signal.setitimer(signal.ITIMER_REAL, _LONGEST_STOP if stop else 0)
    try:
        with Stopped() as stopped:
            still = stop and stopped.stop_all(partial(_writers, mount), _STOP_SECONDS)
            answer = ask_for(mount, {**question, "still": still})
            return {**answer, "stopped": len(stopped.pids)}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _writers(mount: LiveMount) -> set[int]:
    return writers(mount.device) - {mount.pid}


def restore(mount: LiveMount, name: str) -> dict[str, Any]:
    """Restore a snapshot. Returns the daemon's answer. Raises UserError."""
    _check_own(mount)
    check_name(name, "snapshot")
    return ask_for(mount, {"order": "restore", "name": name})


def _check_own(mount: LiveMount) -> None:
    """Raise UserError for a mount of another user, whose layers root does not touch."""
    if mount.uid is not None:
        raise UserError(
            f"{quoted(mount.settings.mountpoint)} is a mount of uid {mount.uid}, whose layers root does not "
            "touch; run "
            "it as that user."
        )


def record_of(mount: LiveMount) -> tuple[str, Record]:
    """The upper of a mount, and its snapshots. Raises UserError."""
    _check_own(mount)
    upper = mount.settings.upper
    if upper is None:
        raise UserError(
            f"{quoted(mount.settings.mountpoint)} can have no snapshots: it has no upper on a disk; mount it "
            "with one."
        )
    return upper, read(upper)


def lowers_of(mount: LiveMount, upper: str, record: Record, id_: str | None) -> list[str]:
    """The layers of a snapshot, topmost first, as the lowers of a mount of it."""
    return [*(path_of(upper, one) for one in record.chain(id_)), *base(upper, mount.settings.lowers)]


def complete_links(mountpoint: str) -> None:
    """Copy up all names of the hard links that are copied up in the index. Raises UserError."""
    try:
        for path, st in _linked(mountpoint):
            # A change of metadata links the copy under this name in the upper.
            os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns), follow_symlinks=False)
    except OSError as error:
        raise UserError(
            f"{quoted(mountpoint)} cannot have a snapshot: hard links cannot be completed: {error.strerror}; "
            f"{cure_for(error, _CURE)}."
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
            "name": one.name, "created": one.created,
            "parent": None if parent is None else record.layers[parent].name,
            "current": one.id in current, "layer": path_of(upper, one.id),
            "lowers": lowers_of(mount, upper, record, one.id), "files": list(one.files),
        })  # fmt: skip
    return found


def remove(mount: LiveMount, names: Sequence[str]) -> bool:
    """Remove the names of snapshots. Returns whether `merge` has layers to join. Raises UserError."""
    upper, record = record_of(mount)
    for name in names:
        check_name(name, "snapshot")
        one = record.named(name, upper)
        if user := _user_of(mount, upper, record, one.id):
            raise UserError(
                f"snapshot {quoted(name)} is in use by the mount at {quoted(user)}; unmount that first."
            )
    with (
        on_failure(f"the snapshots of {quoted(upper)} cannot be changed", "check the disk"),
        opened(upper) as store,store.locked()
    ):
        record = store.record()
        for name in names:
            record = record.with_layer(replace(record.named(name, upper), removed=True))
        store.save(record)
    return next(_steps(mount, upper, record), None) is not None


def has_to_join(mount: LiveMount) -> bool:
    """Whether `merge` has layers to join or to remove. Raises UserError."""
    upper, record = record_of(mount)
    return next(_steps(mount, upper, record), None) is not None


def merge(mount: LiveMount) -> None:
    """Join removed layers with those that lie on them, and remove those that nothing lies on. Raises
    UserError."""
    upper, _ = record_of(mount)
    markers = Markers(b"user.overlay." if mount.settings.userxattr else b"trusted.overlay.")
    complaint, cure = (
        f"the snapshots of {quoted(upper)} cannot be joined",
        "check the disk, and remove one again",
    )
    with on_failure(complaint, cure), opened(upper) as store, store.joining() as alone:
        if not alone:
            return  # that process does it
        while (step := next(_steps(mount, upper, record := store.record()), None)) is not None:
            gone, child = step
            if child is None:
                with store.locked():
                    store.save(store.record().without(gone))
                continue
            with Owned(store.make_joint()) as fd:
                join([path_of(upper, child), *lowers_of(mount, upper, record, gone)], fd, markers)
            store.put_joint(gone, child)
    with on_failure(complaint, cure), opened(upper) as store:
        used = {os.path.basename(path) for path in mount.settings.lowers}
        with store.locked():
            waste = [name for name in store.waste() if name not in used]
        for name in waste:
            store.discard(name)


def _steps(mount: LiveMount, upper: str, record: Record) -> Iterator[tuple[str, str | None]]:
    """The pairs that can be joined: a removed layer and the only one on it, or None. The upper's index refers
    to the layer below the upper, so that one stays until another one lies on it."""
    user_of = partial(_user_of, mount, upper, record)
    for one in record.layers.values():
        children = record.children(one.id)
        if not one.removed or one.id == record.head or user_of(one.id):
            continue
        if not children:
            yield one.id, None
        elif len(children) == 1 and children[0] != record.head and not user_of(children[0]):
            yield one.id, children[0]


def _user_of(mount: LiveMount, upper: str, record: Record, id_: str) -> str | None:
    """The mountpoint of another mount that has a layer."""
    path = path_of(upper, id_)
    for other in live_mounts():
        if other.name != mount.name and path in other.settings.lowers:
            return other.settings.mountpoint
    for entry in read_mountinfo():
        if entry.fstype == "overlay" and path in (entry.super_option("lowerdir") or "").split(":"):
            return entry.mountpoint
    return None


@contextmanager
def compared(mount: LiveMount, name: str, other: str | None) -> Iterator[View]:
    """The changes from a snapshot to another one, or, for None, to the present state. Raises UserError."""
    upper, record = record_of(mount)
    before = lowers_of(mount, upper, record, record.named(name, upper).id)
    if other is None:
        # Written data may still be in the page cache of the mount.
        give(mount, "sync", "compared", _CURE)
        now = [upper, *lowers_of(mount, upper, record, record.head)]
    else:
        now = lowers_of(mount, upper, record, record.named(other, upper).id)
    markers = Markers(
        b"user.overlay." if mount.settings.userxattr else b"trusted.overlay.",
        follows_redirects=True if os.geteuid() != 0 else None,
    )
    with ExitStack() as resources:
        try:
            merge, root = resources.enter_context(between(before, now, markers, upper=other is None))
            index = None
            if other is None and mount.settings.work is not None:
                index = resources.enter_context(opened_index(mount.settings.work, merge))
            view = View(merge, root, index)
        except OSError as error:
            at = f"{quoted(path)}: " if (path := path_in(error)) else ""
            raise UserError(
                f"the snapshots of {quoted(upper)} cannot be read: {at}{reason(error)}; check their "
                "directory."
            ) from error
        yield view
