"""How owners and link counts are shown where not as they are stored: options with fuse-overlayfs's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from unionfs.errors import UserError, quoted

Range = tuple[int, int, int]
"""The first stored id, the first shown id, and their number."""

_MOST: Final = (1 << 32) - 1
"""The number of ids: the last one of 32 bits stands for none (include/linux/uidgid.h, uid_valid)."""
_DIGITS: Final = 10


@dataclass(frozen=True, slots=True)
class Shown:
    """The chosen values."""

    uids: tuple[Range, ...] = ()
    """Ranges of user ids; the last one that has an id counts. Empty: as stored."""
    gids: tuple[Range, ...] = ()
    uid: int | None = None
    """The owner of everything; None: its own."""
    gid: int | None = None
    static_nlink: bool = False
    """Whether every directory has one link."""
    acl: bool = True
    """Whether there are POSIX ACLs, if the layers have them."""
    permissions: int = 0
    """Whether owner, mode and type are kept in an xattr: 1 for `security.*`, 2 for `user.*`."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Shown:
        """Read the values of `dataclasses.asdict`. Raises TypeError for others."""
        values = dict(values)
        for name in ("uids", "gids"):
            values[name] = tuple(tuple(item) for item in values.get(name, ()))
        return cls(**values)


AS_STORED: Final = Shown()


def parse_ranges(name: str, value: str) -> tuple[Range, ...]:
    """Parse `STORED:SHOWN:COUNT:STORED:...` with empty parts anywhere, as podman passes it.

    Raises UserError.
    """
    words = [word for word in value.split(":") if word]
    numbers = [int(word) for word in words if _is_number(word)]
    ranges = tuple(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=False))
    if not words or len(numbers) != len(words) or len(words) % 3:
        raise UserError(
            f"option {name}={quoted(value)}: not a list of numbers in threes; write "
            f"{name}=STORED:SHOWN:COUNT."
        )
    if any(count == 0 or max(stored, shown) + count > _MOST for stored, shown, count in ranges):
        raise UserError(
            f"option {name}={quoted(value)}: a range is empty or goes beyond {_MOST - 1}; write "
            f"{name}=STORED:SHOWN:COUNT."
        )
    return ranges


def parse_id(name: str, value: str) -> int:
    """Parse one id. Raises UserError."""
    if not (_is_number(value) and int(value) < _MOST):
        raise UserError(f"option {name}={quoted(value)}: not a number below {_MOST}; write {name}=1000.")
    return int(value)


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= _DIGITS
