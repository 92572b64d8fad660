"""Files whose data lies in another layer than their metadata: where it is found, and how it follows."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest

from tests.support.snapshot import read_xattrs
from tests.unit.union_support import ME, OpenUnion, find, get, names, open_union, read, whiteout
from unionfs.core.node import Node
from unionfs.settings.features import Features
from unionfs.union.changes import Changes
from unionfs.union.copyup import CopyUp
from unionfs.union.filecopy import DataCopy, FileCopy
from unionfs.union.tree import Union

__all__ = ["open_union"]

DATA = os.urandom(5000)
DIGEST = b"\0\x24\0\x01" + bytes(32)
"""As fs/overlayfs/overlayfs.h, struct ovl_metacopy: version, length, flags, algorithm, digest."""
CAPABILITY = "security.capability"
NET_RAW = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)
"""cap_net_raw=ep: include/uapi/linux/capability.h, struct vfs_cap_data."""
WHOLE = 64 * 512 * 1024


def metacopy(path: Path, size: int = len(DATA), *, redirect: bytes = b"", value: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, size)
    os.setxattr(path, "user.overlay.metacopy", value)
    if redirect:
        os.setxattr(path, "user.overlay.redirect", redirect)


def data(path: Path, content: bytes = DATA) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def opened(open_union: OpenUnion, lowers: int) -> Union:
    """A union that follows metacopy, as with the prefix that requires root."""
    union = open_union(lowers)
    union.markers.follows_metacopy = True
    union.stack.features = Features(metacopy="on")
    return union


def copy_up(union: Union, node: Node) -> None:
    with FileCopy(CopyUp(union), node, data=False) as copy:
        copy.copy()
        assert copy.finish(keep=True) is None


def data_follows(union: Union, node: Node, limit: int | None = None) -> None:
    with DataCopy(CopyUp(union), node, limit) as copy:
        copy.copy()
        copy.finish()


def is_metacopy(path: Path) -> bool:
    return "user.overlay.metacopy" in os.listxattr(path)


class TestFinding:
    """As namei.c, ovl_lookup; the same on the kernel in tests/mount/test_posix_metacopy.py."""

    @pytest.mark.parametrize(
        ("redirect", "where"), [(b"", "d/f"), (b"old", "d/old"), (b"/far/away", "far/away"), (b"/f\0x", "f")]
    )
    @pytest.mark.parametrize("layer", ["upper", "l0"])
    def test_redirects(
        self, tmp_path: Path, open_union: OpenUnion, redirect: bytes, where: str, layer: str
    ) -> None:
        metacopy(tmp_path / layer / "d/f", redirect=redirect)
        data(tmp_path / "l1" / where)
        data(tmp_path / "l2" / where, b"hidden")
        union = opened(open_union, 3)
        assert read(union, "d/f") == DATA
        assert union.attributes(get(union, "d/f")).st.st_blocks == os.stat(tmp_path / "l1" / where).st_blocks

    def test_files_in_between(self, tmp_path: Path, open_union: OpenUnion) -> None:
        metacopy(tmp_path / "upper/f")
        metacopy(tmp_path / "l0/f", redirect=b"/second")
        metacopy(tmp_path / "l1/second")
        data(tmp_path / "l1/f", b"not this")
        data(tmp_path / "l2/second")
        assert read(opened(open_union, 3), "f") == DATA

    def test_below_a_redirected_directory(self, tmp_path: Path, open_union: OpenUnion) -> None:
        metacopy(tmp_path / "upper/new/f")
        os.setxattr(tmp_path / "upper/new", "user.overlay.redirect", b"/old")
        data(tmp_path / "l0/old/f")
        assert read(opened(open_union, 1), "new/f") == DATA

    @pytest.mark.parametrize("below", ["nothing", "whiteout", "directory", "symlink", "metacopy"])
    def test_missing_data(
        self, tmp_path: Path, open_union: OpenUnion, below: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        metacopy(tmp_path / "upper/f")
        data(tmp_path / "l1/f")
        (tmp_path / "l0").mkdir()
        match below:
            case "nothing":
                (tmp_path / "l1/f").unlink()
            case "whiteout":
                whiteout(tmp_path / "l0/f")
            case "directory":
                (tmp_path / "l0/f").mkdir()
            case "symlink":
                (tmp_path / "l0/f").symlink_to("g")
            case "metacopy":
                (tmp_path / "l1/f").unlink()
                metacopy(tmp_path / "l1/f")
        union = opened(open_union, 2)
        assert names(union) == {b"f"}
        assert union.attributes(get(union, "f")).st.st_size == len(DATA)
        with pytest.raises(OSError, match="data of a metacopy file is missing") as caught:
            read(union, "f")
        assert caught.value.errno == errno.EIO
        assert "no lower has its data" in caplog.text
        Changes(union).unlink(union.nodes.root, b"f")

    def test_data_that_was_replaced(self, tmp_path: Path, open_union: OpenUnion) -> None:
        metacopy(tmp_path / "upper/f")
        data(tmp_path / "l0/f")
        union = opened(open_union, 1)
        assert read(union, "f") == DATA
        data(tmp_path / "l0/other", b"secret")
        os.chmod(tmp_path / "l0/other", 0o600)
        os.rename(tmp_path / "l0/other", tmp_path / "l0/f")
        with pytest.raises(OSError, match="another object") as caught:
            read(union, "f")
        assert caught.value.errno == errno.EIO

    def test_open_file_without_a_name(self, tmp_path: Path, open_union: OpenUnion) -> None:
        metacopy(tmp_path / "upper/d/f")
        data(tmp_path / "l0/d/f")
        union = opened(open_union, 1)
        node = get(union, "d/f")
        node.lookups = 1
        Changes(union).unlink(get(union, "d"), b"f")
        file = union.files.lend(node, write=False)
        assert file.read(len(DATA), 0) == DATA
        union.files.take_back(node, file)
        data_follows(union, node)
        file = union.files.lend(node, write=True)
        assert file.read(len(DATA), 0) == DATA
        union.files.take_back(node, file)


class TestMetadataAlone:
    @pytest.mark.parametrize("value", [b"", DIGEST])
    def test_a_metacopy_file_of_a_lower(self, tmp_path: Path, open_union: OpenUnion, value: bytes) -> None:
        """Its digest, owner, mode, times, size and xattrs come along, its redirect does not."""
        metacopy(tmp_path / "l0/f", redirect=b"g", value=value)
        os.setxattr(tmp_path / "l0/f", "user.kept", b"yes")
        os.chmod(tmp_path / "l0/f", 0o4751)
        os.utime(tmp_path / "l0/f", (1, 2))
        data(tmp_path / "l1/g")
        union = opened(open_union, 2)
        node = get(union, "f")
        copy_up(union, node)
        upper, lower = os.stat(tmp_path / "upper/f"), os.stat(tmp_path / "l0/f")
        for field in ("st_mode", "st_uid", "st_gid", "st_size", "st_atime_ns", "st_mtime_ns"):
            assert getattr(upper, field) == getattr(lower, field), field
        xattrs = read_xattrs(str(tmp_path / "upper/f"))
        assert xattrs.pop("user.overlay.origin")
        assert xattrs == {"user.kept": b"yes", "user.overlay.metacopy": value}
        assert read(union, "f") == DATA
        data_follows(union, node)
        assert (tmp_path / "upper/f").read_bytes() == DATA
        assert not is_metacopy(tmp_path / "upper/f")

    def test_an_empty_file_has_no_data_to_leave(self, tmp_path: Path, open_union: OpenUnion) -> None:
        data(tmp_path / "l0/f", b"")
        union = opened(open_union, 1)
        with FileCopy(CopyUp(union), get(union, "f"), data=False) as copy:
            copy.copy()
            copy.finish()
        assert not is_metacopy(tmp_path / "upper/f")

    def test_opens_go_on_with_the_lower_then_with_the_upper(
        self, tmp_path: Path, open_union: OpenUnion
    ) -> None:
        data(tmp_path / "l0/f")
        union = opened(open_union, 1)
        node = get(union, "f")
        file = union.files.lend(node, write=False)
        copy_up(union, node)
        assert node.in_place
        assert not node.data_in_place
        assert node.use is not None
        assert node.use.file is file
        assert union.files.lend_for_writing(node) is None
        data_follows(union, node)
        assert node.data_in_place
        union.files.take_back(node, file)


class TestDataFollows:
    def test_a_failure_changes_nothing(self, tmp_path: Path, open_union: OpenUnion) -> None:
        """The file is metacopy and complete as before, without blocks."""
        content = os.urandom(WHOLE // 2)
        data(tmp_path / "l0/f", content)
        union = opened(open_union, 1)
        node = get(union, "f")
        copy_up(union, node)
        before = os.stat(tmp_path / "upper/f")

        steps = iter(range(2))

        def full() -> None:
            if next(steps, None) is None:
                raise OSError(errno.ENOSPC, "full")

        with DataCopy(CopyUp(union), node) as copy, pytest.raises(OSError, match="full"):
            copy.copy(full)
        after = os.stat(tmp_path / "upper/f")
        for field in ("st_size", "st_blocks", "st_mtime_ns", "st_mode"):
            assert getattr(before, field) == getattr(after, field), field
        assert is_metacopy(tmp_path / "upper/f")
        node.lookups = 1
        file = union.files.lend(node, write=False)
        assert file.read(len(content), 0) == content
        union.files.take_back(node, file)

    def test_an_error_keeps_capabilities(self, tmp_path: Path, open_union: OpenUnion) -> None:
        """And set-id bits, which truncation removes as well."""
        if os.geteuid():
            pytest.skip("file capabilities need root")
        data(tmp_path / "l0/f", os.urandom(WHOLE // 2))
        os.chmod(tmp_path / "l0/f", 0o4755)
        os.setxattr(tmp_path / "l0/f", CAPABILITY, NET_RAW)
        union = opened(open_union, 1)
        node = get(union, "f")
        copy_up(union, node)

        def fail() -> None:
            raise OSError(errno.ENOSPC, "full")

        with DataCopy(CopyUp(union), node) as copy, pytest.raises(OSError, match="full"):
            copy.copy(fail)
        assert os.getxattr(tmp_path / "upper/f", CAPABILITY) == NET_RAW
        assert os.stat(tmp_path / "upper/f").st_mode & 0o7777 == 0o4755

    def test_a_request_that_ended_before_its_thread(self, tmp_path: Path, open_union: OpenUnion) -> None:
        """What the thread has made of the file on disk holds."""
        data(tmp_path / "l0/f")
        union = opened(open_union, 1)
        node = get(union, "f")
        copy_up(union, node)
        with DataCopy(CopyUp(union), node) as copy:
            copy.begins()
        copy.copy()
        copy.settle()
        copy.ends()
        assert not is_metacopy(tmp_path / "upper/f")
        assert node.lower_data is None
        assert read(union, "f") == DATA
        assert (tmp_path / "upper/f").read_bytes() == DATA

    def test_data_is_never_taken_from_an_ordinary_file(self, tmp_path: Path, open_union: OpenUnion) -> None:
        content = os.urandom(WHOLE)
        data(tmp_path / "l0/f", content)
        union = opened(open_union, 1)
        node = get(union, "f")
        copy_up(union, node)
        with DataCopy(CopyUp(union), node) as first:
            first.copy()
            with DataCopy(CopyUp(union), node) as second, pytest.raises(OSError, match="No data"):
                second.copy()
        assert (tmp_path / "upper/f").read_bytes() == content

    def test_after_a_crash_in_between(self, tmp_path: Path, open_union: OpenUnion) -> None:
        metacopy(tmp_path / "upper/f")
        with open(tmp_path / "upper/f", "r+b") as half:
            half.write(b"half of it")
        data(tmp_path / "l0/f")
        assert read(opened(open_union, 1), "f") == DATA

    @pytest.mark.parametrize("limit", [0, 100, len(DATA), 2 * len(DATA)])
    def test_truncation(self, tmp_path: Path, open_union: OpenUnion, limit: int) -> None:
        data(tmp_path / "l0/f")
        union = opened(open_union, 1)
        node = get(union, "f")
        copy_up(union, node)
        data_follows(union, node, limit)
        assert (tmp_path / "upper/f").read_bytes() == DATA[:limit]

    def test_what_writing_would_clear_is_kept(self, tmp_path: Path, open_union: OpenUnion) -> None:
        data(tmp_path / "l0/f")
        os.chmod(tmp_path / "l0/f", 0o6755)
        os.utime(tmp_path / "l0/f", (1, 2))
        union = opened(open_union, 1)
        node = get(union, "f")
        copy_up(union, node)
        value = b"\1\0\0\2\0\4\0\0" + bytes(12)
        if os.geteuid() == 0:
            os.setxattr(tmp_path / "upper/f", "security.capability", value)
        data_follows(union, node)
        after = os.stat(tmp_path / "upper/f")
        assert (after.st_mode & 0o7777, after.st_mtime) == (0o6755, 2)
        if os.geteuid() == 0:
            assert os.getxattr(tmp_path / "upper/f", "security.capability") == value


class TestOtherNames:
    def test_rename_and_link_leave_a_redirect(self, tmp_path: Path, open_union: OpenUnion) -> None:
        data(tmp_path / "l0/a/b/f")
        (tmp_path / "l0/c").mkdir()
        union = opened(open_union, 1)
        node = get(union, "a/b/f")
        copy_up(union, node)
        changes = Changes(union)
        assert changes.rename(get(union, "a/b"), b"f", get(union, "c"), b"g", 0) == []
        assert os.getxattr(tmp_path / "upper/c/g", "user.overlay.redirect") == b"/a/b/f"
        assert changes.finds_data(node)
        changes.link(node, union.nodes.root, b"h")
        changes.unlink(get(union, "c"), b"g")
        assert read(union, "h") == DATA
        assert find(union, "a/b/f") is None

    def test_a_relative_redirect_becomes_absolute(self, tmp_path: Path, open_union: OpenUnion) -> None:
        data(tmp_path / "l0/d/old")
        metacopy(tmp_path / "upper/d/f", redirect=b"old")
        union = opened(open_union, 1)
        assert Changes(union).rename(get(union, "d"), b"f", union.nodes.root, b"f", 0) == []
        assert os.getxattr(tmp_path / "upper/f", "user.overlay.redirect") == b"/d/old"
        assert read(union, "f") == DATA

    def test_below_a_redirected_directory(self, tmp_path: Path, open_union: OpenUnion) -> None:
        data(tmp_path / "l0/x/old/f")
        for name, redirect in (("new", b"/x/old"),):
            (tmp_path / "upper" / name).mkdir(parents=True)
            os.setxattr(tmp_path / "upper" / name, "user.overlay.redirect", redirect)
        metacopy(tmp_path / "upper/new/f")
        union = opened(open_union, 1)
        assert Changes(union).rename(get(union, "new"), b"f", union.nodes.root, b"f", 0) == []
        assert os.getxattr(tmp_path / "upper/f", "user.overlay.redirect") == b"/x/old/f"
        assert read(union, "f") == DATA

    def test_a_path_that_is_too_long_takes_the_data_along(
        self, tmp_path: Path, open_union: OpenUnion
    ) -> None:
        deep = "x" * 200 + "/" + "y" * 200
        data(tmp_path / "l0" / deep / "f")
        union = opened(open_union, 1)
        node = get(union, deep + "/f")
        copy_up(union, node)
        assert Changes(union).rename(get(union, deep), b"f", union.nodes.root, b"f", 0) == [node]
        data_follows(union, node)
        assert Changes(union).rename(get(union, deep), b"f", union.nodes.root, b"f", 0) == []
        assert (tmp_path / "upper/f").read_bytes() == DATA

    def test_without_the_option_the_data_follows_first(self, tmp_path: Path, open_union: OpenUnion) -> None:
        data(tmp_path / "l0/f")
        metacopy(tmp_path / "upper/f")
        union = opened(open_union, 1)
        union.stack.features = Features()
        node = get(union, "f")
        assert not Changes(union).finds_data(node)
        assert Changes(union).rename(union.nodes.root, b"f", union.nodes.root, b"g", 0) == [node]

    def test_new_files_are_whole(self, tmp_path: Path, open_union: OpenUnion) -> None:
        union = opened(open_union, 1)
        node, _, fd = Changes(union).create(union.nodes.root, b"f", 0o644, ME)
        os.close(fd)
        assert Changes(union).finds_data(node)


def test_another_file_in_its_place_gets_no_data(tmp_path: Path, open_union: OpenUnion) -> None:
    """Both files are closed again."""
    data(tmp_path / "l0/f")
    union = opened(open_union, 1)
    node = get(union, "f")
    copy_up(union, node)
    other = tmp_path / "upper/other"
    other.write_text("other")
    other.rename(tmp_path / "upper/f")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError) as found:  # noqa: PT011
        DataCopy(CopyUp(union), node)
    assert found.value.errno == errno.ESTALE
    assert len(os.listdir("/proc/self/fd")) == before
    assert (tmp_path / "upper/f").read_text() == "other"
