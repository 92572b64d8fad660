"""Replaces a volume's content: exchanges two directories, or entry by entry where that is not possible."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from unionfs.errors import on_failure, quoted
from unionfs.storage.drivers.base import Prepared
from unionfs.storage.model import Volume
from unionfs.storage.removing import refuse_locked
from unionfs.storage.workspace import Workspace, recover, workspace
from unionfs.sys import calls
from unionfs.sys.fds import directory, exists, sync_directory
from unionfs.sys.trees import remove_path
from unionfs.union.work import exchange_in_steps

_SIBLING = ".restore-"
_ASIDE = ".old"
"""The suffix of the old content between two renames, on a filesystem without RENAME_EXCHANGE."""


def exchange(one: str, other: str) -> None:
    """Exchange two names on one filesystem: atomically, or in steps that `recover_sibling` can undo."""
    new, old, aside = ((calls.AT_FDCWD, os.fsencode(path)) for path in (other, one, other + _ASIDE))
    exchange_in_steps(new, old, aside)


@contextmanager
def sibling(data: str) -> Iterator[Prepared]:
    """New content in a directory beside `data`; `commit` exchanges the two."""
    sweep_siblings(data)
    parent = os.path.dirname(data)
    # start-up time: few commands need it
    from tempfile import mkdtemp

    path = mkdtemp(prefix=_SIBLING, dir=parent)

    def commit() -> None:
        existed = exists(data)
        if existed:
            # The old content is removed next.
            refuse_locked(data, "the volume's content cannot be replaced")
            exchange(data, path)
        else:
            # The volume's directory was removed: a restore recreates it.
            os.rename(path, data)
        try:
            sync_directory(parent)
        except OSError:
            # The old content must be back before the caller says so, and removes the other one.
            if existed:
                exchange(data, path)
            else:
                os.rename(data, path)
            raise

    try:
        yield Prepared(path, commit)
    finally:
        with suppress(OSError):  # the next restore tries again
            remove_path(path)


def recover_sibling(data: str) -> bool:
    """If `data` is missing, move back the old content that an interrupted exchange set aside.

    Returns whether it moved any. Raises OSError: then it is still set aside.
    """
    parent = os.path.dirname(data)
    for name in os.listdir(parent):
        if name.startswith(_SIBLING) and name.endswith(_ASIDE) and not exists(data):
            os.rename(f"{parent}/{name}", data)
            return True
    return False


def sweep_siblings(data: str) -> None:
    """Remove leftovers of a killed restore beside `data`. The caller holds the volume's long lock. Raises
    OSError if they have the volume's content, which cannot be moved back.
    """
    recover_sibling(data)
    parent = os.path.dirname(data)
    with suppress(OSError):
        for name in os.listdir(parent):
            if name.startswith(_SIBLING):
                remove_path(f"{parent}/{name}")


@contextmanager
def in_place(volume: Volume, data: str, settle: Callable[[], None] | None = None) -> Iterator[Workspace]:
    """New content in a directory in the volume's root `data`, for filesystems of other machines or programs.

    The exchange consists of many renames; a journal outside the volume completes it after an interruption.
    `settle` is called first, and may wait until all written files can be renamed.
    """
    with directory(data) as root, ExitStack() as stack:
        with on_failure(f"nothing can be prepared in {quoted(data)}", "make the volume writable"):
            place = stack.enter_context(workspace(volume.directory, root, "restore", settle))
        yield place


def finish_in_place(volume: Volume, data: str) -> None:
    """Finish an exchange of entries that has begun, and remove other leftovers of dead processes from the
    volume's root `data`. The caller holds the volume's short lock. Raises UserError.
    """
    recover(volume.directory, data)
