"""Answers, notifications and directory listings, read back by the header's facts."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from protocol_abi import STRUCTS
from protocol_reference import NO_ENTRY, Dirents, attribute_values, attributes_of, negative_entry

from unionfs.fuse.protocol import FOREVER, NEVER, InitReply, Notify, Reply, encode, notify
from unionfs.fuse.protocol.structs import LAYOUTS

ATTR = LAYOUTS["fuse_attr"].struct.pack(1, 2, 3, -4, *range(5, 17))
ATTR_FIELDS = tuple(STRUCTS["fuse_attr"].fields)
SIGNED = {"atime", "mtime", "ctime", "error", "backing_id", "result", "off", "len", "tv_sec"}


def read(raw: bytes, struct: str, at: int = 0) -> dict[str, Any]:
    """The fields of a structure in the header's layout; nested ones and arrays as bytes."""
    found: dict[str, Any] = {}
    for name, (offset, size) in STRUCTS[struct].fields.items():
        part = raw[at + offset : at + offset + size]
        unsigned_len = struct in ("fuse_out_header",) and name == "len"
        signed = name in SIGNED and not unsigned_len and not (struct == "fuse_dirent" and name == "off")
        found[name] = part if size > 8 else int.from_bytes(part, sys.byteorder, signed=signed)
    return found


def answer(reply: Reply, struct: str | None = None, unique: int = 99) -> tuple[dict[str, Any], bytes]:
    """Check the header of a successful answer; returns its structure's fields, and the rest."""
    raw = b"".join(reply)
    assert read(raw, "fuse_out_header") == {"len": len(raw), "error": 0, "unique": unique}
    body = raw[16:]
    if struct is None:
        return {}, body
    assert len(body) >= STRUCTS[struct].size
    return read(body, struct), body[STRUCTS[struct].size :]


def notification(reply: Reply, code: Notify, struct: str | None) -> tuple[dict[str, Any], bytes]:
    """The same for a notification."""
    raw = b"".join(reply)
    assert read(raw, "fuse_out_header") == {"len": len(raw), "error": code, "unique": 0}
    body = raw[16:]
    return (read(body, struct), body[STRUCTS[struct].size :]) if struct else ({}, body)


def test_golden_bytes() -> None:
    """Typed by hand, for little-endian machines."""
    if sys.byteorder != "little":
        pytest.skip("the golden bytes are little-endian")
    assert encode.error(0x0102030405060708, errno.ENOENT) == [
        bytes.fromhex("10000000 feffffff 0807060504030201")
    ]
    assert encode.ok(1) == [bytes.fromhex("10000000 00000000 0100000000000000")]
    assert encode.data(1, b"abc") == [bytes.fromhex("13000000 00000000 0100000000000000"), b"abc"]
    assert encode.written(2, 5) == [bytes.fromhex("18000000 00000000 0200000000000000 05000000 00000000")]
    assert encode.opened(2, 9, 0x80, 1) == [
        bytes.fromhex("20000000 00000000 0200000000000000 0900000000000000 80000000 01000000")
    ]
    assert b"".join(encode.entry(3, 7, 0, FOREVER, (1, 2), bytes(88))) == bytes.fromhex(
        "90000000 00000000 0300000000000000 0700000000000000 0000000000000000 0000000001000000"
        "0100000000000000 00000000 02000000"
    ) + bytes(88)
    assert b"".join(notify.inval_inode(1, -1, 2)) == bytes.fromhex(
        "28000000 02000000 0000000000000000 0100000000000000 ffffffffffffffff 0200000000000000"
    )


@pytest.mark.parametrize(
    ("number", "expected"), [(1, -1), (511, -511), (0, -5), (-2, -5), (512, -5), (9999, -5)]
)
def test_errors_are_what_the_kernel_takes(number: int, expected: int) -> None:
    raw = b"".join(encode.error(4, number))
    assert read(raw, "fuse_out_header") == {"len": 16, "error": expected, "unique": 4}


def test_attributes() -> None:
    expected = dict(zip(ATTR_FIELDS, (1, 2, 3, -4, *range(5, 17)), strict=True))
    assert read(ATTR, "fuse_attr") == expected
    assert len(ATTR) == STRUCTS["fuse_attr"].size


def test_attributes_of_a_stat() -> None:
    st = os.lstat("/dev/null")
    found = read(attributes_of(st, 42, nlink=7), "fuse_attr")
    assert (found["ino"], found["nlink"], found["mode"], found["rdev"]) == (42, 7, st.st_mode, st.st_rdev)
    for kind in ("atime", "mtime", "ctime"):
        assert found[kind] * 10**9 + found[kind + "nsec"] == getattr(st, f"st_{kind}_ns")
    assert read(attributes_of(st, 42), "fuse_attr")["nlink"] == st.st_nlink


