"""Requests answered by the compiled core, byte for byte as `fuse.protocol` encodes them."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import acl
from tests.unit.protocol.protocol_reference import attributes_of, negative_entry
from tests.unit.union_support import ME, OpenUnion, copy_up, get, names, whiteout
from tests.unit.union_support import open_union as open_union
from unionfs.core.answers import Answers
from unionfs.core.directories import KeptListings
from unionfs.core.entries import FIRST_TICKET
from unionfs.core.files import Handle, OpenFile
from unionfs.core.idling import Idling
from unionfs.core.iomodes import IoModes
from unionfs.core.listings import Lister, ListingRequests
from unionfs.core.loop import FAIR, WAIT, Channel
from unionfs.core.namerequests import NameRequests
from unionfs.core.node import Node
from unionfs.core.nodes import NodeTable
from unionfs.core.opening import Handles, KeptFiles
from unionfs.core.opens import Opens
from unionfs.core.reads import SPLICED, Reads
from unionfs.core.setrequests import SetRequests
from unionfs.fuse.protocol import FOREVER, Opcode, encode, notify
from unionfs.union.changes import Changes
from unionfs.union.copyup import CopyUp
from unionfs.union.filecopy import small_copy_ups
from unionfs.union.merged import Merged
from unionfs.union.tree import Union
from unionfs.union.xattrs import default_acl

UNIQUE = 77


def message(opcode: Opcode, nodeid: int, body: bytes) -> bytes:
    return struct.pack("=IIQQIIIHH", 40 + len(body), int(opcode), UNIQUE, nodeid, 0, 0, 1, 0, 0) + body


class Modes(IoModes):
    """No backing files; or registering one fails with ``error``."""

    def __init__(self, gone: list[Handle], error: Exception | None = None) -> None:
        super().__init__(-1, uppers=error is not None, keeps=False, through_flags=0, cached_flags=2)
        self._gone, self._error = gone, error

    def register(self, handle: Handle) -> bool:
        assert self._error is not None
        raise self._error

    def released(self, handle: Handle) -> int:
        if handle.through:
            self._gone.append(handle)
            return 0
        return super().released(handle)


class Mount:
    """A union whose device is a socket that keeps messages apart."""

    def __init__(self, union: Union) -> None:
        self.union = union
        self.kernel, self.device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.kernel, self.device):
            end.setblocking(False)
        self.refused: list[tuple[bytes, int]] = []
        self.handles = Handles(union.nodes)
        #: The nodes that are being copied up.
        self.running: dict[Node, object] = {}
        #: Files in passthrough that were closed.
        self.gone: list[Handle] = []
        self.changes = Changes(union)
        #: The nodes that the kernel must ask for again.
        self.told: list[Node | None] = []
        self.directories = KeptListings()
        self.serve(Modes(self.gone))

    def serve(self, modes: IoModes, *, has_acls: bool = False) -> None:
        """Answer with these I/O modes."""
        union, fd = self.union, self.device.fileno()
        opens = Opens(
            fd, union.nodes, self.handles, union.files.opener, modes, union.flags, self.running,
            flags=2, small=100_000,
        )  # fmt: skip
        names = NameRequests(union.nodes, self.changes.entries, self.handles, modes, masks=True)
        union.stack.volatile = True  # so no sync to a disk is needed
        copies = small_copy_ups(CopyUp(union, lambda effects: self.told.extend(effects[:2])))
        sets = SetRequests(union.nodes, union.gate, union.flags, copies, self.running)
        lister = Lister(union.nodes, union.merge, union.number_of_unreachable)
        listings = ListingRequests(union.nodes, lister, self.directories)
        reads = Reads(union.nodes, self.handles, union.files.opener, union.files.kept)
        self.answers = Answers(
            fd, union.nodes, union, opens, names, sets, listings, reads, acl=has_acls, enosys=(),
            refused=lambda answer, code: self.refused.append((answer, code)),
        )  # fmt: skip

    def ask(self, opcode: Opcode, nodeid: int, body: bytes = b"") -> bytes | None:
        """The answer's bytes; b"" if there is none, None if Python must handle the request."""
        if not self.answers.take(message(opcode, nodeid, body)):
            return None
        try:
            return self.kernel.recv(1 << 16)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        self.kernel.close()
        self.device.close()


@pytest.fixture
def mount(tmp_path: Path, open_union: OpenUnion) -> Iterator[Mount]:
    (tmp_path / "l0/d").mkdir(parents=True)
    (tmp_path / "l0/d/f").write_text("lower")
    os.utime(tmp_path / "l0/d/f", ns=(-1_500_000_001, 1_600_000_000_123_456_789))
    (tmp_path / "l0/link").symlink_to("somewhere/else")
    mount = Mount(open_union())
    yield mount
    mount.close()


def entry(union: Union, path: str) -> bytes:
    node = get(union, path)
    shown = union.attributes(node)
    attr = attributes_of(shown.st, shown.ino, shown.nlink, shown.ctime_ns)
    return b"".join(encode.entry(UNIQUE, node.id, node.generation, FOREVER, FOREVER, attr))


