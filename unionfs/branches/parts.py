"""The parts of a branch: a layer for each filesystem that is mounted below its base.

    ROOT/branches/NAME/below/K/    as the directory of a branch, with the mountpoint as its base

A command on the branch sees each part at its mountpoint, and what it changes there is a change of the branch.
A part exists only while it changes something, or a command runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import count

from unionfs.branches.beneath import opened
from unionfs.branches.covered import Below
from unionfs.branches.record import Record
from unionfs.branches.store import Branch
from unionfs.errors import UserError, on_failure, quoted
from unionfs.sys.fds import Owned
from unionfs.sys.handles import filesystem_identity
from unionfs.sys.trees import remove_path

_BELOW = "below"


class Part(Branch):
    """A part of one branch. It is claimed, frozen and renamed with that."""

    def __init__(self, branch: Branch, key: str) -> None:
        super().__init__(branch.store, branch.name, f"{branch.path}/{part_path(key)}")
        self.key = key


def part_path(key: str) -> str:
    """The directory of a part in that of its branch; of the branch itself for an empty key."""
    return f"{_BELOW}/{key}" if key else ""


def parts_of(branch: Branch) -> list[Part]:
    """The parts of a branch. Raises UserError."""
    with (
        on_failure(f"branch {quoted(branch.name)} cannot be read", "check the permissions"),
        suppress(FileNotFoundError),
    ):
        names = os.listdir(f"{branch.path}/{_BELOW}")
        return [Part(branch, name) for name in sorted(names) if name.isdigit()]
    return []


def all_of(branch: Branch) -> list[Branch]:
    """A branch and its parts. Raises UserError."""
    return [branch, *parts_of(branch)]


def is_untouched(branch: Branch) -> bool:
    """As `Branch.is_untouched`, with its parts."""
    return all(one.is_untouched() for one in all_of(branch))


def prepare(branch: Branch, below: Sequence[Below]) -> dict[str, Part]:
    """The parts of a claimed branch for the filesystems that a command shall see, by their mountpoints.

    Those that change nothing are made anew. Raises UserError, also if a filesystem that has one is gone.
    """
    clear(branch)
    found = {part.record().base: part for part in parts_of(branch)}
    used = {part.key for part in found.values()}
    free = (key for key in map(str, count()) if key not in used)
    for part in found.values():
        record = part.record()
        with opened(record.base, record.base_inode, record.filesystem):
            pass
    wanted = {}
    for one in below:
        if one.obstacle is None:
            wanted[one.path] = found.get(one.path) or _make(branch, Part(branch, next(free)), one)
        elif one.path in found:
            raise UserError(
                f"branch {quoted(branch.name)} changes {quoted(one.path)}, which it cannot cover now: "
                f"{one.obstacle}; hide it by --hide {quoted(one.path)}, or discard the branch."
            )
    return wanted


def _make(branch: Branch, part: Part, one: Below) -> Part:
    record, complaint = branch.record(), f"the filesystem at {quoted(one.path)} cannot be covered"
    with on_failure(complaint, f"make it writable by --rw {quoted(one.path)}, or free space"):
        os.makedirs(os.path.dirname(part.path), 0o700, exist_ok=True)
        with Owned(os.open(one.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
            values = Record(
                one.path, os.fstat(fd).st_ino, time.time_ns(), record.uid, userxattr=record.userxattr,
                ids=record.ids, whole=record.base, filesystem=filesystem_identity(fd), flags=one.flags,
            )  # fmt: skip
            part.store.put(part, values, fd)
    return part


def clear(branch: Branch) -> None:
    """Remove the parts that change nothing, of a claimed branch that is not mounted."""
    for part in parts_of(branch):
        with suppress(UserError, OSError):  # that of a filesystem that is gone is reported when it is used
            if part.is_untouched():
                remove_path(part.path)
    with suppress(OSError):
        os.rmdir(f"{branch.path}/{_BELOW}")
