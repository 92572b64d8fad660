"""Starting the daemon: what a failure leaves."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from unionfs.daemon import service as subject
from unionfs.daemon.runtime import RuntimeDirectory
from unionfs.settings.mount import MountSettings


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[RuntimeDirectory]:
    (tmp_path / "run").mkdir(mode=0o700)
    before = os.umask(0)
    with RuntimeDirectory(str(tmp_path / "run")) as opened:
        yield opened
    os.umask(before)


@pytest.mark.parametrize("what", ["confine", "Union", "Operations"])
def test_a_failure_leaves_nothing_open(
    tmp_path: Path, directory: RuntimeDirectory, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    settings = MountSettings(
        mountpoint=str(tmp_path / "merged"), lowers=(str(tmp_path / "lower"),),
        upper=str(tmp_path / "upper"), work=str(tmp_path / "work"), read_only=False,
        session="auto", io="auto", fsname="x", subtype="unionfs",
        allow_other=False, allow_root=False, volatile=False, userxattr=True, flags=(), security=(),
        log_level="info", mounted_by=os.getuid(),
    )  # fmt: skip

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    for name in ("confine", "Union", "Operations"):
        monkeypatch.setattr(subject, name, broken if name == what else lambda *_, **__: None)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="open files"):
        subject.Service(settings, directory, lambda: None, None, foreground=True)
    assert set(os.listdir("/proc/self/fd")) == before
    assert os.listdir(tmp_path / "run") == []
