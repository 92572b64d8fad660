"""What happens is what docs/compliance.md says; `scripts/compliance-tables --write` updates its tables."""

from __future__ import annotations

import shutil

import pytest

from tests.support import behaviours, tables
from tests.support.behaviours import COLUMNS

CHANGING = "`st_nlink` after one of three was removed"
"""What fuse-overlayfs shows here depends on what the kernel has forgotten."""


@pytest.fixture(autouse=True)
def _needs(kernel_overlay: None) -> None:
    """Root, and overlayfs to compare with."""


@pytest.mark.parametrize("title", [title for title, one in COLUMNS.items() if one.session in ("", "kernel")])
def test_the_references(title: str) -> None:
    assert tables.documented("behaviours", title) == behaviours.cells(title)


def test_fuse_overlayfs() -> None:
    if shutil.which("fuse-overlayfs") is None:
        pytest.skip("fuse-overlayfs is not installed")
    documented, seen = (
        {row: cell for row, cell in cells.items() if row != CHANGING}
        for cells in (tables.documented("behaviours", "fuse-overlayfs"), behaviours.cells("fuse-overlayfs"))
    )
    assert documented == seen


def test_the_union(session: str) -> None:
    titles = [title for title, one in COLUMNS.items() if one.session == session]
    if not titles:
        pytest.skip(f"the table has no column for {session}")
    for title in titles:
        assert tables.documented("behaviours", title) == behaviours.cells(title)
