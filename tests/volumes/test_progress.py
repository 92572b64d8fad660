"""The progress of long operations: what is shown, and when nothing is."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.mount.cli_calls import REPOSITORY, wait_for
from tests.support.terminals import read_to_end
from tests.volumes.conftest import Store
from unionfs.cli import progress as shown
from unionfs.storage.archive.progress import Progress


class _Kept(Progress):
    def __init__(self) -> None:
        super().__init__()
        self.shares: list[float | None] = []

    def show(self) -> None:
        self.shares.append(self.share)


def test_the_share_of_a_tree(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1000)
    progress = Progress()
    assert progress.share is None
    progress.reads_tree(str(tmp_path))
    progress(1, 250)
    assert wait_for(lambda: progress.share == 0.25)
    progress(1, 2000)  # it has grown meanwhile
    assert progress.share == 1.0


def test_the_share_of_files(tmp_path: Path) -> None:
    progress = Progress()
    with (tmp_path / "a").open("w+b", buffering=0) as one, (tmp_path / "b").open("w+b", buffering=0) as two:
        for file, size in ((one, 300), (two, 100)):
            file.write(b"x" * size)
            file.seek(0)
            progress.reads_file(file.fileno())
        assert progress.share == 0
        one.read(200)
        assert progress.share == 0.5
    reader, writer = os.pipe()
    other = Progress()
    other.reads_file(reader)
    assert other.share is None
    os.close(reader)
    os.close(writer)


def test_pieces_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unionfs.storage.archive.progress._SECONDS", 0.0)
    progress = _Kept()
    progress(3, 100)
    assert list(progress.along([(0, b"ab"), (2, b"c")])) == [(0, b"ab"), (2, b"c")]
    assert (progress.entries, progress.size) == (3, 103)
    assert len(progress.shares) == 3


def test_lines(store: Store, area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = store.create("data")
    for number in range(20):
        (data / str(number)).write_bytes(os.urandom(300_000))
    monkeypatch.setattr(shown, "_LINE_SECONDS", 0.0)
    monkeypatch.setattr("unionfs.storage.archive.progress._SECONDS", 0.0)
    for words, what in (
        (("backup", "data", "-o", area / "x.tar.zst"), "backup of data"),
        (("restore", "data", "-i", area / "x.tar.zst"), "restore of data"),
        (("verify", area / "x.tar.zst"), "verification"),
        (("export", "data", "-o", area / "y.tar"), "export of data"),
        (("import", "data", area / "y.tar"), "import of data"),
    ):
        lines = store(*words, "--progress", "plain").stderr.splitlines()
        mine = [line for line in lines if line.startswith(f"unionfs: {what}: ")]
        assert mine[-1] == f"unionfs: {what}: done"
        pattern = rf"unionfs: {what}: (\d+ entr(y|ies), )?\S+B(, \d+ %)?, \S+B/s(, [\d:]+ left)?"
        assert all(re.fullmatch(pattern, line) for line in mine[:-1]), mine
        assert what == "verification" or len(mine) > 1
        # Nothing is shown where nobody looks, and on demand.
        for more in ((), ("--progress", "none")):
            assert what not in store(*words, *more).stderr.replace("backed up", "")


def test_lines_of_one_large_file(store: Store, area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come while it is read or written, not only after it."""
    (store.create("data") / "large").write_bytes(b"x" * 20_000_000)
    store.create("other")
    monkeypatch.setattr(shown, "_LINE_SECONDS", 0.0001)
    monkeypatch.setattr("unionfs.storage.archive.progress._SECONDS", 0.0005)
    for words in (
        ("backup", "data", "-o", area / "x.tar"),
        ("verify", "data"),
        ("verify", area / "x.tar"),
        ("restore", "other", "-i", area / "x.tar"),
        ("export", "data", "-o", area / "y.tar"),
        ("import", "other", area / "y.tar"),
        ("clone", "data", "copy"),
    ):
        told = store(*words, "--progress", "plain").stderr
        within = set(re.findall(r"(\S+B)[,.]", told)) - {"0B", "20MB"}
        assert within or "shares" in told, (words, told)


@pytest.mark.parametrize("columns", [100, 40])
def test_a_bar_on_a_terminal(store: Store, columns: int) -> None:
    """It stays within one line, goes at the end, and leaves the cursor as it was."""
    (store.create("data") / "file").write_bytes(os.urandom(64_000_000))
    text, loaded = _backup_on_terminal(store, 0.5, columns)
    *drawn, last = re.split(r"\r(?:\x1b\[1A)?\x1b\[2K", text)
    drawn[-1] = drawn[-1].removesuffix("\r\n")  # of the last one, before the cursor goes up again
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in drawn]
    assert len(lines) > 1
    for line in lines[1:]:
        assert len(line) <= columns
        if columns == 100:
            assert re.fullmatch(
                r"backup of data: [━╸╺ ]{20} 2 entries, \S+B(, \d+ %)?, \S+B/s(, [\d:]+ left)?", line
            )
    assert last == "unionfs: backed up volume data: 2 entries, 64MB.\r\n"
    assert "\x1b[?25l" not in text
    assert loaded


def test_a_quick_operation_has_no_bar_and_does_not_load_rich(store: Store) -> None:
    (store.create("data") / "file").write_bytes(b"x")
    text, loaded = _backup_on_terminal(store, 0, 100)
    assert text == "unionfs: backed up volume data: 2 entries, 1B.\r\n"
    assert not loaded


def _backup_on_terminal(store: Store, seconds: float, columns: int) -> tuple[str, bool]:
    """What a backup shows whose archive nobody reads for a while, and whether it loaded rich."""
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, columns))
    loaded = store.root.parent / "loaded"
    loaded.unlink(missing_ok=True)
    code = (
        "import runpy, sys\n"
        f"hook = lambda event, args: event == 'import' and args[0] == 'rich' and open({str(loaded)!r}, 'w')\n"
        "sys.addaudithook(hook)\n"
        "runpy.run_module('unionfs', run_name='__main__')\n"
    )
    environment = {**os.environ, "UNIONFS_ROOT": str(store.root), "TERM": "xterm"}
    with subprocess.Popen(
        [sys.executable, "-c", code, "volume", "backup", "data", "-o", "-"], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=terminal, env=environment, cwd=REPOSITORY,
    ) as backup:  # fmt: skip
        assert backup.stdout is not None
        size = len(backup.stdout.read(1))
        time.sleep(seconds)
        size += len(backup.stdout.read())
    os.close(terminal)
    assert backup.returncode == 0
    assert size > 0
    return read_to_end(controller).decode(), loaded.exists()
