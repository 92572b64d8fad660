"""`unionfs refresh`: lowers that are changed from outside, beside a mount that is made after the change."""

from __future__ import annotations

import mmap
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.mount.cli_calls import Place, gone, refused, succeed, unionfs, wait_for
from tests.support.mounting import Mount, kernel_mounted, mounted

Shown = dict[str, tuple[object, ...]]


def _shown(root: Path, below: str = "") -> Shown:
    """All of a tree: types, modes, sizes, link targets and data."""
    found: Shown = {}
    with os.scandir(root / below) as entries:
        for entry in entries:
            path = os.path.join(below, entry.name)
            st = entry.stat(follow_symlinks=False)
            what: object = None
            if stat.S_ISREG(st.st_mode):
                what = st.st_size, (root / path).read_bytes()
            elif stat.S_ISLNK(st.st_mode):
                what = os.readlink(root / path)
            found[path] = oct(st.st_mode), what
            if stat.S_ISDIR(st.st_mode):
                found |= _shown(root, path)
    return found


def _fill(lower: Path, text: str) -> None:
    for name in ("d/sub/deep", "e", "vanishes/below"):
        (lower / name).mkdir(parents=True)
    for number in range(20):
        (lower / f"d/f{number}").write_text(f"{text} {number}\n")
        (lower / f"d/sub/deep/g{number}").write_text(f"{text} {number}\n" * 3000)
    (lower / "vanishes/below/x").write_text(text)
    (lower / "link").symlink_to(f"d/{text}")
    (lower / "changes-kind").write_text(text)
    (lower / f"only-{text}").write_text(text)


class _World:
    """Two lowers, an upper with some changes, and the union; ``fresh`` is what a new mount shows."""

    def __init__(self, area: Path, mount: Mount) -> None:
        self.area = area
        self.mount = mount
        self.top, self.bottom = mount.lowers
        self.union = mount.mountpoint

    def refresh(self) -> None:
        succeed(unionfs("refresh", self.union))

    def fresh(self) -> Shown:
        with ExitStack() as stack:
            copies = self.area / "copies"
            copies.mkdir()
            stack.callback(shutil.rmtree, copies)
            assert self.mount.upper is not None
            for layer in (*self.mount.lowers, self.mount.upper):
                subprocess.run(["cp", "-a", str(layer), str(copies)], check=True)
            (copies / "work").mkdir()
            mount = stack.enter_context(
                kernel_mounted(
                    self.area, lowers=[copies / "top", copies / "bottom"], upper=copies / "upper",
                    work=copies / "work",
                )
            )  # fmt: skip
            return _shown(mount.mountpoint)

    def check(self) -> None:
        self.refresh()
        assert _shown(self.union) == self.fresh()
        for name in ("not-there", "d/not-there", "e/not-there"):
            assert not (self.union / name).exists()


@pytest.fixture
def made(kernel_overlay: None, area: Path, session: str) -> Iterator[_World]:
    for name in ("top", "bottom", "upper", "work"):
        (area / name).mkdir()
    _fill(area / "top", "top")
    _fill(area / "bottom", "bottom")
    lowers = [area / "top", area / "bottom"]
    with mounted(area, lowers=lowers, upper=area / "upper", work=area / "work", session=session) as mount:
        (mount.mountpoint / "d/f1").write_text("of the upper\n")
        (mount.mountpoint / "d/f2").unlink()
        (mount.mountpoint / "d/own").write_text("own\n")
        found = _World(area, mount)
        _shown(mount.mountpoint)
        for name in ("not-there", "d/not-there", "e/not-there", "e/new", "new", "d/f30", "d/sub/new/x"):
            assert not (mount.mountpoint / name).exists()
        yield found


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
    for number in range(3000):
        (made.top / f"e/many{number}").write_text(f"{number}\n")
    made.refresh()
    assert len(os.listdir(made.union / "e")) == 3000
    for path in (made.union / "e").iterdir():
        path.read_bytes()
    for number in range(0, 3000, 2):
        (made.top / f"e/many{number}").write_text(f"changed {number}\n")
    made.refresh()
    for number in range(3000):
        expected = f"{number}\n" if number % 2 else f"changed {number}\n"
        assert (made.union / f"e/many{number}").read_text() == expected


def test_refused(place: Place) -> None:
    refused(unionfs("refresh", place.merged), "is not a live unionfs mount")
    pid = place.mount()
    os.kill(pid, 9)
    assert wait_for(lambda: gone(pid))
    refused(unionfs("refresh", place.merged), "has died", "unionfs umount")
    succeed(unionfs("umount", place.merged))
