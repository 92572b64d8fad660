"""The user that a command runs as, by the container's own /etc/passwd and /etc/group.

The forms are docker's: USER[:GROUP], each a name or a number; a number needs no line in these files.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from unionfs.errors import UserError, quoted
from unionfs.sys.fds import Owned
from unionfs.sys.openat2 import open_in_root

_MOST_BYTES = 4 << 20
_NO_ID = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Account:
    """Who a command is."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def find_account(root: int, text: str) -> Account:
    """Look up a user in the tree of which `root` is an fd. Raises UserError."""
    user, colon, group = text.partition(":")
    lines = _lines(root, b"/etc/passwd", 7)
    number = _number(user)
    line = next((line for line in lines if line[0] == user), None)
    if line is None and number is not None:
        line = next((line for line in lines if _number(line[2]) == number), None)
    uid = number if line is None else _number(line[2])
    if uid is None:
        raise UserError(
            f"user {quoted(user)} is not in /etc/passwd of the union; check the name, or give a numeric "
            "id."
        )
    gid = (_number(line[3]) if line is not None else 0) or 0
    groups = _lines(root, b"/etc/group", 4)
    others = [_number(found[2]) for found in groups if line is not None and line[0] in found[3].split(",")]
    if colon:
        others = []
        named = next((_number(found[2]) for found in groups if found[0] == group), None)
        chosen = named if named is not None else _number(group)
        if chosen is None:
            raise UserError(
                f"group {quoted(group)} is not in /etc/group of the union; check the name, or give a number "
                "by --user."
            )
        gid = chosen
    members = tuple(dict.fromkeys(number for number in others if number is not None))
    return Account(uid, gid, members, line[5] if line is not None and line[5].startswith("/") else "/")


def _number(text: str) -> int | None:
    if text.isdecimal() and text.isascii() and len(text) < 11 and int(text) < _NO_ID:
        return int(text)
    return None


def _lines(root: int, path: bytes, fields: int) -> list[list[str]]:
    """The lines of a table, none if it is missing."""
    try:
        with Owned(open_in_root(root, path, os.O_RDONLY | os.O_NONBLOCK)) as fd:
            data = os.read(fd, _MOST_BYTES)
    except OSError:
        return []
    lines = (line.split(":") for line in data.decode("utf-8", "surrogateescape").split("\n"))
    return [line for line in lines if len(line) >= fields]