def test_lookup(mount: Mount) -> None:
    answer = mount.ask(Opcode.LOOKUP, 1, b"d\0")
    assert answer == entry(mount.union, "d")
    directory = get(mount.union, "d")
    assert directory.lookups == 1
    assert mount.ask(Opcode.LOOKUP, directory.id, b"f\0") == entry(mount.union, "d/f")
    assert mount.ask(Opcode.LOOKUP, 1, b"absent\0") == b"".join(negative_entry(UNIQUE, FOREVER))
    assert mount.answers.counts() == {1: 3}


@pytest.mark.parametrize(
    ("nodeid", "name", "code"),
    [(99, b"f", errno.ESTALE), (1, b"n" * 256, errno.ENAMETOOLONG)],
)
def test_lookup_fails(mount: Mount, nodeid: int, name: bytes, code: int) -> None:
    assert mount.ask(Opcode.LOOKUP, nodeid, name + b"\0") == b"".join(encode.error(UNIQUE, code))


def test_lookup_in_a_file_and_in_a_removed_directory(mount: Mount) -> None:
    file = get(mount.union, "d/f")
    assert mount.ask(Opcode.LOOKUP, file.id, b"x\0") == b"".join(encode.error(UNIQUE, errno.ESTALE))
    changes = Changes(mount.union)
    made, _ = changes.mkdir(mount.union.nodes.root, b"made", 0o700, ME)
    made.looked_up()
    changes.rmdir(mount.union.nodes.root, b"made")
    assert mount.ask(Opcode.LOOKUP, made.id, b"x\0") == b"".join(encode.error(UNIQUE, errno.ENOENT))


def test_getattr(mount: Mount) -> None:
    node = get(mount.union, "d/f")
    shown = mount.union.attributes(node)
    attr = attributes_of(shown.st, shown.ino, shown.nlink, shown.ctime_ns)
    assert mount.ask(Opcode.GETATTR, node.id, bytes(16)) == b"".join(encode.attr(UNIQUE, FOREVER, attr))
    assert shown.packed() == attr
    assert mount.ask(Opcode.GETATTR, 99, bytes(16)) == b"".join(encode.error(UNIQUE, errno.ESTALE))


def test_getattr_by_the_id_of_a_superseded_node(mount: Mount) -> None:
    old = get(mount.union, "d/f")
    old.looked_up()
    mount.union.nodes.supersede(old)
    answer = mount.ask(Opcode.GETATTR, old.id, bytes(16))
    assert answer is not None
    assert struct.unpack_from("=QI", answer, 16) == (0, 0)


def test_readlink(mount: Mount) -> None:
    node = get(mount.union, "link")
    assert mount.ask(Opcode.READLINK, node.id) == b"".join(encode.data(UNIQUE, b"somewhere/else"))
    file = get(mount.union, "d")
    assert mount.ask(Opcode.READLINK, file.id) == b"".join(encode.error(UNIQUE, errno.EINVAL))


def test_names_of_xattrs_that_are_known_to_be_missing(mount: Mount) -> None:
    node = get(mount.union, "d/f")
    ask = b"\0" * 8 + b"security.capability\0"
    node.note_capability(none=True)
    assert mount.ask(Opcode.GETXATTR, node.id, ask) == b"".join(encode.error(UNIQUE, errno.ENODATA))
    acl = b"\0" * 8 + b"system.posix_acl_access\0"
    assert mount.ask(Opcode.GETXATTR, node.id, acl) == b"".join(encode.error(UNIQUE, errno.EOPNOTSUPP))
    assert mount.ask(Opcode.GETXATTR, node.id, b"\0" * 8 + b"system.other\0") is None
    assert mount.ask(Opcode.GETXATTR, node.id, b"\0" * 8 + b"user.x\0") is None


@pytest.mark.parametrize("wanted", [0, 3, 100])
@pytest.mark.parametrize("name", [acl.ACCESS, "security.capability", "security.selinux_of_a_test"])
def test_stored_xattrs(mount: Mount, tmp_path: Path, root: None, name: str, wanted: int) -> None:
    """Of a file, a directory, and a file that was removed: as the layer's filesystem has them."""
    mount.serve(Modes([]), has_acls=True)
    ask = struct.pack("=II", wanted, 0) + os.fsencode(name) + b"\0"
    path = tmp_path / "l0/d/f"
    capability = struct.pack("<IIIII", 0x02000001, 1, 0, 0, 0)
    os.setxattr(path, name, acl.simple(6, 4, 0, users={4: 7}) if name == acl.ACCESS else capability)
    value = os.getxattr(path, name)
    file, directory = looked_up(mount, "d/f"), looked_up(mount, "d")
    assert mount.ask(Opcode.GETXATTR, directory.id, ask) == b"".join(encode.error(UNIQUE, errno.ENODATA))
    expected = encode.xattr_size(UNIQUE, len(value)) if not wanted else encode.data(UNIQUE, value)
    if wanted == 3:
        expected = encode.error(UNIQUE, errno.ERANGE)
    assert mount.ask(Opcode.GETXATTR, file.id, ask) == b"".join(expected)
    mount.changes.unlink(directory, b"f")
    assert mount.ask(Opcode.GETXATTR, file.id, ask) == b"".join(expected)
    os.close(os.open(path.with_name("g"), os.O_CREAT | os.O_EXCL))
    replaced = looked_up(mount, "d/g")
    os.rename(path, path.with_name("g"))
    assert mount.ask(Opcode.GETXATTR, replaced.id, ask) == b"".join(encode.error(UNIQUE, errno.ESTALE))


