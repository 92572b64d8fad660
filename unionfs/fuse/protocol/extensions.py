"""The extensions at the end of a creating request: security labels and supplementary groups.

Rules (fs/fuse/dir.c, get_create_ext, Linux 6.18):
- The header's `total_extlen` says how many 8-byte units they take; they are the message's last argument.
- A security header comes first if SECURITY_CTX was agreed (7.36): its second word, at most MAX_NR_SECCTX, is
  the number of labels, each a fuse_secctx, the xattr's name with its NUL, and the value. The value is not
  padded; only the whole extension is.
- Groups come as fuse_ext_header of type EXT_GROUPS (7.38, CREATE_SUPP_GROUP).
- Every extension has its own size, a multiple of 8; one of an unknown type is skipped.
"""

from __future__ import annotations

import struct
from typing import Final

from unionfs.fuse.protocol.errors import ProtocolError
from unionfs.fuse.protocol.flags import EXT_GROUPS, MAX_NR_SECCTX
from unionfs.fuse.protocol.request import SecurityContext
from unionfs.fuse.protocol.structs import LAYOUTS, record_align

Extensions = tuple[tuple[SecurityContext, ...], tuple[int, ...]]
"""Security labels and supplementary groups of one request."""

NONE: Final[Extensions] = ((), ())

_HEADER: Final = LAYOUTS["fuse_ext_header"].struct
_SECCTX: Final = LAYOUTS["fuse_secctx"].struct
_GROUPS: Final = LAYOUTS["fuse_supp_groups"].struct


def parse(data: bytes) -> Extensions:
    """Read the extensions of a request; `data` is exactly those bytes. Raises ProtocolError."""
    security: tuple[SecurityContext, ...] = ()
    groups: tuple[int, ...] = ()
    position = 0
    while position < len(data):
        if position + _HEADER.size > len(data):
            raise ProtocolError("An extension is shorter than its header.")
        size, kind = _HEADER.unpack_from(data, position)
        if size < _HEADER.size or size != record_align(size) or position + size > len(data):
            raise ProtocolError(f"An extension of type {kind} says its size is {size}.")
        body = data[position + _HEADER.size : position + size]
        if kind <= MAX_NR_SECCTX:
            security += _security(body, kind)
        elif kind == EXT_GROUPS:
            groups += _groups(body)
        position += size
    return security, groups


def _security(body: bytes, count: int) -> tuple[SecurityContext, ...]:
    found = []
    position = 0
    for _ in range(count):
        if position + _SECCTX.size > len(body):
            raise ProtocolError(f"A security extension has fewer than its {count} labels.")
        (size,) = _SECCTX.unpack_from(body, position)
        position += _SECCTX.size
        end = body.find(b"\0", position)
        if end <= position or end + 1 + size > len(body):
            raise ProtocolError("A security label has no name, or reaches past its extension.")
        found.append(SecurityContext(body[position:end], body[end + 1 : end + 1 + size]))
        position = end + 1 + size
    return tuple(found)


def _groups(body: bytes) -> tuple[int, ...]:
    if len(body) < _GROUPS.size:
        raise ProtocolError("A groups extension has no count.")
    (count,) = _GROUPS.unpack_from(body)
    if _GROUPS.size + 4 * count > len(body):
        raise ProtocolError(f"A groups extension is too short for its {count} groups.")
    return struct.unpack_from(f"={count}I", body, _GROUPS.size)
