"""Fixtures for branches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.branches.branching import Branching
from tests.mount.run_calls import cleaned
from unionfs.branches import apply


@pytest.fixture
def branching(root: None, area: Path) -> Iterator[Branching]:
    with cleaned(area):
        yield Branching(area)
    apply.set_hook(None)


@pytest.fixture
def filled(branching: Branching) -> Branching:
    """With some files in its base."""
    for name in ("a", "b", "c"):
        (branching.base / name).write_text(f"{name}\n")
    (branching.base / "sub").mkdir()
    return branching
