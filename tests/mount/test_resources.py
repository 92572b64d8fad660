"""What many open files take of the daemon, which has a limited number of file descriptors."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.mount.cli_calls import UNIONFS, Place, call, place, session_words, succeed, wait_for
from tests.mount.cli_calls import unionfs as command
from tests.support import actions
from tests.support.worker import Worker
from unionfs.daemon import live

FDS, FILES = 600, 1400
LIMITED = ("prlimit", f"--nofile={FDS}:{FDS}", "setpriv", "--bounding-set=-sys_resource", *UNIONFS)
"""Else root's daemon raises its limit."""


@contextmanager
def limited(area: Path, session: str, *options: str, files: int = FILES) -> Iterator[Place]:
    """A mount whose daemon has few file descriptors, and that number of files in a lower."""
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed")
    with place(area) as found:
        for index in range(files):
            # programs, which pass through, and files that are not in the page cache after the first open
            content = (b"\x7fELF" if index % 2 else b"text") + bytes(70_000)
            (found.lower / f"f{index:04d}").write_bytes(content)
        words = session_words(session)
        environment = {"UNIONFS_RESIDENT_SECONDS": "0"}
        succeed(call(LIMITED, "mount", *options, *found.layers, *words, found.merged, env=environment))
        yield found
        # the kernel sends RELEASE after close(2) has returned
        assert wait_for(_all_are_closed)
        succeed(command("umount", found.merged))


def _all_are_closed() -> bool:
    answer = live.entries()[0].ask()
    return answer is not None and answer["figures"]["open_files"] == 0


def _fds_of_users(found: Place) -> object:
    return json.loads(succeed(command("inspect", "--json", found.merged)))["figures"]["fds_of_users"]


def test_open_files_of_lowers(root: None, area: Path, session: str) -> None:
    """They take few of the daemon's fds, so others can work; and all of them can still be read."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with limited(area, session) as found, ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 2 * FILES), max(before[1], 2 * FILES)))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        merged = str(found.merged)
        opened = []
        for index in range(FILES):
            opened.append(os.open(f"{merged}/f{index:04d}", os.O_RDONLY))
            stack.callback(os.close, opened[-1])
        (found.merged / "new").write_text("written")
        os.chmod(f"{merged}/f0000", 0o600)  # a copy-up
        os.unlink(f"{merged}/f0001")
        assert len(os.listdir(merged)) == FILES + 2
        for index, fd in enumerate(opened):
            assert os.pread(fd, 4, 0) == (b"\x7fELF" if index % 2 else b"text")
            assert os.pread(fd, 100, 69_990) == bytes(14)
        assert subprocess.run(["cat", f"{merged}/f1399"], capture_output=True).stdout[:4] == b"\x7fELF"


def test_shares_of_users(root: None, area: Path, session: str) -> None:
    """One user's open files of the upper leave some to others, and all of them some to names and copy-ups."""
    if session == "direct-cached":
        pytest.skip("it sends no OPEN: a limited number of files stays open")
    with limited(area, session, "-o", "allow_other", files=1) as found:
        os.chmod(found.merged, 0o777)
        with Worker(1000, 1000, []) as one, Worker(1001, 1001, []) as other:
            taken = one.call(actions.open_new, str(found.merged), "a", FDS)
            assert FDS // 4 < taken <= FDS // 2
            assert other.call(actions.open_new, str(found.merged), "b", 100) == 100
            assert one.call(actions.open_new, str(found.merged), "c", 1) == 0
            assert _fds_of_users(found) == {"1000": taken, "1001": 100}
            other.call(actions.open_new, str(found.merged), "d", FDS)
            os.chmod(found.merged / "deep", 0o600)  # a copy-up
            os.unlink(found.merged / "f0000")
            os.mkdir(found.merged / "directory")
            assert "directory" in os.listdir(found.merged)


def test_shares_of_users_who_change_what_they_read(root: None, area: Path, session: str) -> None:
    """A file of a lower needs no fd while it is open, but its copy does. A user who changes open files
    gets no more fds than one who opens files of the upper, whatever the change is; others can change them."""
    if session == "direct-cached":
        pytest.skip("it sends no OPEN: a limited number of files stays open")
    with limited(area, session, "-o", "allow_other", files=FDS) as found:
        for top in (found.lower, found.merged):
            os.chmod(top, 0o777)
        for path in found.lower.iterdir():
            os.chown(path, 1000, 1000)
        merged = str(found.merged)
        os.setxattr(found.lower / "f0000", "user.a", b"1")  # that is copied up in steps
        with Worker(1000, 1000, []) as one, Worker(1001, 1001, []) as other:
            assert one.call(actions.open_all, merged, FDS) == FDS
            changed = one.call(actions.change_all, merged, FDS)
            assert FDS // 4 < changed <= FDS // 2
            assert _fds_of_users(found) == {"1000": changed}
            for index, change in enumerate(actions.CHANGES):
                with pytest.raises(OSError, match="Too many open files"):
                    one.call(change, f"{merged}/f{FDS - 1 - index:04d}")
            assert _fds_of_users(found) == {"1000": changed}
            assert other.call(actions.open_new, merged, "b", 50) == 50
            os.chmod(found.merged / f"f{FDS - 1:04d}", 0o640)
            assert (found.upper / f"f{FDS - 1:04d}").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("kind", ["file", "directory", "temporary"])
def test_removed_ones_that_are_open(root: None, area: Path, session: str, kind: str) -> None:
    """A user's leave some fds to others, to names and to copy-ups, and all can be used again afterwards."""
    if session == "pyfuse3" and kind == "temporary":
        pytest.skip("libfuse lacks O_TMPFILE")
    with limited(area, session, "-o", "allow_other", files=1) as found:
        merged = found.merged
        os.chmod(merged, 0o777)
        with Worker(1000, 1000, []) as one, Worker(1001, 1001, []) as other:
            taken = one.call(actions.open_removed, str(merged), kind, FDS)
            assert FDS // 8 < taken < FDS
            assert other.call(actions.open_new, str(merged), "b", 10) == 10
            os.chmod(merged / "deep", 0o600)  # a copy-up
            os.mkdir(merged / "made")
            os.rename(merged / "made", merged / "moved")
            assert "moved" in os.listdir(merged)
            assert (merged / "f0000").read_bytes()[:4] == b"text"
            assert json.loads(succeed(command("inspect", "--json", merged)))["figures"]["nodes"] > 0
        with Worker(1000, 1000, []) as one:
            assert one.call(actions.open_removed, str(merged), kind, FDS // 8) == FDS // 8
