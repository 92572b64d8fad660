"""Project quotas, as far as testable without kernel support; the rest is in tests/vm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from unionfs.sys import quota


def test_nothing_counts_for_a_directory_without_a_limit(
    root: None, filesystem: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Project 0 is not the directory's own: it counts everything else on the filesystem."""
    directory = filesystem("ext4", 64 << 20)
    monkeypatch.setattr(quota, "_quota", lambda fd, project: (0, 0, 1 << 40, 0, 0, 0, 0, 0, 0))
    assert quota.space_used(str(directory)) == 0
    assert not quota.change_limit(str(directory), 1 << 20)