def test_times_before_1970(tmp_path: Any) -> None:
    os.utime(tmp_path, ns=(-1, -1_500_000_000))
    found = read(attributes_of(os.stat(tmp_path), 1), "fuse_attr")
    assert (found["atime"], found["atimensec"]) == (-1, 999_999_999)
    assert (found["mtime"], found["mtimensec"]) == (-2, 500_000_000)


def test_entries() -> None:
    expected = {
        "nodeid": 5, "generation": 6, "entry_valid": 7, "entry_valid_nsec": 8, "attr_valid": 9,
        "attr_valid_nsec": 10, "attr": ATTR,
    }  # fmt: skip
    assert answer(encode.entry(99, 5, 6, (7, 8), (9, 10), ATTR), "fuse_entry_out") == (expected, b"")
    out = encode.entry_out(5, 6, (7, 8), (9, 10), ATTR)
    assert read(out, "fuse_entry_out") == expected
    fields, rest = answer(encode.created(99, out, 11, 12, -1), "fuse_entry_out")
    assert fields == expected
    assert read(rest, "fuse_open_out") == {"fh": 11, "open_flags": 12, "backing_id": -1}
    fields, _ = answer(negative_entry(99, (7, 8)), "fuse_entry_out")
    assert fields == dict.fromkeys(expected, 0) | {"entry_valid": 7, "entry_valid_nsec": 8, "attr": bytes(88)}
    assert len(NO_ENTRY) == STRUCTS["fuse_entry_out"].size


SIMPLE: list[tuple[Reply, str, dict[str, Any]]] = [
    (encode.attr(99, (1, 2), ATTR), "fuse_attr_out", {"attr_valid": 1, "attr_valid_nsec": 2, "attr": ATTR}),
    (encode.opened(99, 1, 2, 3), "fuse_open_out", {"fh": 1, "open_flags": 2, "backing_id": 3}),
    (encode.written(99, 1), "fuse_write_out", {"size": 1}),
    (encode.copied(99, 1 << 40), "fuse_copy_file_range_out", {"bytes_copied": 1 << 40}),
    (encode.xattr_size(99, 3), "fuse_getxattr_out", {"size": 3}),
    (encode.lseek(99, 1 << 40), "fuse_lseek_out", {"offset": 1 << 40}),
    (encode.ioctl(99, -1), "fuse_ioctl_out", {"result": -1, "flags": 0, "in_iovs": 0, "out_iovs": 0}),
]


@pytest.mark.parametrize(("reply", "struct", "expected"), SIMPLE, ids=[struct for _, struct, _ in SIMPLE])
def test_answers_of_one_structure(reply: Reply, struct: str, expected: dict[str, Any]) -> None:
    fields, rest = answer(reply, struct)
    shown = {name: value for name, value in fields.items() if not name.startswith(("padding", "dummy"))}
    assert shown == expected
    assert not any(fields[name] for name in fields.keys() - shown.keys())
    assert rest == b""


def test_ioctl_with_data() -> None:
    assert answer(encode.ioctl(99, 3, b"data"), "fuse_ioctl_out")[1] == b"data"


def test_statfs() -> None:
    vfs = os.statvfs("/")
    fields, rest = answer(encode.statfs(99, vfs), "fuse_statfs_out")
    found = read(fields["st"], "fuse_kstatfs")
    assert (found["blocks"], found["bfree"], found["bavail"]) == (vfs.f_blocks, vfs.f_bfree, vfs.f_bavail)
    assert (found["files"], found["ffree"]) == (vfs.f_files, vfs.f_ffree)
    assert (found["bsize"], found["frsize"], found["namelen"]) == (vfs.f_bsize, vfs.f_frsize, vfs.f_namemax)
    assert rest == b""


def test_statx_keeps_everything_but_the_inode_number() -> None:
    raw = bytes(range(256))
    fields, rest = answer(encode.statx(99, (1, 2), raw, 77), "fuse_statx_out")
    assert (fields["attr_valid"], fields["attr_valid_nsec"], fields["flags"]) == (1, 2, 0)
    assert rest == b""
    expected, found = read(raw, "fuse_statx"), read(fields["stat"], "fuse_statx")
    for name in found:
        if name in ("atime", "btime", "ctime", "mtime"):
            assert found[name][:12] == expected[name][:12]  # not __reserved
        elif name == "__spare2":
            assert not any(found[name])
        elif not name.startswith("__"):
            assert found[name] == (77 if name == "ino" else expected[name])


