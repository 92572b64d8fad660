"""Ways to put new content in a volume's place: exchange two directories, or entry by entry where that can't
be.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

from unionfs.daemon.errors import UserError, quoted, reason
from unionfs.union.exchange import exchange as exchange_names

_SIBLING = ".restore-"
_ASIDE = ".old"
"""Where the old content waits on a filesystem that cannot exchange, between two renames."""
WORKSPACE = ".unionfs-restore"
"""The directory in the volume's own root where new content is prepared that cannot lie beside it."""
_JOURNAL = "journal"
"""What is to be exchanged, from the moment on that it is to happen."""
_DONE = "done"
"""The journal's name when all is exchanged: from then on its names are no longer looked at."""


def fsync_directory(path: str) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def exchange(one: str, other: str) -> None:
    """Exchange two names on one filesystem: in one step, or in steps that `recover_sibling` can undo."""
    at = os.open("/", os.O_PATH | os.O_CLOEXEC)
    aside = nullcontext(os.fsencode(other + _ASIDE))
    try:
        exchange_names(lambda: aside, at, at, os.fsencode(other), at, os.fsencode(one))
    finally:
        os.close(at)


class _Sibling:
    def __init__(self, data: str, path: str) -> None:
        self.path = path
        self._data = data

    def commit(self) -> None:
        if os.path.lexists(self._data):
            exchange(self._data, self.path)
        else:
            # Somebody has removed the volume's directory: a restore is the cure for that.
            os.rename(self.path, self._data)
        fsync_directory(os.path.dirname(self._data))


@contextmanager
def sibling(data: str) -> Iterator[_Sibling]:
    """New content in a directory beside `data`, which it is exchanged with."""
    sweep_siblings(data)
    path = tempfile.mkdtemp(prefix=_SIBLING, dir=os.path.dirname(data))
    try:
        yield _Sibling(data, path)
    finally:
        remove_tree(path)


def recover_sibling(data: str) -> bool:
    """Give `data`, if it is missing, its old content back that an exchange in steps left aside.

    Returns whether there was any.
    """
    parent = os.path.dirname(data)
    with suppress(OSError):
        for name in os.listdir(parent):
            if name.startswith(_SIBLING) and name.endswith(_ASIDE) and not os.path.lexists(data):
                os.rename(f"{parent}/{name}", data)
                return True
    return False


def sweep_siblings(data: str) -> None:
    """Remove what a killed restore left beside `data`. To be called under the volume's long lock."""
    recover_sibling(data)
    parent = os.path.dirname(data)
    with suppress(OSError):
        for name in os.listdir(parent):
            if name.startswith(_SIBLING):
                remove_tree(f"{parent}/{name}")


def remove_tree(path: str) -> None:
    """Remove a directory tree, whatever its permissions; what cannot be removed stays for later."""
    for _ in range(2):
        shutil.rmtree(path, ignore_errors=True)
        if not os.path.lexists(path):
            return
        # A user's directories without write permission keep what is in them.
        for directory, _, _ in os.walk(path):
            with suppress(OSError):
                os.chmod(directory, 0o700)


class _InPlace:
    def __init__(self, data: str, settle: Callable[[], None] | None) -> None:
        self._data = data
        self._settle = settle
        self.path = f"{data}/{WORKSPACE}/new"

    def commit(self) -> None:
        workspace = f"{self._data}/{WORKSPACE}"
        if self._settle is not None:
            self._settle()
        root = os.stat(self.path)
        journal = {
            "old": [name for name in os.listdir(self._data) if name != WORKSPACE],
            "new": os.listdir(self.path),
            "root": [root.st_mode & 0o7777, root.st_uid, root.st_gid, root.st_mtime_ns],
        }
        with open(f"{workspace}/{_JOURNAL}.part", "w", encoding="ascii") as out:
            json.dump(journal, out)
            out.flush()
            os.fsync(out.fileno())
        os.rename(f"{workspace}/{_JOURNAL}.part", f"{workspace}/{_JOURNAL}")
        finish_in_place(self._data)


