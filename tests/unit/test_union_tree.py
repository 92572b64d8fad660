"""Lookup, merge rules, listing and node numbers, without a mount."""

from __future__ import annotations

import errno
import os
import stat
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.unit.union_support import ME, OpenUnion, copy_up, find, get, names, open_union, read, whiteout
from unionfs.core.lowernames import LowerNames
from unionfs.sys import calls
from unionfs.union.changes import Changes
from unionfs.union.copyup import CopyUp, Effects
from unionfs.union.filecopy import FileCopy
from unionfs.union.tree import Union

__all__ = ["open_union"]

KEPT = ("st_mode", "st_uid", "st_gid", "st_atime_ns", "st_mtime_ns")


class TestMergeRules:
    @pytest.fixture(params=[False, True], ids=["each lower is asked", "lowers are listed"], autouse=True)
    def _listed(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        if request.param:
            monkeypatch.setattr("unionfs.union.merge.LowerNames", partial(LowerNames, many=1, asked=1))

    def test_topmost_object_wins(self, tmp_path: Path, open_union: OpenUnion) -> None:
        for layer, text in (("l0", "top"), ("l1", "bottom")):
            (tmp_path / layer).mkdir()
            (tmp_path / layer / "f").write_text(text)
        assert read(open_union(2), "f") == b"top"

    def test_directories_merge_until_a_file_ends_it(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0/d").mkdir(parents=True)
        (tmp_path / "l0/d/a").touch()
        (tmp_path / "l1").mkdir()
        (tmp_path / "l1/d").touch()
        (tmp_path / "l2/d").mkdir(parents=True)
        (tmp_path / "l2/d/hidden").touch()
        union = open_union(3)
        assert names(union, "d") == {b"a"}
        assert find(union, "d/hidden") is None

    def test_whiteout_hides_below(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0").mkdir()
        whiteout(tmp_path / "l0/f")
        (tmp_path / "l1").mkdir()
        (tmp_path / "l1/f").touch()
        union = open_union(2)
        assert find(union, "f") is None
        assert names(union) == set()

    def test_xattr_whiteout_hides_below(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0").mkdir()
        (tmp_path / "l0/f").touch()
        os.setxattr(tmp_path / "l0/f", "user.overlay.whiteout", b"y")
        os.setxattr(tmp_path / "l0", "user.overlay.opaque", b"x")
        (tmp_path / "l1").mkdir()
        (tmp_path / "l1/f").write_text("below")
        (tmp_path / "l1/g").touch()
        union = open_union(2)
        assert find(union, "f") is None
        assert names(union) == {b"g"}

    def test_opaque_directory_hides_below(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0/d").mkdir(parents=True)
        os.setxattr(tmp_path / "l0/d", "user.overlay.opaque", b"y")
        (tmp_path / "l1/d").mkdir(parents=True)
        (tmp_path / "l1/d/f").touch()
        union = open_union(2)
        assert find(union, "d/f") is None
        assert union.nodes.root.territory.is_empty(get(union, "d"))

    @pytest.mark.parametrize("redirect", [b"old", b"/deep/old"])
    def test_redirect_is_followed(self, tmp_path: Path, open_union: OpenUnion, redirect: bytes) -> None:
        below = tmp_path / "l1" / redirect.decode().lstrip("/")
        below.mkdir(parents=True)
        (below / "f").write_text("moved along")
        (tmp_path / "l0/new").mkdir(parents=True)
        os.setxattr(tmp_path / "l0/new", "user.overlay.redirect", redirect)
        assert read(open_union(2), "new/f") == b"moved along"

    @pytest.mark.parametrize("listed", [True, False])
    def test_a_users_metacopy_file_is_refused_not_read_as_zeros(
        self, tmp_path: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch, listed: bool
    ) -> None:
        """Also where a filesystem has xattrs but does not list them."""
        for layer in ("l0", "l1"):
            (tmp_path / layer).mkdir()
            (tmp_path / layer / "f").write_text("data")
        os.setxattr(tmp_path / "l0/f", "user.overlay.metacopy", b"")
        union = open_union(2)
        if not listed:
            monkeypatch.setattr(os, "listxattr", Mock(side_effect=OSError(errno.EOPNOTSUPP, "")))
        with pytest.raises(PermissionError):
            read(union, "f")

    def test_more_xattrs_than_can_be_listed(
        self, tmp_path: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Such a file (for example of xfs) is read, and not copied up without them."""
        (tmp_path / "l0").mkdir()
        (tmp_path / "l0/f").write_text("data")
        os.setxattr(tmp_path / "l0/f", "user.kept", b"value")
        union = open_union()
        monkeypatch.setattr(os, "listxattr", Mock(side_effect=OSError(errno.E2BIG, "")))
        assert read(union, "f") == b"data"
        with pytest.raises(OSError, match="Errno 7"):
            copy_up(union, get(union, "f"))
        assert os.listdir(tmp_path / "upper") == []

    def test_names_over_255_bytes(self, open_union: OpenUnion) -> None:
        union = open_union()
        assert union.lookup(union.nodes.root, b"n" * 255) is None
        with pytest.raises(OSError, match="too long") as caught:
            union.lookup(union.nodes.root, b"n" * 256)
        assert caught.value.errno == errno.ENAMETOOLONG


class TestGate:
    def test_few_fds_serve_a_deep_tree(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0").mkdir()
        fd = os.open(tmp_path / "l0", os.O_RDONLY)
        for _ in range(200):
            os.mkdir("d" * 50, dir_fd=fd)
            inner = os.open("d" * 50, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = inner
        os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.close(fd)
        union = open_union(directory_fds=64)
        leaf = get(union, "/".join(["d" * 50] * 200 + ["leaf"]))
        assert len(union.gate) <= 64
        copy_up(union, leaf)
        assert leaf.in_place
        assert len(union.gate) <= 64


class TestEmptyCopies:
    """A copied-up directory is not searched for names until an entry is added."""

    @pytest.fixture
    def union(self, tmp_path: Path, open_union: OpenUnion) -> Union:
        (tmp_path / "l0/d/sub").mkdir(parents=True)
        for name in ("f", "g", "sub/h"):
            (tmp_path / "l0/d" / name).write_text("lower")
        union = open_union()
        CopyUp(union).directory(get(union, "d"))
        assert get(union, "d").parts[0].empty
        return union

    @pytest.mark.parametrize("change", ["create", "remove", "copy up", "copy up below", "move in", "link in"])
    def test_something_comes(self, union: Union, change: str) -> None:
        changes, root, directory = Changes(union), union.nodes.root, get(union, "d")
        seen = names(union, "d")
        assert seen == {b"f", b"g", b"sub"}
        if change == "create":
            os.close(changes.create(directory, b"new", 0o644, ME)[2])
            seen.add(b"new")
        elif change == "remove":
            changes.unlink(directory, b"g")
            seen.discard(b"g")
        elif change == "copy up":
            copy_up(union, get(union, "d/g"))
        elif change == "copy up below":
            copy_up(union, get(union, "d/sub/h"))
            assert not get(union, "d/sub").parts[0].empty
        else:
            node, _, fd = changes.create(root, b"new", 0o644, ME)
            os.close(fd)
            if change == "move in":
                changes.rename(root, b"new", directory, b"new", 0)
            else:
                changes.link(node, directory, b"new")
            seen.add(b"new")
        assert not directory.parts[0].empty
        for node in list((directory.children or {}).values()):
            union.nodes.forget(node, node.lookups)
        assert {name for name in (b"f", b"g", b"sub", b"new") if union.lookup(directory, name)} == seen

    def test_nothing_comes(self, union: Union) -> None:
        directory = get(union, "d")
        assert directory.parts[0].empty
        assert read(union, "d/f") == b"lower"
        for node in (get(union, "d/f"), directory):
            union.nodes.forget(node, 0)
        assert not get(union, "d").parts[0].empty  # it is no longer known


class TestNumbers:
    def test_same_before_and_after_copy_up_and_forget(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0").mkdir()
        (tmp_path / "l0/f").write_text("x")
        union = open_union()
        node = get(union, "f")
        number = node.ino
        copy_up(union, node)
        assert node.ino == number
        node.lookups = 1
        union.nodes.forget(node, 1)
        assert union.nodes.get(number) is None
        assert get(union, "f").ino == number

    def test_lower_hard_links_without_an_index(self, tmp_path: Path, open_union: OpenUnion) -> None:
        """A node a name, with one number until one of them is copied up."""
        (tmp_path / "l0").mkdir()
        (tmp_path / "l0/a").write_text("x")
        os.link(tmp_path / "l0/a", tmp_path / "l0/b")
        (tmp_path / "upper").mkdir()
        (tmp_path / "upper/used").mkdir()
        union = open_union()
        assert union.index is None
        a, b = get(union, "a"), get(union, "b")
        number = a.ino
        assert (a.id != b.id, b.ino) == (True, number)
        copy_up(union, a)
        assert not b.in_place
        assert (a.ino, b.ino) == ((tmp_path / "upper/a").stat().st_ino, number)

    def test_upper_hard_links_are_one_node(self, open_union: OpenUnion) -> None:
        union = open_union()
        root = union.nodes.root
        node, _, fd = Changes(union).create(root, b"a", 0o644, ME)
        os.close(fd)
        Changes(union).link(node, root, b"b")
        assert get(union, "b") is node
        node.lookups = 2
        union.nodes.forget(node, 2)
        assert get(union, "a") is get(union, "b")

    def test_unlinked_node_keeps_its_object_until_forgotten(self, open_union: OpenUnion) -> None:
        union = open_union()
        node, _, fd = Changes(union).create(union.nodes.root, b"a", 0o644, ME)
        os.close(fd)
        node.lookups = 1
        Changes(union).unlink(union.nodes.root, b"a")
        assert union.attributes(node).nlink == 0
        held = node.held
        union.nodes.forget(node, 1)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(held)

    def test_table_gives_everything_back(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0/d/e").mkdir(parents=True)
        (tmp_path / "l0/d/e/f").touch()
        union = open_union()
        nodes = [get(union, path) for path in ("d", "d/e", "d/e/f")]
        for node in nodes:
            node.lookups = 1
        for node in nodes:  # parents first: they stay as long as a node below needs them
            union.nodes.forget(node, 1)
        assert len(union.nodes) == 1


class TestChangesOnDisk:
    def test_unlink_of_a_lower_file_leaves_a_whiteout(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0").mkdir()
        (tmp_path / "l0/f").touch()
        union = open_union()
        Changes(union).unlink(union.nodes.root, b"f")
        st = (tmp_path / "upper/f").lstat()
        assert stat.S_ISCHR(st.st_mode)
        assert st.st_rdev == 0
        assert find(union, "f") is None

    def test_mkdir_over_a_whiteout_is_opaque(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0/d").mkdir(parents=True)
        (tmp_path / "l0/d/f").touch()
        union = open_union()
        changes = Changes(union)
        changes.unlink(get(union, "d"), b"f")
        changes.rmdir(union.nodes.root, b"d")
        changes.mkdir(union.nodes.root, b"d", 0o755, ME)
        assert os.getxattr(tmp_path / "upper/d", "user.overlay.opaque") == b"y"
        assert names(union, "d") == set()
        assert os.listdir(tmp_path / "work/work") == []

    def test_copy_up_keeps_holes_times_and_xattrs(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0/d").mkdir(parents=True)
        source = tmp_path / "l0/d/f"
        with source.open("wb") as file:
            file.truncate(8 << 20)
            file.seek(4 << 20)
            file.write(b"island")
        os.setxattr(source, "user.colour", b"blue")
        os.utime(source, ns=(1_000_000_001, 2_000_000_002))
        os.utime(tmp_path / "l0/d", ns=(3, 4))
        union = open_union()
        copy_up(union, get(union, "d/f"))
        copy = tmp_path / "upper/d/f"
        assert copy.read_bytes() == source.read_bytes()
        assert copy.stat().st_blocks <= source.stat().st_blocks + 16
        assert copy.stat().st_mtime_ns == 2_000_000_002
        assert os.getxattr(copy, "user.colour") == b"blue"
        assert (tmp_path / "upper/d").stat().st_mtime_ns == 4

    def test_truncating_copy_up_copies_no_more_than_needed(
        self, tmp_path: Path, open_union: OpenUnion
    ) -> None:
        (tmp_path / "l0").mkdir()
        (tmp_path / "l0/f").write_bytes(b"x" * 100_000)
        union = open_union()
        copy_up(union, get(union, "f"), limit=10)
        assert (tmp_path / "upper/f").read_bytes() == b"x" * 10

    def test_failed_copy_up_leaves_nothing(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0").mkdir()
        (tmp_path / "l0/f").write_text("x")
        union = open_union()
        with FileCopy(CopyUp(union), get(union, "f")) as copy:
            copy.copy()
        assert os.listdir(tmp_path / "work/work") == []
        assert os.listdir(tmp_path / "upper") == []
        assert read(union, "f") == b"x"

    @pytest.mark.parametrize("name", ["directory", "fifo", "symlink"])
    def test_what_has_no_data_keeps_its_attributes(
        self, tmp_path: Path, open_union: OpenUnion, name: str
    ) -> None:
        if os.geteuid() != 0:
            pytest.skip("owners are changed only by root")
        (tmp_path / "l0/directory").mkdir(parents=True)
        os.mkfifo(tmp_path / "l0/fifo")
        (tmp_path / "l0/symlink").symlink_to("target")
        lower, upper = tmp_path / "l0" / name, tmp_path / "upper" / name
        os.chown(lower, 1000, 1001, follow_symlinks=False)
        if name != "symlink":
            lower.chmod(0o3751)
        os.utime(lower, ns=(10**18 + 1, 10**18 + 2), follow_symlinks=False)
        union = open_union()
        copy_up, node = CopyUp(union), get(union, name)
        (copy_up.directory if node.is_dir else copy_up.special)(node)
        for field in KEPT:
            assert getattr(upper.lstat(), field) == getattr(lower.lstat(), field), field

    def test_effects_are_told(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0/d/e").mkdir(parents=True)
        (tmp_path / "l0/d/e/f").write_text("x")
        union = open_union()
        told: list[Effects] = []
        copy_up = CopyUp(union, told.append)
        root, d, e, f = union.nodes.root, get(union, "d"), get(union, "d/e"), get(union, "d/e/f")
        copied = [Effects(d, root), Effects(e, d)]
        with pytest.raises(OSError, match="too long"):
            Changes(union, copy_up).mkdir(e, b"n" * 256, 0o755, ME)
        assert told == copied  # though the change failed
        with FileCopy(copy_up, f) as copy:
            copy.copy()
            copy.finish()
        assert told == [*copied, Effects(f, e)]

    def test_unlink_while_it_is_copied_up(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0").mkdir()
        (tmp_path / "l0/f").write_text("x")
        union = open_union()
        node = get(union, "f")
        node.lookups = 1
        with FileCopy(CopyUp(union), node) as copy:
            copy.copy()
            Changes(union).unlink(union.nodes.root, b"f")
            copy.finish()
        assert stat.S_ISCHR((tmp_path / "upper/f").lstat().st_mode)
        file = union.files.lend(node, write=True)
        assert file.write(b"yy", 0) == 2
        union.files.take_back(node, file)
        assert union.attributes(node).nlink == 0
        assert os.listdir(tmp_path / "work/work") == []

    def test_rename_leaves_a_whiteout_over_a_lower(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0").mkdir()
        (tmp_path / "l0/f").write_text("x")
        union = open_union()
        root = union.nodes.root
        copy_up(union, get(union, "f"))
        Changes(union).rename(root, b"f", root, b"g", 0)
        assert names(union) == {b"g"}
        assert stat.S_ISCHR((tmp_path / "upper/f").lstat().st_mode)

    def test_rename_of_a_lower_directory_is_exdev(self, tmp_path: Path, open_union: OpenUnion) -> None:
        """With ``redirect_dir`` off."""
        (tmp_path / "l0/d").mkdir(parents=True)
        union = open_union(redirect_dir="follow")
        with pytest.raises(OSError, match="cross-device") as caught:
            Changes(union).rename(union.nodes.root, b"d", union.nodes.root, b"e", 0)
        assert caught.value.errno == errno.EXDEV

    def test_a_refused_exchange_asks_for_no_copy_up(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0/d").mkdir(parents=True)
        (tmp_path / "l0/f").touch()
        union = open_union(redirect_dir="follow")
        root, changes = union.nodes.root, Changes(union)
        for other, code in ((b"d", errno.EXDEV), (b"none", errno.ENOENT)):
            for one, two in ((b"f", other), (other, b"f")):
                with pytest.raises(OSError) as caught:  # noqa: PT011
                    changes.rename(root, one, root, two, calls.RENAME_EXCHANGE)
                assert caught.value.errno == code
        assert changes.rename(root, b"f", root, b"g", 0) == [get(union, "f")]

    def test_without_upper_nothing_can_change(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0").mkdir()
        (tmp_path / "l0/f").touch()
        union = open_union(upper=False)
        with pytest.raises(OSError, match="Read-only") as caught:
            Changes(union).unlink(union.nodes.root, b"f")
        assert caught.value.errno == errno.EROFS

    def test_users_overlay_xattr_is_escaped(self, open_union: OpenUnion) -> None:
        markers = open_union().markers
        assert markers.stored_name(b"user.overlay.mine") == b"user.overlay.overlay.mine"
        with pytest.raises(OSError, match="not supported"):  # the message of overlayfs
            markers.stored_name(b"user.overlay." + b"n" * 240)
        assert markers.shown_names([b"user.overlay.opaque", b"user.overlay.overlay.mine", b"user.x"]) == [
            b"user.overlay.mine",
            b"user.x",
        ]