def test_a_list_of_xattrs_that_is_empty(mount: Mount, tmp_path: Path) -> None:
    os.setxattr(tmp_path / "l0", "user.overlay.opaque", b"x")
    size, names = struct.pack("=II", 0, 0), struct.pack("=II", 100, 0)
    for path in ("d", "d/f", "link"):
        node = get(mount.union, path)
        assert mount.ask(Opcode.LISTXATTR, node.id, size) == b"".join(encode.xattr_size(UNIQUE, 0))
        assert mount.ask(Opcode.LISTXATTR, node.id, names) == b"".join(encode.data(UNIQUE, b""))
    # Python leaves out the overlay's own names.
    assert mount.ask(Opcode.LISTXATTR, 1, names) is None
    os.setxattr(tmp_path / "l0/d/f", "user.x", b"")
    assert mount.ask(Opcode.LISTXATTR, get(mount.union, "d/f").id, names) is None
    assert mount.ask(Opcode.LISTXATTR, 99, names) is None
    assert mount.ask(Opcode.LISTXATTR, get(mount.union, "d").id, bytes(4)) is None


def test_a_list_of_xattrs_of_a_name_that_has_another_object(mount: Mount, tmp_path: Path) -> None:
    node = get(mount.union, "d/f")
    (tmp_path / "l0/d/g").touch()
    (tmp_path / "l0/d/g").rename(tmp_path / "l0/d/f")
    answer = mount.ask(Opcode.LISTXATTR, node.id, struct.pack("=II", 100, 0))
    assert answer == b"".join(encode.error(UNIQUE, errno.ESTALE))


def test_forget(mount: Mount) -> None:
    before = len(mount.union.nodes)
    mount.ask(Opcode.LOOKUP, 1, b"link\0")
    link = get(mount.union, "link")
    mount.ask(Opcode.LOOKUP, 1, b"link\0")
    assert mount.ask(Opcode.FORGET, link.id, struct.pack("=Q", 1)) == b""
    assert mount.union.nodes.get(link.id) is link
    forgets = struct.pack("=IIQQQQ", 2, 0, 99, 1, link.id, 1)
    assert mount.ask(Opcode.BATCH_FORGET, 0, forgets) == b""
    assert mount.union.nodes.get(link.id) is None
    assert len(mount.union.nodes) == before


