"""Restores the modes of objects that a daemon had changed for the moment when it was killed; see `rights`."""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from typing import Final

from unionfs.sys.fds import Owned, open_for_listing
from unionfs.union.rights import Rights

_NOTE: Final = re.compile(rb"mode=([0-7]{1,4}) ino=([0-9]{1,20})")
_PATH: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_OWNERS: Final = stat.S_IRWXU

Notes = dict[tuple[int, int], int]
"""Modes by owner and inode number. A note concerns only an object of its own owner, and that owner's bits."""


def mend(upper_fd: int, work_fd: int) -> None:
    """Restore the modes that are noted in work in the objects of the upper, wherever they are by now.

    Raises ``OSError``. The notes stay for the next try.
    """
    notes: Notes = {}
    for name in _names(work_fd):
        with suppress(OSError):
            note = _NOTE.fullmatch(os.readlink(name, dir_fd=work_fd))
            if note is not None:
                owner = os.stat(name, dir_fd=work_fd, follow_symlinks=False).st_uid
                notes[owner, int(note[2])] = int(note[1], 8)
    if notes:
        with Owned(os.open(b".", _PATH, dir_fd=upper_fd)) as fd:
            _mend(fd, notes, Rights(work_fd))


def _mend(fd: int, notes: Notes, rights: Rights) -> None:
    """Restore the mode of the object ``fd``, and of everything below it first. (Its mode may deny that.)"""
    st = os.fstat(fd)
    if stat.S_ISDIR(st.st_mode):
        with rights.widened(fd):
            for name in _names(fd):
                # This user has not changed what this user may not enter.
                with suppress(PermissionError), Owned(os.open(name, _PATH, dir_fd=fd)) as below:
                    _mend(below, notes, rights)
    mode = notes.get((st.st_uid, st.st_ino))
    if mode is not None and stat.S_IMODE(st.st_mode) == mode | _OWNERS:
        os.chmod(b"/proc/self/fd/%d" % fd, mode)


def _names(fd: int) -> list[bytes]:
    with Owned(open_for_listing(fd)) as listing:
        return [os.fsencode(name) for name in os.listdir(listing)]
