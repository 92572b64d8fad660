"""`unionfs refresh`: lowers that are changed from outside, beside a mount that is made after the change."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.cli_calls import Place, gone, refused, succeed, unionfs, wait_for
from tests.support.live_lowers import World, world


class _World(World):
    """A union that shows changes after `unionfs refresh`."""

    def refresh(self) -> None:
        succeed(unionfs("refresh", self.union))

    def check(self) -> None:
        self.refresh()
        assert self.seen() == self.fresh()
        for name in ("not-there", "d/not-there", "e/not-there"):
            assert not (self.union / name).exists()


@pytest.fixture
def made(kernel_overlay: None, area: Path, session: str) -> Iterator[_World]:
    with world(area, session) as found:
        yield _World(area, found.mount)


def test_changes_of_all_kinds(made: _World) -> None:
    made.check()
    (made.top / "d/f3").write_text("changed in place, and longer\n")
    (made.top / "d/f4").write_text("")
    (made.top / "d/f1").write_text("below the upper's\n")
    (made.top / "d/f2").write_text("below a whiteout\n")
    (made.top / "d/replaced").write_text("replaced\n")
    os.rename(made.top / "d/replaced", made.top / "d/f5")
    (made.top / "d/f6").unlink()  # the bottom's shows
    for lower in (made.top, made.bottom):
        (lower / "d/f7").unlink()
    (made.top / "d/f30").write_text("new\n")
    (made.top / "d/f8").chmod(0o600)
    (made.top / "e/new").symlink_to("x")
    (made.bottom / "new").write_text("new\n")
    made.check()
    shutil.rmtree(made.top / "vanishes")
    made.check()
    shutil.rmtree(made.bottom / "vanishes")
    (made.top / "d/sub/new").mkdir()
    (made.top / "d/sub/new/x").write_text("x")
    (made.top / "changes-kind").unlink()
    (made.top / "changes-kind").mkdir()
    (made.top / "changes-kind/x").write_text("x")
    (made.top / "link").unlink()
    (made.top / "link").symlink_to("elsewhere")
    made.check()
    shutil.rmtree(made.top / "d/sub")
    (made.top / "d/sub").mkdir()
    (made.top / "d/sub/other").write_text("other")
    os.rename(made.top / "d/f9", made.top / "e/moved")
    os.rename(made.top / "e", made.top / "e2")
    made.check()
    (made.union / "d/f3").write_text("copied up after all\n")
    (made.union / "d/sub/other").write_text("copied up, too\n")
    made.check()


def test_what_is_open_and_mapped(made: _World) -> None:
    """Data changed in place shows; a replaced file stays for those who have it open."""
    size = (made.top / "d/sub/deep/g1").stat().st_size
    with (
        (made.union / "d/sub/deep/g1").open("rb") as changed,
        (made.union / "d/f5").open("rb") as replaced,
        mmap.mmap(changed.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        assert mapped[:3] == b"top"
        (made.top / "d/sub/deep/g1").write_text("new"[:3] * (size // 3) + "x" * (size % 3))
        (made.top / "d/other").write_text("another\n")
        os.rename(made.top / "d/other", made.top / "d/f5")
        made.refresh()
        assert os.pread(changed.fileno(), 6, 0) == b"newnew"
        assert mapped[:6] == b"newnew"
        assert replaced.read() == b"top 5\n"
        assert (made.union / "d/f5").read_text() == "another\n"
        assert os.fstat(changed.fileno()).st_size == size
    made.check()


def test_hard_links(kernel_overlay: None, area: Path, session: str) -> None:
    """A name of a hard link that was given to another file is lost; the others stay, with their number."""
    with world(area, session, links=True) as found:
        made = _World(area, found.mount)
        number = (made.union / "e/link0").stat().st_ino
        with (made.union / "e/link0").open("rb") as opened:
            made.check()
            (made.top / "d/other").write_text("another file\n")
            os.rename(made.top / "d/other", made.top / "e/link1")
            made.check()
            assert (made.union / "e/link0").stat().st_ino == number
            assert os.fstat(opened.fileno()).st_size == 7
            (made.top / "d/f10").unlink()
            made.check()
            assert opened.read() == b"top 10\n"
        (made.union / "e/link2").write_text("copied up\n")
        (made.top / "e/link1").write_text("changed\n")
        made.refresh()
        assert (made.union / "e/link2").read_text() == "copied up\n"
        assert (made.union / "e/link1").read_text() == "changed\n"


def test_what_is_mounted_inside_stays(made: _World) -> None:
    for name in ("d/sub", "e"):
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(made.union / name)], check=True)
        (made.union / name / "inside").touch()
    try:
        (made.top / "d/f3").write_text("changed\n")
        (made.top / "d/sub/below").write_text("below the mount\n")
        (made.top / "e/new").write_text("below the mount\n")
        made.refresh()
        assert os.listdir(made.union / "d/sub") == os.listdir(made.union / "e") == ["inside"]
        assert (made.union / "d/f3").read_text() == "changed\n"
    finally:
        for name in ("d/sub", "e"):
            subprocess.run(["umount", str(made.union / name)], check=True)
    made.check()


def test_the_working_directory_stays(made: _World) -> None:
    here = os.open(made.union / "d/sub", os.O_RDONLY | os.O_DIRECTORY)
    try:
        (made.top / "d/sub/fresh").write_text("fresh\n")
        shutil.rmtree(made.bottom / "d")
        made.refresh()
        with open(os.open("fresh", os.O_RDONLY, dir_fd=here)) as fresh:
            assert fresh.read() == "fresh\n"
        assert sorted(os.listdir(here)) == ["deep", "fresh"]
    finally:
        os.close(here)
    made.check()


def test_without_a_refresh(made: _World) -> None:
    """Changed lowers are no reason to fail: the daemon serves on, and shows one state or the other."""
    shutil.rmtree(made.top / "d/sub")
    (made.top / "d/f3").write_text("changed\n")
    (made.top / "d/f4").unlink()
    os.rename(made.top / "e", made.top / "moved")
    (made.top / "e").write_text("a file\n")
    for name in ("d/sub/deep/g1", "d/f3", "d/f4", "e/new", "moved"):
        path = made.union / name
        try:
            assert path.read_bytes()[:4] in (b"top ", b"chan", b"bott", b"")
        except OSError as error:
            assert error.errno  # noqa: PT017
    assert "own" in os.listdir(made.union / "d")
    made.check()


def test_many_files(made: _World) -> None:
    for number in range(1500):
        (made.top / f"e/many{number}").write_text(f"{number}\n")
    made.refresh()
    assert len(os.listdir(made.union / "e")) == 1500
    for path in (made.union / "e").iterdir():
        path.read_bytes()
    for number in range(0, 1500, 2):
        (made.top / f"e/many{number}").write_text(f"changed {number}\n")
    made.refresh()
    for number in range(1500):
        expected = f"{number}\n" if number % 2 else f"changed {number}\n"
        assert (made.union / f"e/many{number}").read_text() == expected


def test_refused(place: Place) -> None:
    refused(unionfs("refresh", place.merged), "is not an active unionfs mount")
    pid = place.mount()
    os.kill(pid, 9)
    assert wait_for(lambda: gone(pid))
    refused(unionfs("refresh", place.merged), "has died", "unionfs cleanup")
    succeed(unionfs("umount", place.merged))