@contextmanager
def in_place(data: str, settle: Callable[[], None] | None = None) -> Iterator[_InPlace]:
    """New content in a hidden directory of the volume itself, for filesystems that are not ours.

    The exchange is many renames, which a journal finishes when it is interrupted. `settle` is called before,
    and may wait until all that was written can be renamed.
    """
    workspace = f"{data}/{WORKSPACE}"
    finish_in_place(data)
    remove_tree(workspace)
    try:
        os.mkdir(workspace, 0o700)
        os.mkdir(f"{workspace}/new", 0o700)
        os.mkdir(f"{workspace}/old", 0o700)
    except OSError as error:
        remove_tree(workspace)
        raise UserError(
            f"nothing can be prepared in {quoted(data)}: {reason(error)}; the volume must be writable."
        ) from error
    try:
        yield _InPlace(data, settle)
    finally:
        # With a journal the exchange has begun: the next mount of the volume finishes it.
        if not os.path.lexists(f"{workspace}/{_JOURNAL}"):
            remove_tree(workspace)


class _Directories(ExitStack):
    """Descriptors, none reached through a symlink: the content of a volume is not trusted."""

    def enter(self, name: str, at: int | None = None) -> int:
        """Open a directory until the end of the context."""
        nofollow = 0 if at is None else os.O_NOFOLLOW
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | nofollow | os.O_CLOEXEC, dir_fd=at)
        self.callback(os.close, fd)
        return fd


def finish_in_place(data: str) -> None:
    """Finish an exchange of entries that has begun; nothing to do when there is none. Raises UserError."""
    if not any(os.path.lexists(f"{data}/{WORKSPACE}/{name}") for name in (_JOURNAL, _DONE)):
        return
    try:
        with _Directories() as directories:
            root = directories.enter(data)
            workspace = directories.enter(WORKSPACE, root)
            if _exists(workspace, _JOURNAL):
                old, new = (directories.enter(name, workspace) for name in ("old", "new"))
                _exchange_entries(root, workspace, old, new)
            _sweep(root, workspace)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"an interrupted restore in {quoted(data)}/{WORKSPACE} cannot be finished: {error}; look at its "
            "directories `old` and `new`, and remove it."
        ) from error


def _read(workspace: int, name: str) -> Any:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=workspace)
    with open(fd, encoding="ascii") as source:
        return json.load(source)


def _exchange_entries(root: int, workspace: int, old: int, new: int) -> None:
    """Each step is one that may be found done already."""
    journal = _read(workspace, _JOURNAL)
    away, here = [str(name) for name in journal["old"]], [str(name) for name in journal["new"]]
    mode, uid, gid, _ = (int(value) for value in journal["root"])
    for name in (*away, *here):
        if name in ("", ".", "..", WORKSPACE) or "/" in name:
            raise ValueError(f"its journal names {name!r}, which no restore does")
    for name in away:
        if not _exists(old, name) and _exists(root, name):
            os.rename(name, name, src_dir_fd=root, dst_dir_fd=old)
    for name in here:
        if _exists(new, name):
            os.rename(name, name, src_dir_fd=new, dst_dir_fd=root)
    with suppress(OSError):
        for name in os.listxattr(new):
            os.setxattr(root, name, os.getxattr(new, name))
    with suppress(OSError):
        os.chown(root, uid, gid)
        os.chmod(root, mode)
    os.fsync(root)
    # Before anything old is given up: a name in the journal whose old file is gone would be taken for one
    # that is still to be moved away, and by now it is the new file's.
    os.rename(_JOURNAL, _DONE, src_dir_fd=workspace, dst_dir_fd=workspace)
    os.fsync(workspace)


def _sweep(root: int, workspace: int) -> None:
    """Remove the old content, then the word that it may be removed, and the workspace."""
    mtime = int(_read(workspace, _DONE)["root"][3])
    for name in ("old", "new"):
        shutil.rmtree(name, ignore_errors=True, dir_fd=workspace)
    os.unlink(_DONE, dir_fd=workspace)
    with suppress(OSError):
        shutil.rmtree(WORKSPACE, ignore_errors=True, dir_fd=root)
        os.utime(root, ns=(mtime, mtime))


def _exists(at: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
