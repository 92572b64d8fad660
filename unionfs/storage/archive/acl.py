"""POSIX ACLs in the text form of tars and in the xattr form of the kernel.

Sources: include/uapi/linux/posix_acl_xattr.h (version 2, little endian), acl(5) for the long text form.
"""

from __future__ import annotations

import struct

from unionfs.sys.attributes import ACL_ACCESS, ACL_DEFAULT

RECORDS = {ACL_ACCESS: b"SCHILY.acl.access", ACL_DEFAULT: b"SCHILY.acl.default"}
"""The pax records that star, GNU tar and libarchive use for ACLs."""
OF_RECORDS = {record: name for name, record in RECORDS.items()}

_VERSION = struct.pack("<I", 2)
_ITEM = struct.Struct("<HHI")
_NO_ID = 0xFFFFFFFF
_TAGS = {0x01: b"user", 0x02: b"user", 0x04: b"group", 0x08: b"group", 0x10: b"mask", 0x20: b"other"}
_NAMED = frozenset((0x02, 0x08))
_PERMISSIONS = [
    b"%c%c%c" % (ord("r" if n & 4 else "-"), ord("w" if n & 2 else "-"), ord("x" if n & 1 else "-"))
    for n in range(8)
]
_NUMBER = {text: number for number, text in enumerate(_PERMISSIONS)}


def to_text(value: bytes) -> bytes:
    """The ACL's lines, with numeric ids. Raises ValueError for an invalid ACL."""
    if value[:4] != _VERSION or len(value) % 8 != 4:
        raise ValueError("no POSIX ACL of version 2")
    lines = []
    for tag, permissions, number in _ITEM.iter_unpack(value[4:]):
        if tag not in _TAGS or permissions > 7:
            raise ValueError("no POSIX ACL of version 2")
        who = b"%d" % number if tag in _NAMED else b""
        lines.append(b"%s:%s:%s" % (_TAGS[tag], who, _PERMISSIONS[permissions]))
    return b"\n".join(lines) + b"\n"


def from_text(text: bytes) -> bytes:
    """The xattr value for an ACL's lines. Raises ValueError."""
    items = []
    for line in text.replace(b",", b"\n").split(b"\n"):
        if not line:
            continue
        fields = line.split(b":")
        if len(fields) != 3 or fields[2] not in _NUMBER or (fields[1] and not fields[1].isdigit()):
            raise ValueError(f"{line!r} is not an entry of an ACL with numeric ids")
        who, named = fields[0], bool(fields[1])
        if named and int(fields[1]) >= _NO_ID:
            raise ValueError(f"{line!r} is not an entry of an ACL: it does not name a user id")
        tag = next((tag for tag, word in _TAGS.items() if word == who and (tag in _NAMED) == named), None)
        if tag is None:
            raise ValueError(f"{line!r} is not an entry of an ACL with numeric ids")
        items.append(_ITEM.pack(tag, _NUMBER[fields[2]], int(fields[1]) if named else _NO_ID))
    return _VERSION + b"".join(items)
