"""Headers of archives, read by other programs."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from unionfs.storage.archive.entry import FILE, SPARSE, Entry
from unionfs.storage.archive.headers import RECORD, Header, decode, encode, sparse_map, stored_size

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
