"""Ways to put new content in a volume's place: exchange two directories, or entry by entry where that can't
be.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from unionfs.errors import UserError, quoted, reason
from unionfs.storage.model import Volume
from unionfs.storage.removing import refuse_locked
from unionfs.storage.workspace import Workspace, recover, workspace
from unionfs.sys import calls
from unionfs.sys.fds import directory, sync_directory
from unionfs.sys.trees import remove_path
from unionfs.union.work import exchange as exchange_names

_SIBLING = ".restore-"
_ASIDE = ".old"
"""Where the old content waits on a filesystem that cannot exchange, between two renames."""


def exchange(one: str, other: str) -> None:
    """Exchange two names on one filesystem: in one step, or in steps that `recover_sibling` can undo."""
    new, old, aside = ((calls.AT_FDCWD, os.fsencode(path)) for path in (other, one, other + _ASIDE))
    exchange_names(new, old, aside)


class _Sibling:
    def __init__(self, data: str, path: str) -> None:
        self.path = path
        self._data = data

    def commit(self) -> None:
        if os.path.lexists(self._data):
            # The old content goes next.
            refuse_locked(self._data, "the volume's content cannot be replaced")
            exchange(self._data, self.path)
        else:
            # Somebody has removed the volume's directory: a restore is the cure for that.
            os.rename(self.path, self._data)
        sync_directory(os.path.dirname(self._data))


@contextmanager
def sibling(data: str) -> Iterator[_Sibling]:
    """New content in a directory beside `data`, which it is exchanged with."""
    sweep_siblings(data)
    path = tempfile.mkdtemp(prefix=_SIBLING, dir=os.path.dirname(data))
    try:
        yield _Sibling(data, path)
    finally:
        with suppress(OSError):  # tried again by the next restore
            remove_path(path)


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
                remove_path(f"{parent}/{name}")


@contextmanager
def in_place(volume: Volume, data: str, settle: Callable[[], None] | None = None) -> Iterator[Workspace]:
    """New content in a directory in the root `data` of the volume itself, for filesystems that are not ours.

    The exchange is many renames, which a journal outside the volume finishes when it is interrupted. `settle`
    is called before, and may wait until all that was written can be renamed.
    """
    with directory(data) as root, ExitStack() as stack:
        try:
            place = stack.enter_context(workspace(volume.directory, root, "restore", settle))
        except OSError as error:
            raise UserError(
                f"nothing can be prepared in {quoted(data)}: {reason(error)}; make the volume writable."
            ) from error
        yield place


def finish_in_place(volume: Volume, data: str) -> None:
    """Finish an exchange of entries that has begun, and remove what else dead processes left in the root
    `data` of the volume. To be called under the volume's short lock. Raises UserError.
    """
    recover(volume.directory, data)
