"""POSIX ACLs in the form of the xattrs system.posix_acl_access and system.posix_acl_default.

The layout is ``struct posix_acl_xattr_header`` of include/uapi/linux/posix_acl_xattr.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

ACCESS = "system.posix_acl_access"
DEFAULT = "system.posix_acl_default"

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
UNDEFINED = 0xFFFFFFFF


def encode(entries: Iterable[tuple[int, int, int]]) -> bytes:
    """The xattr's value for (tag, permission bits, id) entries; the id counts only for USER and GROUP."""
    value = struct.pack("<I", 2)
    for tag, permissions, identity in entries:
        value += struct.pack("<HHI", tag, permissions, identity if tag in (USER, GROUP) else UNDEFINED)
    return value


def decode(value: bytes) -> list[tuple[int, int, int]]:
    """The (tag, permission bits, id) entries of an xattr's value."""
    return [struct.unpack_from("<HHI", value, at) for at in range(4, len(value), 8)]


def simple(
    owner: int, group: int, other: int, *, users: dict[int, int] | None = None, mask: int | None = None
) -> bytes:
    """An ACL with named users (uid to permission bits); it has a mask exactly if it has a named user."""
    users = users or {}
    entries = [(USER_OBJ, owner, 0)]
    entries += [(USER, permissions, uid) for uid, permissions in sorted(users.items())]
    entries.append((GROUP_OBJ, group, 0))
    if users or mask is not None:
        entries.append((MASK, 7 if mask is None else mask, 0))
    entries.append((OTHER, other, 0))
    return encode(entries)
