"""Setting the attributes of a copy: what a server of the copy's filesystem may do meanwhile."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from unionfs.sys import attributes


def _never(name: bytes, error: OSError) -> None:
    raise error


def test_a_name_that_becomes_a_symlink_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the server of an NFS or sshfs volume may make it."""
    victim, fifo = tmp_path / "victim", tmp_path / "fifo"
    victim.touch(0o600)
    os.mkfifo(fifo)
    real = os.chown

    def swap(*arguments: Any, **named: Any) -> None:
        real(*arguments, **named)
        fifo.unlink()
        fifo.symlink_to("victim")

    monkeypatch.setattr(os, "chown", swap)
    at = os.open(tmp_path, os.O_RDONLY)
    try:
        new = attributes.FileAttributes(stat.S_IFIFO | 0o666, os.getuid(), os.getgid(), 0, 0, {})
        attributes.write(at, b"fifo", new, _never)
    finally:
        os.close(at)
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600
    assert victim.stat().st_mtime_ns != 0
