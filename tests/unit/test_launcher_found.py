"""Where the launcher is looked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from unionfs.daemon import launcher


@pytest.mark.parametrize("program", ["-c", "", "unionfs"])
def test_not_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    planted = tmp_path / launcher.NAME
    planted.write_text("#!/bin/sh\n")
    planted.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNIONFS_RESIDENT_SECONDS", raising=False)
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(sys, "executable", "")
    assert launcher.find() is None
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "unionfs")])
    assert launcher.find() == str(planted)
