"""Invariants when a step fails, or a layer has unexpected content."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from tests.unit.union_support import (
    ME,
    OpenUnion,
    copy_up,
    find,
    get,
    names,
    open_union,
    read,
    whiteout,
    without_bundles,
)
from unionfs.sys.attributes import OWNER, unsupported
from unionfs.union.changes import Changes

__all__ = ["open_union"]


@contextmanager
def immutable(directory: Path) -> Iterator[None]:
    """The directory refuses every change."""
    done = subprocess.run(["chattr", "+i", directory], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"chattr +i: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", directory], check=True)


def left_in_work(tmp_path: Path) -> list[str]:
    return os.listdir(tmp_path / "work/work")


class TestFailedSteps:
    def test_failed_unlink_does_not_lead_later_writes_into_the_lower(
        self, tmp_path: Path, open_union: OpenUnion
    ) -> None:
        (tmp_path / "l0").mkdir()
        (tmp_path / "l0/f").write_text("lower")
        union = open_union()
        node = get(union, "f")
        with immutable(tmp_path / "upper"), pytest.raises(PermissionError):
            Changes(union).unlink(union.nodes.root, b"f")
        assert node.held < 0
        copy_up(union, node)
        file = union.files.lend(node, write=True)
        file.write(b"UPPER", 0)
        union.files.take_back(node, file)
        assert (tmp_path / "l0/f").read_text() == "lower"
        assert (tmp_path / "upper/f").read_text() == "UPPER"

    def test_a_lower_is_never_opened_for_writing(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0").mkdir()
        (tmp_path / "l0/f").touch()
        union = open_union()
        with pytest.raises(OSError, match="never written"):
            union.files.lend(get(union, "f"), write=True)

    def test_work_that_outlives_the_last_open_leaves_no_closed_file(
        self, tmp_path: Path, open_union: OpenUnion
    ) -> None:
        """A caller may close the file before a thread has finished reading for it."""
        (tmp_path / "l0").mkdir()
        (tmp_path / "l0/f").write_text("lower")
        union = open_union()
        node = get(union, "f")
        file = union.files.lend(node, write=False)
        with file:
            union.files.take_back(node, file)
        again = union.files.lend(node, write=False)
        assert again.read(10, 0) == b"lower"
        union.files.take_back(node, again)

    def test_failed_changes_leave_nothing_in_work(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0").mkdir()
        for name in ("gone", "copied"):
            (tmp_path / "l0" / name).touch()
        union = open_union()
        root, changes = union.nodes.root, Changes(union)
        changes.unlink(root, b"gone")
        copied = get(union, "copied")
        copy_up(union, copied)
        before = len(os.listdir("/proc/self/fd"))
        with immutable(tmp_path / "upper"):
            with pytest.raises(PermissionError):
                changes.create(root, b"gone", 0o644, ME)
            with pytest.raises(PermissionError):
                changes.mkdir(root, b"gone", 0o755, ME)
            with pytest.raises(PermissionError):
                changes.link(copied, root, b"gone")
            with pytest.raises(PermissionError):
                changes.unlink(root, b"copied")
        assert left_in_work(tmp_path) == []
        assert len(os.listdir("/proc/self/fd")) == before

    def test_an_xattr_whiteout_that_the_directory_cannot_announce(
        self, tmp_path: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No trace is left, or the next mount would accept what this one reported as failed."""
        (tmp_path / "l0").mkdir()
        (tmp_path / "l0/f").write_text("lower")
        union = open_union()
        get(union, "f")

        def refuse(*arguments: object, **named: object) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        def is_full(fd: int) -> None:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        with monkeypatch.context() as patch, without_bundles():
            patch.setattr(os, "mknod", refuse)  # as for an ordinary user on some filesystems
            patch.setattr(union.markers, "allow_xattr_whiteouts", is_full)
            with pytest.raises(OSError, match=os.strerror(errno.EDQUOT)):
                Changes(union).unlink(union.nodes.root, b"f")
        assert os.listdir(tmp_path / "upper") == []
        assert left_in_work(tmp_path) == []

    def test_where_new_files_are_not_as_asked_for(
        self, tmp_path: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on NFS with root_squash: mode and owner of a copy are set, or refused."""
        (tmp_path / "l0").mkdir()
        (tmp_path / "l0/f").write_text("lower")
        os.chmod(tmp_path / "l0/f", 0o640)
        creates = os.open

        def creates_otherwise(
            path: str | bytes, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
        ) -> int:
            fd = creates(path, flags, mode, dir_fd=dir_fd)
            if flags & os.O_CREAT and dir_fd is not None:
                os.fchmod(fd, 0o600)
            return fd

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", creates_otherwise)
            union = open_union()
            copy_up(union, get(union, "f"))
        assert stat.S_IMODE((tmp_path / "upper/f").stat().st_mode) == 0o640
        assert left_in_work(tmp_path) == []

    def test_work_of_a_crashed_daemon_is_emptied(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "work/work/#1/a/b").mkdir(parents=True)
        (tmp_path / "work/work/#1/a/b/f").touch()
        whiteout(tmp_path / "work/work/#2")
        open_union()
        assert left_in_work(tmp_path) == []

    def test_nothing_is_inherited_from_work(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "work/work").mkdir(parents=True)
        os.chmod(tmp_path / "work/work", 0o2777)
        subprocess.run(["setfacl", "-d", "-m", "u:1000:rwx", tmp_path / "work/work"], check=True)
        (tmp_path / "l0").mkdir()
        (tmp_path / "l0/f").write_text("x")
        os.chmod(tmp_path / "l0/f", 0o660)
        union = open_union()
        copy_up(union, get(union, "f"))
        assert stat.S_IMODE((tmp_path / "upper/f").stat().st_mode) == 0o660
        assert set(os.listxattr(tmp_path / "upper/f")) <= {"user.overlay.origin"}


class TestRedirects:
    """Redirects written by the kernel with ``redirect_dir=on`` are read; those out of a layer are refused."""

    @pytest.mark.parametrize("redirect", [b"..", b".", b"/..", b"/a/../..", b"//", b"/a//b"])
    def test_it_never_leads_out_of_a_layer(
        self, tmp_path: Path, open_union: OpenUnion, redirect: bytes
    ) -> None:
        (tmp_path / "l0/d").mkdir(parents=True)
        os.setxattr(tmp_path / "l0/d", "user.overlay.redirect", redirect)
        (tmp_path / "l1/a").mkdir(parents=True)
        union = open_union(2)
        with pytest.raises(OSError, match="redirect"):
            find(union, "d")

    def test_from_a_directory_that_only_the_upper_has(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0/a/b").mkdir(parents=True)
        (tmp_path / "l0/a/b/f").write_text("kept")
        (tmp_path / "upper/new/moved").mkdir(parents=True)
        os.setxattr(tmp_path / "upper/new/moved", "user.overlay.redirect", b"/a/b")
        union = open_union(redirect_dir="follow")
        assert read(union, "new/moved/f") == b"kept"
        with pytest.raises(OSError, match="cross-device"):
            Changes(union).rename(get(union, "new"), b"moved", union.nodes.root, b"x", 0)

    def test_opaque_on_the_way_hides_deeper_layers(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0/new").mkdir(parents=True)
        os.setxattr(tmp_path / "l0/new", "user.overlay.redirect", b"/q/r")
        (tmp_path / "l1/q").mkdir(parents=True)
        os.setxattr(tmp_path / "l1/q", "user.overlay.opaque", b"y")
        (tmp_path / "l2/q/r").mkdir(parents=True)
        (tmp_path / "l2/q/r/hidden").touch()
        assert names(open_union(3), "new") == set()

    def test_whiteout_on_the_way_hides_deeper_layers(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0/new").mkdir(parents=True)
        os.setxattr(tmp_path / "l0/new", "user.overlay.redirect", b"/q/r")
        (tmp_path / "l1").mkdir()
        whiteout(tmp_path / "l1/q")
        (tmp_path / "l2/q/r").mkdir(parents=True)
        (tmp_path / "l2/q/r/hidden").touch()
        assert names(open_union(3), "new") == set()

    def test_redirect_on_the_way_counts_for_deeper_layers(
        self, tmp_path: Path, open_union: OpenUnion
    ) -> None:
        (tmp_path / "l0/new").mkdir(parents=True)
        os.setxattr(tmp_path / "l0/new", "user.overlay.redirect", b"/q/r")
        (tmp_path / "l1/q").mkdir(parents=True)
        os.setxattr(tmp_path / "l1/q", "user.overlay.redirect", b"/old")
        (tmp_path / "l2/old/r").mkdir(parents=True)
        (tmp_path / "l2/old/r/f").write_text("far")
        assert read(open_union(3), "new/f") == b"far"


class TestHardLinks:
    def test_names_not_looked_up_yet_are_the_same_node(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "upper").mkdir()
        (tmp_path / "upper/a").write_text("x")
        os.link(tmp_path / "upper/a", tmp_path / "upper/b")
        union = open_union()
        a = get(union, "a")
        a.lookups = 1
        Changes(union).unlink(union.nodes.root, b"a")
        assert get(union, "b") is a
        a.lookups += 1
        Changes(union).link(a, union.nodes.root, b"c")
        a.lookups += 1
        union.nodes.forget(a, 3)
        assert len(union.nodes) == 1

    def test_a_users_metacopy_is_not_renamed(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "upper").mkdir()
        (tmp_path / "upper/f").touch()
        os.setxattr(tmp_path / "upper/f", "user.overlay.metacopy", b"")
        union = open_union()
        node = get(union, "f")
        assert Changes(union).rename(union.nodes.root, b"f", union.nodes.root, b"g", 0) == [node]
        with pytest.raises(PermissionError):
            union.files.lend_for_writing(node)


@pytest.mark.parametrize(
    ("name", "is_needed"),
    [(b"user.x", False), (b"trusted.x", False), (b"system.posix_acl_access", True), (OWNER, True),
     (b"system.posix_acl_default", True), (b"security.capability", True)],
)  # fmt: skip
def test_attributes_that_a_filesystem_lacks(name: bytes, is_needed: bool) -> None:
    """Those that grant or deny rights must be copied; the others only if nothing but support is missing."""
    lacking = OSError(errno.EOPNOTSUPP, "lacks it")
    with pytest.raises(OSError, match="lacks it") if is_needed else nullcontext():
        unsupported(name, lacking)
    with pytest.raises(OSError, match="full"):
        unsupported(name, OSError(errno.ENOSPC, "full"))