def test_one_error_does_not_lose_the_rest_of_a_batch(
    tmp_path: Path, open_union: OpenUnion, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("f", "g"):
        (tmp_path / "l0").mkdir(exist_ok=True)
        (tmp_path / "l0" / name).touch()
    union = open_union()

    def refuse(node: Node) -> None:
        raise RuntimeError("a bug")

    table = NodeTable(union.origins, union.index, union.gate, refuse, known=lambda node: None)
    table.add_root(Merged(union, table, union.merge, union.stack), union.merge.roots)
    for name in (b"f", b"g"):
        assert table.root.territory.lookup(table.root, name)
    assert table.root.children is not None
    known = list(table.root.children.values())
    for node in known:
        node.looked_up()
    opens = Opens(1, table, Handles(table), union.files.opener, Modes([]), union.flags, {}, flags=2, small=0)
    names = NameRequests(table, Changes(union).entries, Handles(table), None, masks=True)
    lister = Lister(table, union.merge, union.number_of_unreachable)
    listings = ListingRequests(table, lister, KeptListings())
    reads = Reads(table, Handles(table), union.files.opener, union.files.kept)
    copies = small_copy_ups(CopyUp(union, lambda effects: None))
    sets = SetRequests(table, union.gate, union.flags, copies, {})
    answers = Answers(
        1, table, union, opens, names, sets, listings, reads, acl=False, enosys=(), refused=print
    )
    body = struct.pack("=II", len(known), 0) + b"".join(struct.pack("=QQ", node.id, 1) for node in known)
    assert answers.take(message(Opcode.BATCH_FORGET, 0, body))
    assert not table.root.children
    assert len(table) == 1
    assert caplog.text.count("RuntimeError: a bug") == len(known)


def test_a_count_that_is_too_large(mount: Mount) -> None:
    mount.ask(Opcode.LOOKUP, 1, b"link\0")
    link = get(mount.union, "link")
    assert mount.ask(Opcode.BATCH_FORGET, 0, struct.pack("=IIQQ", 2**32 - 1, 0, link.id, 1)) == b""
    assert mount.union.nodes.get(link.id) is None


def test_statfs(mount: Mount, tmp_path: Path) -> None:
    answer = mount.ask(Opcode.STATFS, 1)
    assert answer is not None
    assert len(answer) == len(encode.statfs(UNIQUE, os.statvfs(tmp_path))[0])
    values = struct.unpack("=IiQ QQQQQ III 28x", answer)
    real = os.statvfs(tmp_path / "upper")
    assert values[:3] == (96, 0, UNIQUE)
    assert values[3] == real.f_blocks
    assert values[6] == real.f_files
    assert values[8:] == (real.f_bsize, real.f_namemax, real.f_frsize)


# -- listings -----------------------------------------------------------------------------------------------

Listed = tuple[bytes, int, int, int]
"""Name, number, cookie and type of a directory entry."""


def listed(mount: Mount, opcode: Opcode, id_: int, offset: int = 0, size: int = 4096) -> list[Listed]:
    """What one request returns, which the core must answer."""
    answer = mount.ask(opcode, id_, struct.pack("=QQI20x", 0, offset, size))
    assert answer is not None
    assert struct.unpack_from("=IiQ", answer) == (len(answer), 0, UNIQUE)
    assert len(answer) - 16 <= size
    found, at = [], 16
    while at < len(answer):
        at += 128 if opcode is Opcode.READDIRPLUS else 0
        ino, cookie, length, kind = struct.unpack_from("=QQII", answer, at)
        found.append((answer[at + 24 : at + 24 + length], ino, cookie, kind))
        at += 24 + length + -(24 + length) % 8
    return found


@pytest.mark.parametrize("opcode", [Opcode.READDIR, Opcode.READDIRPLUS])
def test_a_listing_in_pieces(mount: Mount, tmp_path: Path, opcode: Opcode) -> None:
    for layer in ("l0", "upper"):
        (tmp_path / layer / "many").mkdir()
        for number in range(30):
            (tmp_path / layer / "many" / f"{layer}-{number}").touch()
    whiteout(tmp_path / "upper/many/l0-7")
    node = looked_up(mount, "many")
    found: list[Listed] = []
    while more := listed(mount, opcode, node.id, found[-1][2] if found else 0, 1000):
        found += more
    assert len(mount.directories) == 0
    expected = {f"{layer}-{number}".encode() for layer in ("l0", "upper") for number in range(30)} - {b"l0-7"}
    assert sorted(name for name, *_ in found) == sorted({b".", b"..", *expected})
    for name, ino, _, kind in found:
        if name not in (b".", b".."):
            child = get(mount.union, f"many/{os.fsdecode(name)}")
            assert (ino, kind) == (child.ino, stat.S_IFREG >> 12)
            assert child.lookups == (1 if opcode is Opcode.READDIRPLUS else 0)
    assert found[0][1:] == (node.ino, 1, stat.S_IFDIR >> 12)
    assert found[1][1:] == (mount.union.nodes.root.ino, 2, stat.S_IFDIR >> 12)


def test_names_after_a_position(mount: Mount, tmp_path: Path) -> None:
    """Also if the listing is no longer kept."""
    node = looked_up(mount, "d")
    for number in range(20):
        (tmp_path / "l0/d" / str(number)).touch()
    found = listed(mount, Opcode.READDIR, node.id)
    assert listed(mount, Opcode.READDIR, node.id, found[9][2]) == found[10:]
    mount.directories.drop(node.id)
    assert listed(mount, Opcode.READDIR, node.id, found[9][2]) == found[10:]
    assert listed(mount, Opcode.READDIR, node.id, found[-1][2]) == []
    assert len(mount.directories) == 0


def test_listings_that_fail(mount: Mount, tmp_path: Path) -> None:
    body = struct.pack("=QQI20x", 0, 0, 4096)
    assert mount.ask(Opcode.READDIR, 99, body) == b"".join(encode.error(UNIQUE, errno.ESTALE))
    made, _ = mount.changes.mkdir(mount.union.nodes.root, b"made", 0o700, ME)
    made.looked_up()
    mount.changes.rmdir(mount.union.nodes.root, b"made")
    assert listed(mount, Opcode.READDIRPLUS, made.id) == []
    (tmp_path / "l0/gone").mkdir()
    node = looked_up(mount, "gone")
    mount.union.gate.forget(node.parts[0])
    (tmp_path / "l0/gone").rmdir()
    assert mount.ask(Opcode.READDIR, node.id, body) == b"".join(encode.error(UNIQUE, errno.ENOENT))


def test_listings_that_python_reads(mount: Mount, tmp_path: Path) -> None:
    """Large directories, names that share their hash, files, and malformed requests."""
    (tmp_path / "l0/large").mkdir()
    for number in range(4000):
        (tmp_path / "l0/large" / f"{number:040}").touch()
    body = struct.pack("=QQI20x", 0, 0, 4096)
    before = len(os.listdir("/proc/self/fd"))
    assert mount.ask(Opcode.READDIR, looked_up(mount, "large").id, body) is None
    mount.union.gate.forget(get(mount.union, "large").parts[0])
    mount.union.gate.forget(get(mount.union, "large").parts[-1])
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert mount.ask(Opcode.READDIR, looked_up(mount, "d/f").id, body) is None
    ticket = struct.pack("=QQI20x", 0, FIRST_TICKET, 4096)
    assert mount.ask(Opcode.READDIRPLUS, looked_up(mount, "d").id, ticket) is None
    assert mount.ask(Opcode.READDIR, looked_up(mount, "d").id, body[:-1]) is None


# -- data ---------------------------------------------------------------------------------------------------


def reading(number: int, offset: int, size: int) -> bytes:
    return struct.pack("=QQI20x", number, offset, size)


def data_of(answer: bytes | None) -> bytes:
    assert answer is not None
    assert struct.unpack_from("=IiQ", answer) == (len(answer), 0, UNIQUE)
    return answer[16:]


@pytest.mark.parametrize("waits", [False, True])
def test_read(mount: Mount, waits: bool) -> None:
    node = looked_up(mount, "d/f")
    fd = os.open(mount.union.stack.layers[-1].path + "/d/f", os.O_RDONLY)
    with open(fd, "rb") as real:
        content = real.read()
        file = OpenFile(os.dup(fd), readable=True, writable=False, waits=waits)
        number = mount.handles.register(node, file, None, writes=False)
        for offset, size in ((0, 4096), (1, 3), (0, 0), (5, 10), (1 << 40, 1)):
            answer = mount.ask(Opcode.READ, node.id, reading(number, offset, size))
            assert data_of(answer) == os.pread(fd, size, offset)
    assert content == b"lower"
    assert mount.handles.bytes_read == 8
    mount.handles.release(number)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("offset", [2**63, 2**64 - 1])
def test_reads_that_fail(mount: Mount, offset: int, waits: bool) -> None:
    node = looked_up(mount, "d/f")
    fd = os.open(mount.union.stack.layers[-1].path + "/d/f", os.O_RDONLY)
    file = OpenFile(fd, readable=True, writable=False, waits=waits)
    number = mount.handles.register(node, file, None, writes=False)
    answer = mount.ask(Opcode.READ, node.id, reading(number, offset, 1))
    assert answer == b"".join(encode.error(UNIQUE, errno.EINVAL))
    assert file.waits == waits
    mount.handles.release(number)


def test_reads_without_an_open(mount: Mount) -> None:
    """The file stays open for the next ones."""
    node = looked_up(mount, "d/f")
    assert data_of(mount.ask(Opcode.READ, node.id, reading(0, 0, 4096))) == b"lower"
    file = mount.union.files.keep(node, write=False)
    assert data_of(mount.ask(Opcode.READ, node.id, reading(0, 2, 4096))) == b"wer"
    assert (mount.union.files.keep(node, write=False), file.users) == (file, 1)
    copy_up(mount.union, node)
    assert mount.ask(Opcode.READ, node.id, reading(0, 0, 4096)) is None  # Python opens the upper's
    mount.union.files.keep(node, write=True).write(b"upper", 0)
    assert data_of(mount.ask(Opcode.READ, node.id, reading(0, 0, 4096))) == b"upper"
    mount.ask(Opcode.FORGET, node.id, struct.pack("=Q", 1))
    assert (len(mount.union.files.kept), file.is_open) == (0, False)


def test_kept_files_are_limited(tmp_path: Path, open_union: OpenUnion) -> None:
    (tmp_path / "l0").mkdir()
    for number in range(4):
        (tmp_path / f"l0/{number}").touch()
    union = open_union()
    nodes = [get(union, str(number)) for number in range(4)]
    kept = KeptFiles(most=2)
    files = [union.files.lend(node, write=False) for node in nodes]
    for node, file in list(zip(nodes, files, strict=True))[:2]:
        kept.keep(node, file)
    assert kept.find(nodes[0], write=False) is files[0]
    kept.keep(nodes[2], files[2])
    assert [file.is_open for file in files] == [True, False, True, True]
    assert kept.find(nodes[1], write=False) is None
    assert kept.find(nodes[0], write=True) is None  # it is closed, to be opened for both
    assert (len(kept), files[0].is_open) == (1, False)
    kept.drop(nodes[2])
    files[3].release()


def test_reads_that_python_answers(mount: Mount) -> None:
    node = looked_up(mount, "d/f")
    assert mount.ask(Opcode.READ, node.id, reading(0, 0, SPLICED)) is None
    assert mount.ask(Opcode.READ, node.id, reading(7, 0, 1)) is None
    assert mount.ask(Opcode.READ, 99, reading(0, 0, 1)) is None
    assert mount.ask(Opcode.READ, looked_up(mount, "d").id, reading(0, 0, 1)) is None
    assert mount.ask(Opcode.READ, node.id, reading(0, 0, 1)[:-1]) is None


def test_an_answer_that_the_kernel_refuses(mount: Mount) -> None:
    mount.device.shutdown(socket.SHUT_WR)
    mount.ask(Opcode.GETATTR, 1, bytes(16))
    ((answer, code),) = mount.refused
    assert (len(answer), code) == (120, errno.EPIPE)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(
    opcode=st.sampled_from([1, 2, 3, 4, 5, 9, 10, 11, 12, 14, 18, 22, 35, 42, 45, 0, 63, 64, 2**32 - 1]),
    nodeid=st.sampled_from([0, 1, 2, 2**63, 2**64 - 1]),
    body=st.binary(max_size=100),
    lie=st.integers(-3, 3),
)
def test_any_bytes(mount: Mount, opcode: int, nodeid: int, body: bytes, lie: int) -> None:
    """Nothing but an answer, or a request for Python, comes of them."""
    size = 40 + len(body) + (lie if lie == 3 else 0)
    given = struct.pack("=IIQQIIIHH", size, opcode, UNIQUE, nodeid, 0, 0, 1, 0, 0) + body
    mount.answers.take(given[: len(given) + min(lie, 0)])
    try:
        answer = mount.kernel.recv(1 << 16)
    except BlockingIOError:
        return
    assert struct.unpack_from("=I4xQ", answer) == (len(answer), UNIQUE)


# -- opening ----------------------------------------------------------------------------------------------

READ_ONLY = struct.pack("=II", os.O_RDONLY, 0)


def looked_up(mount: Mount, path: str) -> Node:
    """A node that the kernel knows."""
    node = get(mount.union, path)
    node.looked_up()
    return node


def released(number: int) -> bytes:
    return struct.pack("=QIIQ", number, 0, 0, 0)


def test_the_first_open_brings_the_data(mount: Mount) -> None:
    node = looked_up(mount, "d/f")
    assert mount.ask(Opcode.OPEN, node.id, READ_ONLY) == b"".join(notify.store(node.id, 0, b"lower"))
    assert mount.kernel.recv(4096) == b"".join(encode.opened(UNIQUE, 1, 2))
    assert mount.handles.bytes_read == 5
    assert node.use is not None
    assert node.use.filled
    assert mount.ask(Opcode.OPEN, node.id, READ_ONLY) == b"".join(encode.opened(UNIQUE, 2, 2))
    for number in (1, 2):
        assert mount.ask(Opcode.RELEASE, node.id, released(number)) == b"".join(encode.ok(UNIQUE))
    assert (len(mount.handles), node.use.cached, node.use.file) == (0, 0, None)


def test_later_opens_need_no_fd(mount: Mount) -> None:
    node = looked_up(mount, "d/f")
    mount.ask(Opcode.OPEN, node.id, READ_ONLY)
    mount.kernel.recv(4096)
    mount.ask(Opcode.RELEASE, node.id, released(1))
    before = len(os.listdir("/proc/self/fd"))
    assert mount.ask(Opcode.OPEN, node.id, READ_ONLY) == b"".join(encode.opened(UNIQUE, 2, 2))
    handle = mount.handles.get(2)
    assert handle is not None
    assert not handle.file.is_open
    assert len(os.listdir("/proc/self/fd")) == before
    assert handle.file.read(10, 0) == b"lower"
    mount.ask(Opcode.RELEASE, node.id, released(2))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_large_file(mount: Mount, tmp_path: Path) -> None:
    """Python decides whether it passes through; then its close, too."""
    (tmp_path / "l0/large").write_bytes(bytes(100_001))
    node = looked_up(mount, "large")
    before = len(os.listdir("/proc/self/fd"))
    assert mount.ask(Opcode.OPEN, node.id, READ_ONLY) is None
    assert len(os.listdir("/proc/self/fd")) == before
    use = node.in_use()
    number = mount.handles.register(node, mount.union.files.lend(node, write=False), None, writes=False)
    handle = mount.handles.get(number)
    assert handle is not None
    use.opened(handle)
    assert mount.ask(Opcode.OPEN, node.id, READ_ONLY) == b"".join(encode.opened(UNIQUE, number + 1, 2))
    for one in (number, number + 1):
        assert mount.ask(Opcode.RELEASE, node.id, released(one)) == b"".join(encode.ok(UNIQUE))
    assert (mount.gone, use.cached, use.file) == ([], 0, None)


def test_a_file_in_passthrough(mount: Mount) -> None:
    node = looked_up(mount, "d/f")
    use = node.in_use()
    number = mount.handles.register(node, mount.union.files.lend(node, write=False), None, writes=False)
    handle = mount.handles.get(number)
    assert handle is not None
    use.passes_through(7, of_upper=False)
    use.opened(handle)
    assert mount.ask(Opcode.OPEN, node.id, READ_ONLY) is None
    assert mount.ask(Opcode.RELEASE, node.id, released(number)) == b"".join(encode.ok(UNIQUE))
    assert mount.gone == [handle]
    assert len(mount.handles) == 0


def test_what_python_opens(mount: Mount, tmp_path: Path) -> None:
    node = looked_up(mount, "d/f")
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
        assert mount.ask(Opcode.OPEN, node.id, struct.pack("=II", flags, 0)) is None
    assert mount.ask(Opcode.OPEN, looked_up(mount, "d").id, READ_ONLY) is None
    assert mount.ask(Opcode.OPEN, 99, READ_ONLY) is None
    assert mount.ask(Opcode.RELEASE, node.id, released(9)) is None
    (tmp_path / "l0/meta").write_text("x")
    os.setxattr(tmp_path / "l0/meta", "user.overlay.metacopy", b"")
    assert mount.ask(Opcode.OPEN, looked_up(mount, "meta").id, READ_ONLY) is None
    replaced = looked_up(mount, "d/f")
    (tmp_path / "l0/other").write_text("other")
    (tmp_path / "l0/other").rename(tmp_path / "l0/d/f")
    assert mount.ask(Opcode.OPEN, replaced.id, READ_ONLY) is None


# -- changing names ---------------------------------------------------------------------------------------


def in_upper(mount: Mount) -> Node:
    """A directory whose flags are known, as those of a new one are."""
    made, _ = mount.changes.mkdir(mount.union.nodes.root, b"made", 0o755, ME)
    made.looked_up()
    return made


def test_create(mount: Mount, tmp_path: Path) -> None:
    parent = in_upper(mount)
    body = struct.pack("=IIII", os.O_RDWR, 0o100666, 0o27, 0) + b"new\0"
    (tmp_path / "upper/made").chmod(0o777)
    assert mount.ask(Opcode.CREATE, parent.id, body) is None  # a default ACL is not known of yet
    place = parent.parts[0]
    assert default_acl(place, mount.union.gate.fd(place)) == b""
    answer = mount.ask(Opcode.CREATE, parent.id, body)
    node = get(mount.union, "made/new")
    shown = mount.union.attributes(node)
    entry = encode.entry_out(node.id, node.generation, FOREVER, FOREVER, shown.packed())
    assert answer == b"".join(encode.created(UNIQUE, entry, 1, 2))
    assert stat.S_IMODE((tmp_path / "upper/made/new").stat().st_mode) == 0o640
    handle = mount.handles.get(1)
    assert handle is not None
    assert (handle.writes, handle.maps, handle.file.writable, node.lookups) == (True, True, True, 1)
    assert mount.ask(Opcode.RELEASE, node.id, released(1)) == b"".join(encode.ok(UNIQUE))
    assert node.use is not None
    assert node.use.file is None
    for number, flags in enumerate((os.O_RDONLY, os.O_WRONLY | os.O_APPEND), 2):
        body = struct.pack("=IIII", flags, 0o100666, 0, 0) + b"new%d\0" % number
        assert mount.ask(Opcode.CREATE, parent.id, body)
        handle = mount.handles.get(number)
        assert handle is not None
        assert (handle.writes, handle.maps) == (flags != os.O_RDONLY, False)


def test_create_that_cannot_be_opened(mount: Mount) -> None:
    parent = in_upper(mount)
    union = mount.union
    default_acl(parent.parts[0], union.gate.fd(parent.parts[0]))
    mount.serve(Modes([], OSError(errno.EFAULT, "")))
    before = len(os.listdir("/proc/self/fd"))
    body = struct.pack("=IIII", os.O_RDWR, 0o100666, 0, 0) + b"new\0"
    assert mount.ask(Opcode.CREATE, parent.id, body) == b"".join(encode.error(UNIQUE, errno.EFAULT))
    assert (len(mount.handles), len(os.listdir("/proc/self/fd"))) == (0, before)


def test_a_directory_that_is_none(mount: Mount) -> None:
    """Such a request is refused, by whatever error, and the process goes on. Flags of the file are known."""
    parent, changes = in_upper(mount), mount.changes
    file, _, fd = changes.create(parent, b"f", 0o600, ME)
    os.close(fd)
    mkdir = struct.pack("=II", 0o755, 0) + b"x\0"
    rename = struct.pack("=Q", parent.id) + b"x\0y\0"
    for opcode, body in [
        (Opcode.MKDIR, mkdir), (Opcode.RENAME, rename), (Opcode.UNLINK, b"x\0"), (Opcode.RMDIR, b"x\0"),
    ]:  # fmt: skip
        assert mount.ask(opcode, file.id, body) is None
    refused = (AttributeError, IndexError, OSError)  # the session's answer is an errno or EIO
    for call in (
        lambda: changes.mkdir(file, b"x", 0o755, ME),
        lambda: changes.unlink(file, b"x"),
        lambda: changes.rmdir(file, b"x"),
        lambda: changes.rename(parent, b"f", file, b"x", 0),
        lambda: changes.rename(file, b"f", parent, b"x", 0),
    ):
        with pytest.raises(refused):
            call()
    with pytest.raises(TypeError):
        mount.union.readlink(parent)
    mount.union.nodes.lose(parent, mount.union.nodes.root, b"made")
    with pytest.raises(OSError, match="Errno 116"):
        parent.check(os.stat("/"))


def test_an_error_that_is_a_bug_does_not_end_the_mount(
    mount: Mount, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the request fails, as one that is handled in Python."""
    parent = in_upper(mount)
    union = mount.union
    default_acl(parent.parts[0], union.gate.fd(parent.parts[0]))
    mount.serve(Modes([], RuntimeError("a bug")))
    body = struct.pack("=IIII", os.O_RDWR, 0o100666, 0, 0) + b"new\0"
    channel = Channel(mount.device.fileno(), mount.answers, lambda: False)
    channel.read_into(bytearray(4096))
    mount.kernel.send(message(Opcode.CREATE, parent.id, body))
    channel.rested()
    while channel.next() == FAIR:
        channel.rested()
    assert mount.kernel.recv(4096) == b"".join(encode.error(UNIQUE, errno.EIO))
    assert (len(mount.handles), mount.answers.counts()) == (0, {35: 1})
    assert "a bug" in caplog.text


def test_mkdir_rename_unlink_and_rmdir(mount: Mount, tmp_path: Path) -> None:
    parent = in_upper(mount)
    os.close(mount.changes.create(parent, b"f", 0o600, ME)[2])
    answer = mount.ask(Opcode.MKDIR, parent.id, struct.pack("=II", 0o755, 0) + b"sub\0")
    assert answer == entry(mount.union, "made/sub")
    sub = get(mount.union, "made/sub")
    assert sub.lookups == 1
    ok = b"".join(encode.ok(UNIQUE))
    assert mount.ask(Opcode.RENAME, parent.id, struct.pack("=Q", sub.id) + b"f\0g\0") == ok
    assert os.listdir(tmp_path / "upper/made/sub") == ["g"]
    back = struct.pack("=QII", parent.id, 1, 0) + b"g\0h\0"
    assert mount.ask(Opcode.RENAME2, sub.id, back) is None  # RENAME_NOREPLACE
    back = struct.pack("=QII", parent.id, 0, 0) + b"g\0h\0"
    assert mount.ask(Opcode.RENAME2, sub.id, back) == ok
    assert mount.ask(Opcode.UNLINK, parent.id, b"h\0") == ok
    assert mount.ask(Opcode.RMDIR, parent.id, b"sub\0") == ok
    assert os.listdir(tmp_path / "upper/made") == []
    for opcode in (Opcode.UNLINK, Opcode.RMDIR):
        assert mount.ask(opcode, parent.id, b"absent\0") is None
        assert mount.ask(opcode, sub.id, b"x\0") is None
        assert mount.ask(opcode, parent.id, b"a/b\0") is None


@pytest.mark.parametrize("body", [b"", b"\0", b"f\0", b"f\0g", b"f\0g\0h\0", b"\0g\0", b"f\0\0", b"f/\0g\0"])
def test_names_of_a_rename_that_are_not_two(mount: Mount, body: bytes) -> None:
    parent = in_upper(mount)
    os.close(mount.changes.create(parent, b"f", 0o600, ME)[2])
    assert mount.ask(Opcode.RENAME, parent.id, struct.pack("=Q", parent.id) + body) is None
    assert mount.ask(Opcode.RENAME2, parent.id, struct.pack("=QII", parent.id, 0, 0) + body) is None


# -- the loop ---------------------------------------------------------------------------------------------


def test_what_a_channel_returns(mount: Mount) -> None:
    """A request for Python, after those before it were answered; then nothing to do."""
    buffer = bytearray(4096)
    channel = Channel(mount.device.fileno(), mount.answers, lambda: False)
    channel.read_into(buffer)
    assert channel.next() == FAIR
    channel.rested()
    asked = message(Opcode.LISTXATTR, 1, bytes(8))
    for one in (message(Opcode.GETATTR, 1, bytes(16)), asked, message(Opcode.LOOKUP, 1, b"d\0")):
        mount.kernel.send(one)
    found = FAIR
    while found == FAIR:
        found = channel.next()
        channel.rested()
    assert bytes(buffer[:found]) == asked
    assert len(mount.kernel.recv(4096)) == 120
    while (found := channel.next()) == FAIR:
        channel.rested()
    assert found == WAIT
    assert mount.kernel.recv(4096) == entry(mount.union, "d")
    assert names(mount.union) == {b"d", b"link"}


def test_a_measured_request_is_returned(mount: Mount) -> None:
    channel = Channel(mount.device.fileno(), mount.answers, lambda: True)
    buffer = bytearray(4096)
    channel.read_into(buffer)
    mount.kernel.send(message(Opcode.GETATTR, 1, bytes(16)))
    while (size := channel.next()) == FAIR:
        channel.rested()
    assert size == 56
    assert channel.answer(size)
    assert len(mount.kernel.recv(4096)) == 120


def test_how_long_it_polls(mount: Mount) -> None:
    """Longer if the next request arrives soon, and shorter if it arrives late."""
    channel = Channel(mount.device.fileno(), mount.answers, lambda: False)
    channel.read_into(bytearray(4096))
    shortest = channel.polls_ns

    def until(reached: Callable[[], bool], pause: float) -> bool:
        """Wait for requests until ``reached``. On busy CPUs many polls end as FAIR, which says nothing."""
        deadline = time.monotonic() + 60
        while not reached() and time.monotonic() < deadline:
            channel.rested()
            if channel.next() == WAIT:
                time.sleep(pause)
                channel.waited()
        return reached()

    assert until(lambda: channel.polls_ns > 4 * shortest, 0)
    assert until(lambda: channel.polls_ns == shortest, 0.001)


def test_cpus_stay_awake_during_a_burst(mount: Mount, tmp_path: Path) -> None:
    """What is written is struct pm_qos_request's value: 0, then the default of include/linux/pm_qos.h."""
    device = tmp_path / "latency"
    device.touch()
    idling = Idling(str(device))
    channel = Channel(mount.device.fileno(), mount.answers, lambda: False, idling)
    channel.read_into(bytearray(4096))
    for _ in range(100):  # other tests may want the CPUs
        for _ in range(40):
            mount.kernel.send(message(Opcode.FORGET, 99, struct.pack("=Q", 1)))
        while channel.next() == FAIR:
            channel.rested()
        if channel.holds:
            break
        threading.Event().wait(0.11)
    else:
        idling.close()
        pytest.skip("the CPUs are busy all the time")
    assert device.read_bytes() == struct.pack("=i", 0)
    channel.let_go()
    assert not channel.holds
    assert device.read_bytes() == struct.pack("=ii", 0, 2_000_000_000)
    idling.close()
    assert not idling.possible


def test_cpus_are_not_kept_awake(tmp_path: Path) -> None:
    assert not Idling(str(tmp_path / "missing")).possible
    assert not Idling(most_cpus=0).possible


def test_the_error_of_a_device(mount: Mount) -> None:
    channel = Channel(-1, mount.answers, lambda: False)
    channel.read_into(bytearray(4096))
    channel.rested()
    with pytest.raises(OSError, match="cannot be read") as raised:
        channel.next()
    assert raised.value.errno == errno.EBADF