def test_data_is_not_copied() -> None:
    big, view = bytearray(1 << 20), memoryview(bytes(100))
    reply = encode.data(99, big, view)
    assert reply[1] is big
    assert reply[2] is view
    assert answer(reply)[1] == bytes(big) + bytes(view)
    assert answer(encode.data(99))[1] == b""


def test_init() -> None:
    flags = (5 << 32) | 6
    reply = InitReply(7, 45, 1, flags, 3, 4, 5, 1, 7, 9)
    fields, rest = answer(encode.init(99, reply), "fuse_init_out")
    assert rest == b""
    assert fields.pop("unused") == bytes(22)
    unused = {"map_alignment": 0, "request_timeout": 0}
    assert fields == reply._asdict() | {"flags": 6, "flags2": 5} | unused


def test_notifications() -> None:
    assert notification(notify.inval_inode(5, -1, 7), Notify.INVAL_INODE, "fuse_notify_inval_inode_out") == (
        {"ino": 5, "off": -1, "len": 7},
        b"",
    )
    assert notification(notify.store(5, 6, b"ab", b"cd"), Notify.STORE, "fuse_notify_store_out") == (
        {"nodeid": 5, "offset": 6, "size": 4, "padding": 0},
        b"abcd",
    )
    assert notification(notify.resend(), Notify.RESEND, None) == ({}, b"")


def parse(raw: bytes, plus: bool) -> list[tuple[bytes, int, int, int, bytes]]:
    """A listing as the kernel reads it (fs/fuse/readdir.c): name, ino, off, type, entry."""
    found, at, head = [], 0, STRUCTS["fuse_entry_out"].size if plus else 0
    while at < len(raw):
        dirent = read(raw, "fuse_dirent", at + head)
        start = at + head + STRUCTS["fuse_dirent"].size
        name = raw[start : start + dirent["namelen"]]
        found.append((name, dirent["ino"], dirent["off"], dirent["type"], raw[at : at + head]))
        end = start + dirent["namelen"]
        at = (end + 7) // 8 * 8
        assert at <= len(raw)
        assert not any(raw[end:at])
    return found


NAMES = st.binary(min_size=1, max_size=255).filter(lambda name: not {0, 47} & set(name))


@given(names=st.lists(NAMES, max_size=20), limit=st.integers(0, 4096), plus=st.booleans())
def test_listings(names: list[bytes], limit: int, plus: bool) -> None:
    listing, entry = Dirents(limit), encode.entry_out(1, 0, NEVER, NEVER, ATTR)
    added = []
    for off, name in enumerate(names, 1):
        fits = listing.fits_plus(name)
        if plus:
            done = listing.add_plus(name, 10 + off, off, stat.S_IFDIR | 0o755, entry)
            assert done == fits
        else:
            done = listing.add(name, 10 + off, off, stat.S_IFREG)
        if not done:
            break
        added.append((name, 10 + off, off, 4 if plus else 8, entry if plus else b""))
    raw = listing.packed()
    assert len(raw) == listing.size <= limit
    assert len(raw) % 8 == 0
    assert parse(raw, plus) == added
    if len(added) < len(names):
        head = (152 if plus else 24) + len(names[len(added)])
        assert listing.size + (head + 7) // 8 * 8 > limit


def test_an_entry_packed_at_once(tmp_path: Path) -> None:
    st = os.stat(tmp_path)
    values = attribute_values(st, 42, 7, -5_000_000_001)
    attr = attributes_of(st, 42, 7, -5_000_000_001)
    one, two = Dirents(4096), Dirents(4096)
    for off, name in enumerate((b"a", b"longer-name", b"x" * 255), 1):
        entry = encode.entry_out(off, 6, (7, 8), (9, 10), attr)
        assert one.add_plus(name, 42, off, st.st_mode, entry)
        two.add_found(name, off, off, 6, (7, 8), (9, 10), values)
    assert one.packed() == two.packed()
    assert one.size == two.size


@pytest.mark.parametrize("name", [b"", b"a/b", b"x" * 1025])
def test_names_that_would_fail_the_whole_listing(name: bytes) -> None:
    listing = Dirents(4096)
    with pytest.raises(ValueError, match="cannot be the name"):
        listing.add(name, 1, 1, stat.S_IFREG)
    with pytest.raises(ValueError, match="cannot be the name"):
        listing.add_plus(name, 1, 1, stat.S_IFREG, NO_ENTRY)
    with pytest.raises(ValueError, match="cannot be the name"):
        listing.add_found(name, 1, 1, 0, NEVER, NEVER, attribute_values(os.stat("/"), 1))
    assert listing.packed() == b""
