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
