"""Headers of archives, read by other programs."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from unionfs.storage.archive.entry import FILE, SPARSE, SYMLINK, Entry
from unionfs.storage.archive.headers import (
    RECORD,
    Header,
    Malformed,
    decode,
    encode,
    parse_records,
    sparse_map,
    stored_size,
)

GIB = 1 << 30


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A sparse member that stores more than 8 GiB, only holes in this file, and one member after it."""
    large = Entry(
        b"large", SPARSE, 0o644, 0, 0, 20 * GIB, 1_700_000_000_000_000_000,
        segments=[(GIB, 9 * GIB), (20 * GIB, 0)],
    )  # fmt: skip
    after = Entry(b"after", FILE, 0o644, 0, 0, 5, 1_700_000_000_000_000_000)
    path = tmp_path / "large.tar"
    with path.open("wb") as out:
        stored = stored_size(large)
        out.write(encode(large, stored))
        out.write(sparse_map(large.segments))
        out.seek(stored - len(sparse_map(large.segments)), 1)
        out.seek(-stored % RECORD, 1)
        out.write(encode(after, 5) + b"after".ljust(RECORD, b"\0") + bytes(2 * RECORD))
    return path


def test_a_large_sparse_member_for_python(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        members = {member.name: member.size for member in tar}
        assert members == {"./large": 20 * GIB, "./after": 5}
        content = tar.extractfile("./after")
        assert content is not None
        assert content.read() == b"after"


def test_a_large_sparse_member_for_tar(archive: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("tar is not installed")
    listed = subprocess.run(["tar", "tvf", archive], capture_output=True, text=True, check=True).stdout
    assert [(line.split()[2], line.split()[-1]) for line in listed.splitlines()] == [
        (str(20 * GIB), "./large"),
        ("5", "./after"),
    ]


def test_a_large_sparse_member_for_ourselves(archive: Path) -> None:
    entry = Entry(b"large", SPARSE, 0o644, 0, 0, 20 * GIB, 0)
    raw = encode(entry, 9 * GIB)
    header = Header(raw[-RECORD:])
    assert header.size == 9 * GIB
    records = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"./large"),
               (b"GNU.sparse.realsize", b"%d" % (20 * GIB))]  # fmt: skip
    found, _, size = decode(header, records)
    assert (found.kind, found.size, size) == (SPARSE, 20 * GIB, 9 * GIB)


def _through_python(tmp_path: Path, entry: Entry, size: int = 0) -> tarfile.TarInfo:
    """What Python reads of a member, in front of another one."""
    path = tmp_path / "one.tar"
    after = Entry(b"after", FILE, 0o644, 0, 0, 0, 0)
    path.write_bytes(
        encode(entry, size) + bytes(size + -size % RECORD) + encode(after, 0) + bytes(2 * RECORD)
    )
    with tarfile.open(path) as tar:
        first, second = tar
    assert second.name == "./after"
    return first


@pytest.mark.parametrize("length", [1, 97, 98, 99, 100, 155, 254, 300])
def test_long_names_and_links(tmp_path: Path, length: int) -> None:
    """In an extended header only if the field of 100 bytes is too short, as POSIX's pax has it."""
    entry = Entry(b"n" * length, FILE, 0o640, 1, 2, 0, 10**9 * 1_700_000_000)
    found = _through_python(tmp_path, entry)
    assert (found.name, found.mode, found.uid, found.gid) == ("./" + "n" * length, 0o640, 1, 2)
    assert (len(encode(entry, 0)) == RECORD) == (2 + length <= 100)
    link = Entry(b"l", SYMLINK, 0o777, 0, 0, 0, 0, link=b"t" * length)
    assert _through_python(tmp_path, link).linkname == "t" * length
    assert (len(encode(link, 0)) == RECORD) == (length <= 100)


@pytest.mark.parametrize("number", [0, 0o7777777, 0o7777777 + 1, (1 << 32) - 2])
def test_owners_of_any_size(tmp_path: Path, number: int) -> None:
    found = _through_python(tmp_path, Entry(b"f", FILE, 0o644, number, number, 0, 0))
    assert (found.uid, found.gid) == (number, number)
    small = len(encode(Entry(b"f", FILE, 0o644, number, 0, 0, 0), 0)) == RECORD
    assert small == (number <= 0o7777777)


@pytest.mark.parametrize(
    "ns",
    [
        0,
        1,
        -1,
        10**9 - 1,
        10**9,
        -(10**9),
        1_700_000_000_123_456_789,
        -1_500_000_000,
        10**9 << 33,
        (10**9 << 33) - 1,
    ],
)
def test_times_come_back(tmp_path: Path, ns: int) -> None:
    """To the nanosecond; Python's are floating point."""
    entry = Entry(b"f", FILE, 0o644, 0, 0, 0, ns)
    raw = encode(entry, 0)
    extended = raw[RECORD : RECORD + Header(raw[:RECORD]).size] if len(raw) > RECORD else b""
    found, *_ = decode(Header(raw[-RECORD:]), list(parse_records(extended)))
    assert found.mtime == ns
    assert _through_python(tmp_path, entry).mtime == pytest.approx(ns / 10**9)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"uid", b"4294967295"),
        (b"gid", b"4294967295"),
        (b"uid", b"-1"),
        (b"uid", b""),
        (b"gid", b"1" * 20),
        (b"mtime", b""),
        (b"mtime", b"x"),
        (b"mtime", b".5"),
        (b"mtime", b"1.x"),
        (b"mtime", b"--1"),
        (b"mtime", b"1" * 19),
        (b"path", b"./a/../b"),
        (b"unknown", b"1"),
        (b"SCHILY.acl.access", b"no"),
        (b"GNU.sparse.major", b"2"),
    ],
)
def test_records_that_are_refused(key: bytes, value: bytes) -> None:
    header = Header(encode(Entry(b"f", FILE, 0o644, 0, 0, 0, 0), 0))
    with pytest.raises(Malformed):
        decode(header, [(key, value)])


def test_the_largest_records_that_are_not(tmp_path: Path) -> None:
    header = Header(encode(Entry(b"f", FILE, 0o644, 0, 0, 0, 0), 0))
    found, *_ = decode(header, [(b"uid", b"4294967294"), (b"gid", b"4294967294"), (b"mtime", b"9" * 18)])
    assert (found.uid, found.gid, found.mtime) == ((1 << 32) - 2, (1 << 32) - 2, (10**18 - 1) * 10**9)
