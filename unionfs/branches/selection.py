"""Selects paths of a branch: patterns of `--only` and `--except`, and the default patterns of noise."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

NOISE = (
    "__pycache__", "*.pyc", ".cache", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", ".npm",
    ".ccache", "*.swp", ".nfs*", "/tmp", "/var/tmp", "/var/cache",
)  # fmt: skip
"""What `diff` counts instead of listing, unless it is asked for all."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Paths that one of `only` covers (all if it is empty), and none of `leave`.

    A pattern covers what it matches and everything below. With a slash it is matched from the root of the
    branch, else with each name; `*`, `?` and `[...]` are those of fnmatch, where `*` matches slashes, too.
    """

    only: Sequence[str] = ()
    leave: Sequence[str] = ()
    above: bytes = b""
    """What belongs before a path to make it one of the branch: see `parts`."""

    @property
    def is_all(self) -> bool:
        return not self.only and not self.leave

    def has(self, path: bytes) -> bool:
        """Whether a path, which begins with a slash, is selected."""
        if self.is_all:
            return True
        text = os.fsdecode(self.above + path)
        if self.only and not _covered(text, self.only):
            return False
        return not _covered(text, self.leave)


def relative(pattern: str, base: str) -> str:
    """Convert a user's pattern, possibly an absolute path below the base, for `Selection`."""
    below = base.rstrip("/") + "/"
    if pattern.startswith(below):
        pattern = "/" + pattern.removeprefix(below)
    elif pattern == "." or pattern.startswith("./"):
        pattern = pattern[1:]
    return pattern.rstrip("/") or "/"


def _covered(path: str, patterns: Sequence[str]) -> bool:
    names = path.strip("/").split("/")
    heads = ["/".join(names[: count + 1]) for count in range(len(names))]
    for pattern in patterns:
        if pattern == "/":
            return True
        if "/" in pattern:
            if any(fnmatchcase(head, pattern.lstrip("/")) for head in heads):
                return True
        elif any(fnmatchcase(name, pattern) for name in names):
            return True
    return False
