"""Removes directories of the storage root, and checks for obstacles first."""

from __future__ import annotations

import os

from unionfs.errors import UserError, path_in, quoted, reason
from unionfs.sys.fds import Owned
from unionfs.sys.mountinfo import Location, location_of, read_mountinfo, split_path
from unionfs.sys.trees import find_locked, remove_path


def refuse_locked(path: str, complaint: str) -> None:
    """Raise UserError when a file below `path` is immutable or append-only. The message starts with
    `complaint`, such as "volume x cannot be removed".
    """
    above, name = os.path.split(path)
    try:
        with Owned(os.open(above, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as at:
            found = find_locked(at, os.fsencode(name))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{complaint}: {quoted(path)} cannot be read: {reason(error)}; try again.") from error
    if found is not None:
        shown = quoted(f"{above}/{os.fsdecode(found)}")
        raise UserError(
            f"{complaint}: {shown} is immutable or append-only; run `chattr -i -a {shown}` first."
        )


def refuse_bound(path: str, complaint: str) -> None:
    """Raise UserError while a part of the tree is mounted elsewhere: a mount may outlive its daemon and the
    daemon's guardian, which counts as the volume's user.
    """
    directory = os.path.realpath(path)
    table = read_mountinfo()
    try:
        place = location_of(directory, table)
    except OSError:
        return  # removed by hand
    for entry in table:
        root = Location(entry.device, split_path(entry.root))
        inside = entry.mountpoint.startswith(directory + "/")
        if place is not None and place.contains(root) and not inside:
            raise UserError(
                f"{complaint}: it is still mounted at {quoted(entry.mountpoint)}; unmount that first."
            )


def refuse_mounted(path: str, complaint: str) -> None:
    """Raise UserError while the tree contains a mount: removal would delete the mount's content."""
    below = os.path.realpath(path) + "/"
    for entry in read_mountinfo():
        if entry.mountpoint.startswith(below):
            raise UserError(
                f"{complaint}: {quoted(entry.mountpoint)} is still mounted; unmount it first."
            )


def remove_all(path: str, complaint: str, *, unlock: bool = False) -> None:
    """Remove a tree of the storage root; `unlock` also removes immutable files. If files remain, raises a
    UserError that starts with `complaint`, such as "volume x is removed, but not all of its files".
    """
    try:
        remove_path(path, unlock=unlock)
    except OSError as error:
        left = f"{os.path.dirname(path)}/{path_in(error, os.path.basename(path))}"
        raise UserError(
            f"{complaint}: {quoted(left)} cannot be removed: {reason(error)}; fix that and remove "
            f"{quoted(path)}."
        ) from error
