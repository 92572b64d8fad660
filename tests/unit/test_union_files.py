"""Backing files and the fds of directories: reads and writes at limits, and the count of users."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.unit.union_support import OpenUnion, copy_up, find, get, open_union
from unionfs.core.files import Handle, OpenFile, UnreadFile, Use
from unionfs.core.places import Gate, Layer, Place
from unionfs.sys.fds import Owned
from unionfs.union.layers import LayerStack
from unionfs.union.setids import Process
from unionfs.union.tree import Union

__all__ = ["open_union"]

ME = Process(0, 0, 0)


def _file(fd: int, *, waits: bool = False) -> OpenFile:
    return OpenFile(fd, readable=True, writable=True, waits=waits)


def test_reads_go_on_until_the_end() -> None:
    """procfs returns at most a page, as a FUSE filesystem may."""
    with open("/proc/kallsyms", "rb") as source:
        whole = source.read()
        size = len(whole) - 10
        assert len(os.pread(source.fileno(), size, 0)) < size
        file = _file(os.dup(source.fileno()))
        assert file.read(size, 0) == whole[:size]
        assert file.read(size, 20) == whole[20 : 20 + size]
        assert file.read(20, size) == whole[size:]
        file.release()


def test_as_much_as_fits_is_written(filesystem: Callable[..., Path]) -> None:
    small = filesystem("tmpfs", 1 << 20)
    fds = [os.open(small / name, os.O_RDWR | os.O_CREAT) for name in ("native", "ours")]
    data = os.urandom(2 << 20)
    written = os.pwrite(fds[0], data, 4096)
    assert 0 < written < len(data)
    os.ftruncate(fds[0], 0)
    file = _file(fds[1])
    assert file.write(data, 4096) == written
    assert os.pread(fds[1], written, 4096) == data[:written]
    with pytest.raises(OSError, match="No space left"):
        file.write(data, 4096 + written)
    os.ftruncate(fds[1], 0)
    file.write(b"data", 100)
    assert file.write(b"", 3) == 0
    assert os.pread(fds[1], 200, 0) == bytes(100) + b"data"
    file.release()
    os.close(fds[0])


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_only_what_a_disk_has_waits(filesystem: Callable[..., Path], kind: str) -> None:
    """Nothing in memory is read in a thread."""
    place = filesystem(kind)
    for name in ("lower", "upper", "work"):
        (place / name).mkdir()
    for name in ("f", "g"):
        (place / "lower" / name).write_text("data")
    paths = [str(place / name) for name in ("lower", "upper", "work")]
    with closing(LayerStack.open(paths[:1], *paths[1:])) as stack, closing(Union(stack)) as union:
        read = union.files.lend(get(union, "f"), write=False)
        copy_up(union, get(union, "g"))
        written = union.files.lend(get(union, "g"), write=True)
        new = union.files.lend_new(get(union, "g"), os.open(place / "upper/new", os.O_RDWR | os.O_CREAT))
        assert [file.waits for file in (read, written, new)] == [kind == "ext4"] * 3
        for file in (read, written, new):
            file.release()


def test_what_is_cached_is_read_without_waiting(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    file = _file(os.open(tmp_path / "f", os.O_RDWR), waits=True)
    assert file.read(10, 0) == b"0123456789"
    for offset in (0, 4, 9, 10, 20):
        buffer = memoryview(bytearray(8))
        assert file.read_into(buffer, offset) == len(b"0123456789"[offset:][:8])
        assert bytes(buffer).rstrip(b"\0") == b"0123456789"[offset:][:8]
    file.release()


def test_a_filesystem_that_always_waits() -> None:
    """procfs refuses reads that do not wait, which are not tried again; other errors are reported."""
    fd = os.open("/proc/self/stat", os.O_RDONLY)
    with pytest.raises(OSError, match="not supported") as refused:
        os.preadv(fd, [bytearray(8)], 0, os.RWF_NOWAIT)
    assert refused.value.errno == errno.EOPNOTSUPP
    file, buffer = _file(fd, waits=True), bytearray(3)
    assert file.read_into(memoryview(buffer), 0) == 3
    assert (buffer, file.waits) == (os.pread(fd, 3, 0), False)
    file.release()
    file = _file(os.open(os.devnull, os.O_WRONLY), waits=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.read_into(memoryview(buffer), 0)
    assert file.waits
    file.release()


def test_readers_continue_with_the_copy(tmp_path: Path, open_union: OpenUnion) -> None:
    """Also if nobody asks for the copy."""
    (tmp_path / "l0").mkdir()
    (tmp_path / "l0/f").write_text("lower")
    union = open_union()
    node = get(union, "f")
    lower = union.files.lend(node, write=False)
    handle = Handle(lower, ME, writes=False)
    node.in_use().handles.append(handle)
    copy_up(union, node)
    assert not lower.is_open
    (tmp_path / "upper/f").write_text("upper")
    assert handle.file.read(10, 0) == b"upper"
    assert handle.file.users == 1
    assert handle.file.writable
    node.in_use().handles.clear()
    union.files.take_back(node, handle.file)
    assert handle.file.fd == -1
    copy_up(union, node)


def test_a_copy_that_nobody_has_open_is_closed(tmp_path: Path, open_union: OpenUnion) -> None:
    (tmp_path / "l0").mkdir()
    (tmp_path / "l0/f").write_text("lower")
    union = open_union()
    node = get(union, "f")
    before = len(os.listdir("/proc/self/fd"))
    copy_up(union, node)
    assert len(os.listdir("/proc/self/fd")) == before
    assert node.use is None or node.use.file is None


def test_a_backing_id_belongs_to_its_last_open() -> None:
    use, file = Use(), _file(-1)
    handles = [Handle(file, ME, writes=writes) for writes in (False, True, False)]
    use.opened(handles[0])
    assert (use.cached, use.through, handles[0].through) == (1, 0, False)
    assert use.closed(handles[0]) == 0
    use.passes_through(7, of_upper=True)
    for handle in handles[1:]:
        use.opened(handle)
    assert (use.cached, use.through, use.writers, use.written) == (0, 2, 1, True)
    assert use.closed(handles[1]) == 0
    assert (use.through, use.writers, use.written, use.backing_id) == (1, 0, True, 7)
    assert use.closed(handles[2]) == 7
    assert (use.through, use.backing_id, use.of_upper) == (0, 0, True)


def test_a_file_that_is_opened_on_first_use(tmp_path: Path) -> None:
    opened = []

    def open_(_: object) -> OpenFile:
        opened.append(_file(os.open(tmp_path / "f", os.O_RDONLY)))
        return opened[-1]

    unused = UnreadFile(open_, None, waits=False)
    unused.take()
    unused.release()
    unused.release()
    assert (unused.users, opened) == (0, [])
    with pytest.raises(OSError, match="Bad file descriptor"):
        unused.read(1, 0)
    missing = UnreadFile(open_, None, waits=False)
    with pytest.raises(OSError, match="no longer holds") as found:
        missing.read(1, 0)
    assert found.value.errno == errno.EIO
    (tmp_path / "f").write_text("data")
    assert missing.read(10, 0) == b"data"
    assert missing.read(10, 2) == b"ta"
    assert len(opened) == 1
    missing.release()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0].fd)


class TestDirectories:
    """The fds of real directories."""

    @staticmethod
    def places(tmp_path: Path) -> tuple[Place, list[Place]]:
        for name in ("a/in", "b", "c"):
            (tmp_path / name).mkdir(parents=True)
        root = Layer(0, "lower", os.open(tmp_path, os.O_PATH), is_upper=False).root
        return root, [Place(root.layer, root, name) for name in (b"a", b"b", b"c")]

    def test_few_stay_open(self, tmp_path: Path) -> None:
        root, places = self.places(tmp_path)
        (tmp_path / "a/in").mkdir(exist_ok=True)
        for number in range(62):
            (tmp_path / f"more{number}").mkdir()
        more = [Place(root.layer, root, b"more%d" % number) for number in range(62)]
        gate = Gate(64)
        a, b, c = places
        for place in (a, b, *more, a, c):
            assert os.path.samestat(os.fstat(gate.fd(place)), os.stat(tmp_path / os.fsdecode(place.name)))
        assert [place.fd >= 0 for place in (a, b, c, *more)] == [True, False, True, *[True] * 62]
        inner = Place(root.layer, a, b"in")
        assert os.path.samestat(os.fstat(gate.fd(inner)), os.stat(tmp_path / "a/in"))
        assert len(gate) == 64
        gate.forget(inner)
        gate.forget(inner)
        gate.forget(root)
        assert (len(gate), inner.fd) == (63, -1)
        assert os.fstat(root.fd)
        before = len(os.listdir("/proc/self/fd"))
        gate.close()
        assert len(os.listdir("/proc/self/fd")) == before - 63
        assert {place.fd for place in (a, b, c, *more)} == {-1}
        os.close(root.layer.root_fd)

    def test_another_one_with_its_name(self, tmp_path: Path) -> None:
        root, _ = self.places(tmp_path)
        gate, st = Gate(), (tmp_path / "a").stat()
        known = Place(root.layer, root, b"a", key=root.layer.key(st))
        (tmp_path / "a").rename(tmp_path / "away")
        (tmp_path / "a").mkdir()
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="another directory") as found:
            gate.fd(known)
        assert found.value.errno == errno.ESTALE
        assert (len(os.listdir("/proc/self/fd")), len(gate)) == (before, 0)
        os.close(root.layer.root_fd)

    @pytest.mark.parametrize("kind", ["symlink", "fifo", "file"])
    def test_what_is_no_directory(self, tmp_path: Path, kind: str) -> None:
        """The same error as natively; a fifo is not waited for."""
        root, places = self.places(tmp_path)
        (tmp_path / "b").rmdir()
        if kind == "symlink":
            (tmp_path / "b").symlink_to("a")
        elif kind == "fifo":
            os.mkfifo(tmp_path / "b")
        else:
            (tmp_path / "b").touch()
        with pytest.raises(OSError) as native:  # noqa: PT011
            os.open(tmp_path / "b", os.O_DIRECTORY | os.O_NOFOLLOW)
        with pytest.raises(OSError) as found:  # noqa: PT011
            Gate().fd(places[1])
        assert found.value.errno == native.value.errno == errno.ENOTDIR
        os.close(root.layer.root_fd)

    def test_forgotten_nodes_leave_none_open(self, tmp_path: Path, open_union: OpenUnion) -> None:
        (tmp_path / "l0/d").mkdir(parents=True)
        union: Union = open_union()
        directory = get(union, "d")
        assert find(union, "d/missing") is None
        before = len(union.gate)
        union.nodes.forget(directory, directory.lookups)
        assert len(union.gate) == before - 1

    def test_the_fd_of_another_number_is_not_closed(self, tmp_path: Path) -> None:
        root, places = self.places(tmp_path)
        gate = Gate()
        with Owned(gate.open_for_listing(places[0])) as fd:
            assert os.listdir(fd) == ["in"]
            assert fd != places[0].fd
        assert os.fstat(places[0].fd)
        gate.close()
        os.close(root.layer.root_fd)


def test_what_identifies_an_object(tmp_path: Path) -> None:
    """In the upper, and where that is a lower now, its number; in a lower owner and mode, too."""
    (tmp_path / "f").touch(0o644)
    before = (tmp_path / "f").stat()
    (tmp_path / "f").chmod(0o600)
    after = (tmp_path / "f").stat()
    root = os.open(tmp_path, os.O_PATH)
    lower, upper = (Layer(0, str(tmp_path), root, is_upper=is_upper) for is_upper in (False, True))
    assert lower.key(before) != lower.key(after)
    keys = []
    for change in (lambda: None, upper.becomes_lower, lambda: upper.becomes_upper_again(quiet=True)):
        change()
        assert upper.key(before) == upper.key(after) != 0
        keys.append(upper.key(after))
    assert len(set(keys)) == 1
    os.close(root)
