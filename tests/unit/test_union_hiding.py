"""Directories that an upper hides for good."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from unionfs.union.hiding import hide, is_hidden, parts_below


@pytest.mark.parametrize(
    ("outer", "inner", "parts"),
    [
        ("/", "/a", ("a",)), ("/", "/a/b", ("a", "b")), ("/a", "/a/b", ("b",)),
        ("/a", "/a", None), ("/a", "/ab", None), ("/a/b", "/a", None),
    ],
)  # fmt: skip
def test_parts(outer: str, inner: str, parts: tuple[str, ...] | None) -> None:
    assert parts_below(outer, inner) == parts


def test_hidden_directories(area: Path) -> None:
    lower, upper = area / "lower", area / "upper"
    (lower / "a/b/c").mkdir(parents=True)
    upper.mkdir()
    (lower / "a").chmod(0o751)
    os.utime(lower / "a", ns=(1, 2))
    parts = ("a", "b")
    assert not is_hidden(str(upper), parts, userxattr=True)
    hide(str(upper), str(lower), parts, userxattr=True)
    assert is_hidden(str(upper), parts, userxattr=True)
    assert is_hidden(str(upper), (*parts, "c"), userxattr=True)
    assert not is_hidden(str(upper), ("a",), userxattr=True)
    assert not is_hidden(str(upper), ("a", "other"), userxattr=True)
    assert not is_hidden(str(upper), parts, userxattr=False)
    assert (upper / "a").stat().st_mode & 0o7777 == 0o751
    assert os.listdir(upper / "a/b") == []


def test_what_hides_as_well(area: Path) -> None:
    """A whiteout, and any other non-directory."""
    lower, upper = area / "lower", area / "upper"
    (lower / "a/b").mkdir(parents=True)
    (upper / "a").mkdir(parents=True)
    (upper / "a/b").symlink_to("/")
    assert is_hidden(str(upper), ("a", "b"), userxattr=True)
    hide(str(upper), str(lower), ("a", "b"), userxattr=True)
    assert (upper / "a/b").is_symlink()
    (upper / "a/b").unlink()
    (upper / "a/b").mkdir()
    assert not is_hidden(str(upper), ("a", "b"), userxattr=True)
