"""Parses and formats sizes."""

from __future__ import annotations

import re

from unionfs.errors import UserError, quoted

# github.com/docker/go-units, RAMInBytes: 64m, 64MB, 64MiB, 1.5g; always powers of 1024.
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(?: (?=[a-z]))?(?:([kmgtp])i?)?b?", re.IGNORECASE)
_UNITS = " kmgtp"
_PERCENT = re.compile(r"(\d{1,3})%")
# tmpfs(5), nr_inodes: a number with k, m or g.
_COUNT = re.compile(r"(\d+)([kmg]?)", re.IGNORECASE)
_LARGEST = 2**63 - 1


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `64m`, `1.5GiB` or `4096`. Raises ValueError."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ValueError(text)
    number, unit = found.groups()
    factor = 1 << 10 * _UNITS.index(unit.lower()) if unit else 1
    size = int(number) * factor if "." not in number else int(float(number) * factor)
    if size > _LARGEST:
        raise ValueError(text)
    return size


def volume_size(text: str, what: str = "size") -> int:
    """Like `parse_size`, for a volume: at least one byte. Raises UserError."""
    try:
        size = parse_size(text.strip())
    except ValueError:
        raise UserError(
            f"invalid {what} {text!r}; write a number followed by b, k, m, g or t, such as 100m."
        ) from None
    if not 0 < size < 1 << 60:
        raise UserError(f"{what}={quoted(text)} is not a possible size for a volume; use one such as 100m.")
    return size


def parse_tmpfs_size(text: str) -> str:
    """Return a size for tmpfs: bytes, or `50%` of memory; 0 means no limit. Raises ValueError."""
    if found := _PERCENT.fullmatch(text):
        if not 0 < int(found[1]) <= 100:
            raise ValueError(text)
        return f"{int(found[1])}%"
    return str(parse_size(text))


def parse_count(text: str) -> str:
    """Return a number of inodes for tmpfs; `k`, `m` and `g` are powers of 1024. Raises ValueError."""
    found = _COUNT.fullmatch(text)
    if found is None:
        raise ValueError(text)
    count = int(found[1]) << 10 * _UNITS.index(found[2].lower() or " ")
    if count > _LARGEST:
        raise ValueError(text)
    return str(count)


def shown_size(size: float) -> str:
    """Format bytes like Docker (go-units HumanSize): four digits, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:.4g}{unit}"
        size /= 1000
    return f"{size:.4g}PB"
