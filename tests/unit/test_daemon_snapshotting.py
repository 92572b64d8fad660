"""What a daemon does with snapshots by itself."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unionfs.daemon.snapshotting import Snapshotting
from unionfs.sys.fds import Owned


async def test_a_failure_of_cleaning_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It runs beside the session, which goes on."""
    (tmp_path / "upper").touch()
    with Owned(os.open(tmp_path / "upper", os.O_RDONLY)) as fd:  # which has no `..`
        stack: Any = SimpleNamespace(upper=SimpleNamespace(root_fd=fd))
        serving: Any = SimpleNamespace(settings=SimpleNamespace(upper=str(tmp_path / "upper")))
        nothing: Any = None
        await Snapshotting(nothing, stack, serving, lambda: None).clean()
    assert "what snapshots have left cannot be removed: [Errno 20]" in caplog.text
