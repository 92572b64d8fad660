"""Owners shown other than stored, as by fuse-overlayfs: mapped by ranges, or one owner for everything.

A stored id without a range is shown as the overflow id (proc_sys_kernel(5)), and stored for a new file of a
caller whose id has none (fuse-overlayfs: main.c, find_mapping). chown(2) to an id without a range is EINVAL,
as in a user namespace. A layer on an idmapped mount has mapped ids already, which are shown as they are.

With one owner for everything a chown(2) that is not permitted succeeds without a change, and files are
created and copied up with the daemon's own ids where others cannot be set; a copy then loses setuid and
setgid, which would be those of the daemon's user.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable, Sequence
from typing import Final

from unionfs.core.places import Layer
from unionfs.settings.shown import Range, Shown
from unionfs.sys import calls
from unionfs.sys.calls import os_error
from unionfs.sys.creds import Identity
from unionfs.union.attributes import SET_IDS, replaced

ACL: Final = b"system.posix_acl_"
_NOT_PERMITTED: Final = (errno.EPERM, errno.EINVAL)
# struct posix_acl_xattr_header and posix_acl_xattr_entry, include/uapi/linux/posix_acl_xattr.h
_HEADER: Final = 4
_ENTRY: Final = struct.Struct("<HHI")
_ACL_USER: Final = 0x02
_ACL_GROUP: Final = 0x08
_UNCHANGED: Final = -1


class Owners:
    """Converts ids between the layers and the mount."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown
        self._uids, self._gids = shown.uids[::-1], shown.gids[::-1]
        self._overflow = _overflow("uid"), _overflow("gid")
        #: Whether every directory has one link.
        self.static_nlink = shown.static_nlink
        #: Whether everything has one owner, user or group.
        self.squashes = shown.uid is not None or shown.gid is not None

    # -- out ------------------------------------------------------------------------------------------

    def show(self, st: os.stat_result, layer: Layer) -> os.stat_result:
        """The attributes to show for an object of the layer."""
        if layer.is_idmapped:
            uid, gid = st.st_uid, st.st_gid
        else:
            uid, gid = self._out(self._uids, st.st_uid, 0), self._out(self._gids, st.st_gid, 1)
        if self._shown.uid is not None:
            uid = self._shown.uid
        if self._shown.gid is not None:
            gid = self._shown.gid
        return _with_owner(st, uid, gid)

    def _out(self, ranges: Sequence[Range], number: int, kind: int) -> int:
        if not ranges:
            return number
        for stored, shown, count in ranges:
            if stored <= number < stored + count:
                return shown + number - stored
        return self._overflow[kind]

    def show_acl(self, value: bytes, layer: Layer) -> bytes:
        """A POSIX ACL with the ids to show."""
        if layer.is_idmapped:
            return value
        return _with_ids(
            value, lambda uid: self._out(self._uids, uid, 0), lambda gid: self._out(self._gids, gid, 1)
        )

    # -- in -------------------------------------------------------------------------------------------

    def of_creator(self, uid: int, gid: int, identity: Identity) -> tuple[int, int]:
        """The owner to store for what a caller creates."""
        if self.squashes and not identity.can_switch:
            return identity.uid, identity.gid
        stored = _stored(self._uids, uid), _stored(self._gids, gid)
        return (
            self._overflow[0] if stored[0] is None else stored[0],
            self._overflow[1] if stored[1] is None else stored[1],
        )

    def to_store(self, uid: int, gid: int) -> tuple[int, int]:
        """The ids of a chown(2) to store; -1 stays. Raises EINVAL for an id without a range, except where one
        owner is shown for everything.
        """
        stored = _stored(self._uids, uid), _stored(self._gids, gid)
        if stored[0] is None and self._shown.uid is not None:
            stored = _UNCHANGED, stored[1]
        if stored[1] is None and self._shown.gid is not None:
            stored = stored[0], _UNCHANGED
        return _existing(stored[0]), _existing(stored[1])

    def acl_to_store(self, value: bytes) -> bytes:
        """A POSIX ACL with the ids to store. Raises EINVAL."""
        return _with_ids(
            value,
            lambda uid: _existing(_stored(self._uids, uid)),
            lambda gid: _existing(_stored(self._gids, gid)),
        )

    def copied(
        self, st: os.stat_result, xattrs: dict[bytes, bytes], layer: Layer
    ) -> tuple[os.stat_result, dict[bytes, bytes]]:
        """The attributes and xattrs to store for the copy of an object of the layer. Raises EINVAL."""
        if not layer.is_idmapped:
            return st, xattrs
        converted = {
            name: self.acl_to_store(value) if name.startswith(ACL) else value
            for name, value in xattrs.items()
        }
        return _with_owner(st, *self.to_store(st.st_uid, st.st_gid)), converted

    def give(self, fd: int, st: os.stat_result) -> os.stat_result:
        """Give a copy (``fd``: an fd of it) the stored owner of ``st``, where that is permitted. Returns the
        attributes to set otherwise: without setuid and setgid if the owner is another.
        """
        if self.chown(fd, st.st_uid, st.st_gid) or not stat.S_ISREG(st.st_mode):
            return st
        return replaced(st, {stat.ST_MODE: st.st_mode & ~SET_IDS})

    def chown(self, fd: int, uid: int, gid: int) -> bool:
        """chown(2) of stored ids on an fd (O_PATH suffices). Returns False where that is not permitted but
        would not show. Raises ``OSError``.
        """
        try:
            calls.chown_fd(fd, uid, gid)
        except OSError as error:
            if not self.squashes or error.errno not in _NOT_PERMITTED:
                raise
            return False
        return True


def _stored(ranges: Sequence[Range], number: int) -> int | None:
    """The id to store for a shown one; None if it has no range."""
    if not ranges or number == _UNCHANGED:
        return number
    for stored, shown, count in ranges:
        if shown <= number < shown + count:
            return stored + number - shown
    return None


def _existing(number: int | None) -> int:
    if number is None:
        raise os_error(errno.EINVAL)
    return number


def _overflow(kind: str) -> int:
    """The id that stands for one without a range."""
    try:
        with open(f"/proc/sys/kernel/overflow{kind}", "rb") as file:
            return int(file.read())
    except OSError:
        return 65534


def _with_owner(st: os.stat_result, uid: int, gid: int) -> os.stat_result:
    return st if (st.st_uid, st.st_gid) == (uid, gid) else replaced(st, {stat.ST_UID: uid, stat.ST_GID: gid})


def _with_ids(value: bytes, uid: Callable[[int], int], gid: Callable[[int], int]) -> bytes:
    """A POSIX ACL with the ids of named users and groups converted; another value is returned as it is."""
    if (len(value) - _HEADER) % _ENTRY.size:
        return value
    converted = bytearray(value)
    for at in range(_HEADER, len(value), _ENTRY.size):
        tag, permissions, number = _ENTRY.unpack_from(value, at)
        if tag in (_ACL_USER, _ACL_GROUP):
            number = (uid if tag == _ACL_USER else gid)(number)
            _ENTRY.pack_into(converted, at, tag, permissions, number)
    return bytes(converted)
