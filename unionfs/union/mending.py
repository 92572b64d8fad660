"""Restores the modes of objects that a daemon had changed for the moment when it was killed; see `rights`."""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from typing import Final

from unionfs.core.places import Gate, Layer, Place
from unionfs.sys.fds import Owned, open_for_listing
from unionfs.union.listing import real_names
from unionfs.union.rights import Rights

_NOTE: Final = re.compile(rb"mode=([0-7]{1,4}) ino=([0-9]{1,20})")
_PATH: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_OWNERS: Final = stat.S_IRWXU
_NOT_THERE: Final = (PermissionError, FileNotFoundError, NotADirectoryError)

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
            gate = Gate(64, Rights(work_fd))
            try:
                _mend(Layer(0, "", fd, is_upper=True).root, gate, notes)
            finally:
                gate.close()


def _mend(root: Place, gate: Gate, notes: Notes) -> None:
    """Restore the noted modes in a tree of any depth: of what is below a directory first, whose mode may deny
    that. What this user may not enter, this user has not changed.
    """
    found = [(root, b".")]
    todo = [root]
    while todo:
        place = todo.pop()
        with suppress(*_NOT_THERE), Owned(gate.open_for_listing(place)) as listing:
            for name in real_names(listing):
                with suppress(*_NOT_THERE):
                    st = _stat(gate, place, name)
                    if (st.st_uid, st.st_ino) in notes:
                        found.append((place, name))
                    if stat.S_ISDIR(st.st_mode):
                        todo.append(Place(place.layer, place, name))
    for place, name in reversed(found):
        with suppress(*_NOT_THERE), Owned(_open(gate, place, name)) as fd:
            st = os.fstat(fd)
            mode = notes.get((st.st_uid, st.st_ino))
            if mode is not None and stat.S_IMODE(st.st_mode) == mode | _OWNERS:
                os.chmod(b"/proc/self/fd/%d" % fd, mode)


def _stat(gate: Gate, place: Place, name: bytes) -> os.stat_result:
    dir_fd = gate.fd(place)
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except PermissionError as error:
        return gate.rights.stat(dir_fd, name, error, upper=True)


def _open(gate: Gate, place: Place, name: bytes) -> int:
    dir_fd = gate.fd(place)
    try:
        return os.open(name, _PATH, dir_fd=dir_fd)
    except PermissionError as error:
        return gate.rights.open(dir_fd, name, _PATH, error, upper=True)


def _names(fd: int) -> list[bytes]:
    with Owned(open_for_listing(fd)) as listing:
        return real_names(listing)
