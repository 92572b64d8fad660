"""Branches as mounts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from unionfs.branches import seen
from unionfs.branches.beneath import opened
from unionfs.branches.ids import entered
from unionfs.branches.parts import parts_of
from unionfs.branches.record import WHOLE, Record
from unionfs.branches.store import Branch, Store
from unionfs.branches.view import viewed
from unionfs.daemon import live
from unionfs.daemon.caller import CALLER
from unionfs.daemon.process import mount
from unionfs.daemon.settle import settle
from unionfs.daemon.unmount import umount
from unionfs.errors import UserError, on_failure, quoted
from unionfs.settings.mount import MountSettings
from unionfs.sys.mountinfo import mounted_at
from unionfs.sys.process import pid_and_start


def mount_of(branch: Branch) -> live.LiveMount | None:
    """The mount of a branch, None if it is not mounted."""
    # Another mount namespace may still have it: that daemon goes on, and can change nothing any more.
    known = (entry for entry in live.entries() if entry.settings.upper == branch.upper)
    return next((entry for entry in known if entry.mounts()), None)


def has_daemon(branch: Branch) -> bool:
    """Whether a daemon still serves it, if only for another mount namespace or to open files."""
    return any(entry.settings.upper == branch.upper and entry.is_alive() for entry in live.entries())


def mount_branch(
    branch: Branch, mountpoint: str | None = None, *, lives_with: int | None = None
) -> MountSettings:
    """Mount a branch, by default below the store. Raises UserError.

    Signals are blocked afterwards. `lives_with`: a process, whose end ends the mount.
    """
    branch.refuse_frozen("be mounted")
    if (entry := mount_of(branch)) is not None:
        place = quoted(entry.settings.mountpoint)
        raise UserError(
            f"branch {quoted(branch.name)} is mounted at {place} (pid {entry.pid}); use it there, or unmount "
            f"it by `unionfs umount {place}`."
        )
    return _mount(branch, mountpoint or branch.merged, lives_with=lives_with)


def _mount(branch: Branch, mountpoint: str, *, lives_with: int | None) -> MountSettings:
    record = branch.record()
    if record.ids is not None and entered() is None:
        raise UserError(
            f"branch {quoted(branch.name)} has the owners of a user namespace of its own, so other programs "
            f"cannot use a mount of it; run them by `unionfs branch shell {quoted(branch.name)}`."
        )
    # A base that was replaced has nothing to do with the branch.
    with opened(record.base, record.base_inode, record.filesystem):
        pass
    if record.session:
        with viewed(branch) as view:
            seen.look(branch, view)
    settings = settle(
        mountpoint, lowers=branch.lowers(), upper=branch.upper, work=branch.work,
        options=_options(record), source=f"branch-{branch.name}",
    )  # fmt: skip
    if lives_with is not None:
        settings = replace(settings, lives_with=pid_and_start(lives_with))
    # What the base changes from now on may come after the branch's copy.
    branch.save(replace(record, session=time.time_ns()))
    mount(settings)
    return settings


def _options(record: Record) -> list[str]:
    options = [*record.flags, *(["userxattr"] if record.userxattr else [])]
    if record.ids is not None:
        options += record.ids.options()
    elif (record.whole or record.base) == WHOLE and os.geteuid() != 0:
        # The command is uid 0 of a user namespace, in which this user's id is the only one.
        options += [f"squash_to_uid={os.geteuid()}", f"squash_to_gid={os.getegid()}"]
    return options


def create(store: Store, name: str, base: str, parent: str | None = None) -> Branch:
    """Make an empty branch over the directory `base`, or over the branch `parent`. Raises UserError."""
    if parent is not None:
        below = store.existing(parent)
        with below.claimed("made the base of another"):
            if parts := parts_of(below):
                places = ", ".join(quoted(part.record().base) for part in parts)
                raise UserError(
                    f"branch {quoted(parent)} changes {places}, too, which a branch over it would not show; "
                    f"commit that first, by `unionfs branch commit --only PATH {quoted(parent)}`."
                )
            unmounted(below)
            _complete_links(below)
    return store.create(name, base, parent)


def _complete_links(branch: Branch) -> None:
    """Put all names of hard links that its index keeps together into a branch that becomes a lower.

    A lower has no index. Raises UserError.
    """
    with viewed(branch) as view:
        linked = view.linked
    if not linked:
        return
    complaint = f"the hard links of branch {quoted(branch.name)} cannot be completed"
    with mounted(branch) as merged, on_failure(complaint, "try again"):
        for name in linked:
            path = os.fsencode(merged) + name
            st = os.lstat(path)
            # A metadata change links the copy under this name in the upper.
            os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns), follow_symlinks=False)


def unmounted(branch: Branch) -> None:
    """Unmount a branch, if it is mounted. Raises UserError, also if it is in use."""
    entry = mount_of(branch)
    if entry is not None:
        umount(entry.settings.mountpoint)


@contextmanager
def parent_claimed(store: Store, child: str, made: int, parent: str) -> Iterator[Branch]:
    """The parent of the branch that was `made` as `child`, claimed to be changed. Raises UserError, also if
    others lie over it.
    """
    below = store.existing(parent)
    others = [name for name in store.children(parent) if store.branch(name).record().created != made]
    if others:
        names = ", ".join(quoted(name) for name in others)
        raise UserError(
            f"branch {quoted(parent)} cannot be changed by a commit of {quoted(child)}, since others lie "
            f"over that, too ({names}), and would change; commit or discard those first."
        )
    with below.claimed("changed"):
        yield below


@contextmanager
def mounted(branch: Branch) -> Iterator[str]:
    """A claimed branch, mounted to be changed; yields the mountpoint. Raises UserError."""
    CALLER.needs_own_process()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    _mount(branch, branch.merged, lives_with=os.getpid())
    try:
        # `mount` leaves signals blocked for a process that ends now.
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield branch.merged
    finally:
        if mounted_at(branch.merged) is not None:
            try:
                umount(branch.merged)
            except (UserError, OSError):
                with suppress(UserError, OSError):
                    umount(branch.merged, lazy=True)


def in_use(branch: Branch, base: str) -> list[str]:
    """Sentences about mounts that would see a base change."""
    found = []
    for entry in live.entries():
        if base in entry.settings.lowers and entry.settings.upper != branch.upper:
            found.append(
                f"{quoted(base)} is a lower of the mount at {quoted(entry.settings.mountpoint)}, which sees "
                "changes at once."
            )
    return found
