"""Leftovers in a work directory: files that a union filesystem made, and the next mount may remove."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final, NoReturn

from unionfs.errors import LayerError, quoted
from unionfs.sys.fds import Owned, names_in
from unionfs.sys.openat2 import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, openat2
from unionfs.sys.trees import remove
from unionfs.union.listing import NFS_REMOVED
from unionfs.union.mending import mend

_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY
OURS_IN_WORK: Final = frozenset({"work", "index"})


def check_work(fd: int, path: str) -> None:
    """Refuse a work directory with files that no union filesystem made. Raises LayerError, OSError."""
    foreign = sorted(set(names_in(fd)) - OURS_IN_WORK)
    if foreign:
        raise LayerError(
            f"work {quoted(path)} is not empty (it holds {quoted(foreign[0])}), and what is in a work "
            "directory gets deleted; choose an empty directory."
        )
    try:
        inner = openat2(fd, b"work", _DIRECTORY, RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV)
    except FileNotFoundError:
        return
    with Owned(inner), suppress(PermissionError):  # mode 0, as the kernel makes it
        check_leftovers(inner, path)


def check_leftovers(fd: int, path: str) -> None:
    """Refuse anything but temporaries: `#` and a number (ours and the kernel's, ovl_tempname), a number
    (fuse-overlayfs), `.nfs` and a number (a file removed while open).
    """
    names = sorted(names_in(fd))
    for name in names:
        if name != "incompat" and not is_temporary(name):
            raise LayerError(
                f"work {quoted(path)} holds {quoted('work/' + name)}, which no union filesystem made and "
                "which would be deleted; choose an empty directory."
            )
    if "incompat" in names:
        _refuse_incompatible(fd, path)


def remove_leftovers(upper_fd: int, work_fd: int) -> None:
    """Remove the temporaries of a daemon that was killed, and restore what it has noted, in a work
    directory that is still in use. What cannot be removed, the next mount tries again."""
    with suppress(OSError):
        mend(upper_fd, work_fd)
    for name in names_in(work_fd):
        if is_temporary(name):
            with suppress(OSError):
                remove(work_fd, os.fsencode(name))


def is_temporary(name: str) -> bool:
    """Whether it is a name of a temporary in WORKDIR/work; see :func:`check_leftovers`."""
    return name[0] == "#" or name.isdigit() or NFS_REMOVED.fullmatch(name) is not None


def _refuse_incompatible(fd: int, path: str) -> NoReturn:
    features: list[str] = []
    resolve = RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH
    with suppress(OSError), Owned(openat2(fd, b"incompat", _DIRECTORY, resolve)) as incompat:
        features = names_in(incompat)
    if features in ([], ["volatile"]):
        raise LayerError(
            f"work {quoted(path)} was left by a volatile mount that did not end cleanly, so its "
            f"upper may have lost data; throw the upper away, or remove {quoted(path + '/work/incompat')} "
            "to use it all the same."
        )
    raise LayerError(
        f"work {quoted(path)} needs the overlayfs feature {quoted(features[0])}, which is not supported; use "
        "another upper and work."
    )
