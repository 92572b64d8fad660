"""What a daemon does with snapshots by itself."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unionfs.daemon.settle import settle
from unionfs.daemon.snapshotting import Snapshotting, _why_not
from unionfs.settings.specs import TmpfsOptions, TmpfsSpec
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


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"read_only": True}, "it is read-only; "),
        ({"upper": None, "work": None}, "it has no upper; "),
        ({"upper": None, "work": None, "upper_tmpfs": TmpfsOptions()}, "its upper is in memory; "),
        ({"outlive": True}, "it has outlive; "),
        ({"storage": (TmpfsSpec(target="/t"),)}, "it has storage (-v, --mount, --tmpfs); "),
        ({"watch_lower": True}, "it has --watch-lower; "),
        ({"lives_with": (1, 2)}, "it has a command in it (`unionfs run`, `unionfs try`); "),
        ({}, ""),
    ],
    ids=str,
)
def test_mounts_that_have_no_snapshots(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    (tmp_path / "upper").mkdir()
    settings = settle("/m", lowers=["/l"], upper=str(tmp_path / "upper"), work="/w", trusted_xattrs=True)
    settings = replace(settings, **{"read_only": False, **changes})
    with Owned(os.open(tmp_path / "upper", os.O_RDONLY)) as fd:
        stack: Any = SimpleNamespace(upper=SimpleNamespace(root_fd=fd), keeps_permissions=False, owners=None)
        found = _why_not(settings, stack, possible=True)
        assert found.startswith(text)
        assert bool(found) == bool(text)
        if text:
            return
        assert _why_not(settings, stack, possible=False).startswith("its session is pyfuse3")
        stack.keeps_permissions = True
        assert _why_not(settings, stack, possible=True) == "it has xattr_permissions; mount it without"
        stack.keeps_permissions, stack.owners = False, object()
        assert _why_not(settings, stack, possible=True).startswith("it has other owners (uidmapping")
        stack.owners = None
        for name in ("link", "branch.json", "container.json", "volume.json"):
            (tmp_path / name).touch()
            assert "belongs to a branch, volume or container" in _why_not(settings, stack, possible=True)
            (tmp_path / name).unlink()
        stack.upper = None
        assert _why_not(settings, stack, possible=True).startswith("it has no upper")
