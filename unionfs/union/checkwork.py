"""Findings in a work directory: what a mount left there, and the index of hard links."""

from __future__ import annotations

import os
import stat
from binascii import Error, unhexlify
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from unionfs.sys.fds import Owned
from unionfs.sys.trees import remove
from unionfs.union.checkxattrs import is_file_handle
from unionfs.union.index import has_no_name
from unionfs.union.leftovers import OURS_IN_WORK, is_temporary
from unionfs.union.resting import is_device_whiteout, names_below, object_path, xattrs

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Finding:
    """One object that is not as a mount leaves it."""

    path: bytes
    """On the host."""
    cause: str
    cure: str
    repair: Callable[[], None] | None = None
    """Applies the cure, or raises OSError; None if only the user can."""


def work_findings(path: str, fd: int, prefix: bytes) -> Iterator[Finding]:
    """Everything in the work directory ``fd`` that a mount would remove, refuse or not understand."""
    here = os.fsencode(path)
    for name in names_below(fd, b"."):
        if os.fsdecode(name) not in OURS_IN_WORK:
            yield Finding(here + b"/" + name, "no union filesystem made it", "move it elsewhere")
    for name in (b"work", b"index"):
        if not _is_directory(fd, name):
            yield Finding(here + b"/" + name, "it is not a directory, so no mount accepts it", "remove it")
    for name in _names(fd, b"work"):
        where = here + b"/work/" + name
        if _is_kernels_whiteout(fd, b"work", name):
            continue
        if name == b"incompat":
            yield Finding(
                where,
                "left by a volatile mount that did not end cleanly, so the upper may lack data",
                "throw the upper away, or remove this to use it all the same",
            )
        elif is_temporary(os.fsdecode(name)):
            repair = partial(_remove_in, fd, b"work", name)
            yield Finding(
                where, "left by a mount that did not end cleanly", "the next mount removes it", repair
            )
        else:
            yield Finding(where, "no union filesystem made it", "move it elsewhere")
    yield from _index_findings(here, fd, prefix)


def _index_findings(here: bytes, fd: int, prefix: bytes) -> Iterator[Finding]:
    names = _names(fd, b"index")
    if not names:
        return
    with Owned(os.open(b"index", _DIRECTORY, dir_fd=fd)) as index:
        for name in names:
            if _is_kernels_whiteout(fd, b"index", name):
                continue
            cause = _index_problem(index, name, prefix)
            if cause is not None:
                repair = partial(_remove_in, fd, b"index", name)
                yield Finding(here + b"/index/" + name, cause, "remove it from the index", repair)


def _index_problem(index: int, name: bytes, prefix: bytes) -> str | None:
    """What is wrong with an entry (export.c, namei.c: ovl_verify_index, ovl_indexdir_cleanup)."""
    if name.startswith(b"#"):
        return "left by a mount that did not end cleanly"
    try:
        valid = is_file_handle(unhexlify(name))
    except Error:
        valid = False
    if not valid:
        return "its name is not that of an entry of the index"
    st = os.stat(name, dir_fd=index, follow_symlinks=False)
    if stat.S_ISDIR(st.st_mode):
        found = xattrs(object_path(index, name)).get(prefix + b"upper")
        return None if found is not None and is_file_handle(found) else "it leads to no directory"
    if st.st_nlink == 1 and not is_device_whiteout(st):
        # names that only a lower has may lead to it
        nlink = xattrs(object_path(index, name)).get(prefix + b"nlink")
        if nlink is None or has_no_name(nlink):
            return "its file has no name in the union"
    return None


def _is_directory(fd: int, name: bytes) -> bool:
    """Whether it is one, or missing."""
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return True


def _names(fd: int, name: bytes) -> list[bytes]:
    return names_below(fd, name) if _is_directory(fd, name) else []


def _is_kernels_whiteout(fd: int, directory: bytes, name: bytes) -> bool:
    """Whether it is the whiteout that the kernel links to many names, and leaves (dir.c, ovl_whiteout)."""
    if not name.startswith(b"#"):
        return False
    with Owned(os.open(directory, _DIRECTORY, dir_fd=fd)) as inner:
        return is_device_whiteout(os.stat(name, dir_fd=inner, follow_symlinks=False))


def _remove_in(fd: int, directory: bytes, name: bytes) -> None:
    with Owned(os.open(directory, _DIRECTORY, dir_fd=fd)) as inner:
        remove(inner, name)
