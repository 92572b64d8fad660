"""What the overlay's own xattrs may contain.

The formats: fs/overlayfs/overlayfs.h (struct ovl_fb, struct ovl_metacopy), inode.c (ovl_set_nlink_common),
util.c (ovl_check_protattr, ovl_init_uuid_xattr).
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable
from os import stat_result
from typing import Final

FH_HEADER: Final = 21
"""Bytes before the identifier in a file handle: version, magic, length, flags, type, and a UUID."""
_FH_MAGIC: Final = 0xFB
_NLINK: Final = re.compile(rb"([UL])([+-][0-9]{1,10})\0?")
_UUID: Final = 16
_METACOPY_HEADER: Final = 4


def is_file_handle(value: bytes) -> bool:
    """Whether it has the form of a file handle in an xattr or, in hexadecimal, in the index."""
    return len(value) > FH_HEADER and value[0] == 0 and value[1] == _FH_MAGIC and value[2] == len(value)


def problem(name: bytes, value: bytes, st: stat_result) -> str | None:
    """What is wrong with the xattr ``name`` (without prefix) of an upper's object; None if nothing is.

    Redirects are judged by following them.
    """
    judge = _JUDGES.get(name)
    if judge is None:
        return "is none that overlayfs knows"
    return judge(value, st)


def _opaque(value: bytes, st: stat_result) -> str | None:
    if not stat.S_ISDIR(st.st_mode):
        return "has no meaning except on directories"
    return None if value in (b"y", b"x") else "is neither y nor x"


def _impure(value: bytes, st: stat_result) -> str | None:
    return None if stat.S_ISDIR(st.st_mode) and value == b"y" else "is not the y of a directory"


def _origin(value: bytes, st: stat_result) -> str | None:
    # Empty where the lower's filesystem has no file handles (copy_up.c, ovl_set_origin_fh).
    return None if not value or is_file_handle(value) else "is not a file handle"


def _upper(value: bytes, st: stat_result) -> str | None:
    return None if is_file_handle(value) else "is not a file handle"


def _uuid(value: bytes, st: stat_result) -> str | None:
    return None if len(value) == _UUID else "is not a UUID"


def _nlink(value: bytes, st: stat_result) -> str | None:
    match = _NLINK.fullmatch(value)
    if match is None or stat.S_ISDIR(st.st_mode):
        return "is not a difference of link counts"
    if match[1] == b"U" and st.st_nlink + int(match[2]) <= 0:
        return f"leaves the file without links ({st.st_nlink}{match[2].decode()})"
    return None


def _metacopy(value: bytes, st: stat_result) -> str | None:
    if not stat.S_ISREG(st.st_mode):
        return "has no meaning except on files"
    whole = len(value) >= _METACOPY_HEADER and value[0] == 0 and value[1] == len(value)
    return None if not value or whole else "is not overlayfs's description of a file without data"


def _protattr(value: bytes, st: stat_result) -> str | None:
    return None if value and not value.strip(b"ia") else "has other flags than i and a"


def _whiteout(value: bytes, st: stat_result) -> str | None:
    # On an empty file it makes a whiteout, which is judged as such.
    return "has no meaning except on empty files"


def _any(value: bytes, st: stat_result) -> str | None:
    return None


_JUDGES: Final[dict[bytes, Callable[[bytes, stat_result], str | None]]] = {
    b"opaque": _opaque, b"redirect": _any, b"origin": _origin, b"impure": _impure, b"nlink": _nlink,
    b"upper": _upper, b"uuid": _uuid, b"metacopy": _metacopy, b"protattr": _protattr,
    b"whiteout": _whiteout,
}  # fmt: skip

KNOWN: Final = frozenset(_JUDGES)
"""The names of overlayfs's xattrs, without prefix."""
