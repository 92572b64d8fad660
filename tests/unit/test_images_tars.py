"""Tars that other programs wrote: Python in each format, GNU tar and its sparse files."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.layers import directory, file, hard_link, symlink, tar
from unionfs.storage.archive.entry import DIRECTORY, FILE, HARDLINK, SPARSE, SYMLINK, Entry
from unionfs.storage.archive.foreign import ForeignReader
from unionfs.storage.archive.headers import Malformed

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def read(data: bytes) -> list[tuple[Entry, bytes]]:
    """The entries with their content."""
    found = []
    reader = ForeignReader(io.BytesIO(data))
    for entry in reader.entries():
        content = bytearray(entry.size if entry.kind in (FILE, SPARSE) else 0)
        for offset, piece in reader.content():
            content[offset : offset + len(piece)] = piece
        found.append((entry, bytes(content)))
    return found


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_of_pythons_tars(form: int) -> None:
    long = "d/" + "n" * 90 + "/" + "m" * 95
    if form != tarfile.USTAR_FORMAT:
        long += "x" * 40
    data = tar(
        [
            directory("./d/"),
            file("a", b"content", mode=0o4755, uid=1000, gid=100),
            file(long, bytes(range(256)) * 40),
            symlink("s", "../" * 20 + "x"),
            hard_link("h", "a"),
        ],
        form,
    )
    found = read(data)
    assert [(entry.path.rstrip(b"/"), entry.kind) for entry, _ in found] == [
        (b"./d", DIRECTORY), (b"a", FILE), (long.encode(), FILE), (b"s", SYMLINK), (b"h", HARDLINK),
    ]  # fmt: skip
    entry, content = found[1]
    assert (entry.mode, entry.uid, entry.gid, entry.mtime) == (0o4755, 1000, 100, 1_600_000_000 * 10**9)
    assert content == b"content"
    assert found[2][1] == bytes(range(256)) * 40
    assert found[3][0].link == b"../" * 20 + b"x"
    assert found[4][0].link == b"a"


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar", "v7"])
def test_gnu_tar(form: str, tmp_path: Path) -> None:
    source = tmp_path / "t"
    (source / "dir").mkdir(parents=True)
    (source / "dir" / "file").write_bytes(random.Random(1).randbytes(100_000))
    (source / "link").symlink_to("dir/file")
    os.link(source / "dir" / "file", source / "zhard")
    if form in ("gnu", "pax"):
        (source / ("u" * 120)).write_text("long")
        (source / "später").write_text("utf-8")
    data = subprocess.run(
        ["tar", "-C", source, f"--format={form}", "--sort=name", "-c", "."], check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as known:
        expected = [
            (member.name.encode("utf-8", "surrogateescape"), member.linkname.encode(), member.mode)
            for member in known.getmembers()
        ]
    found = [
        (entry.path.rstrip(b"/"), entry.link, entry.mode) for entry, _ in read(data)
    ]
    assert found == expected
    assert {e.path: c for e, c in read(data)}[b"./dir/file"] == (source / "dir/file").read_bytes()


def test_sparse_files_of_gnu_tar(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as out:
        out.truncate(10 << 20)
        for at in (0, 3 << 20, (7 << 20) + 4096):
            out.seek(at)
            out.write(b"x" * 4096)
    command = ["tar", "-C", tmp_path, "--sparse", "-c", "sparse"]
    data = subprocess.run([*command, "--format=pax"], check=True, capture_output=True).stdout
    if len(data) > 1 << 20:
        pytest.skip("the filesystem of temporary files has no holes")
    ((entry, content),) = read(data)
    assert entry.kind == SPARSE
    assert content == (tmp_path / "sparse").read_bytes()
    old = subprocess.run([*command, "--format=gnu"], check=True, capture_output=True).stdout
    with pytest.raises(Malformed, match="type"):
        read(old)


def test_xattrs_and_acls_in_pax_records(tmp_path: Path) -> None:
    data = tar([
        file("a", pax_headers={
            "SCHILY.xattr.user.a%3Db": "v=1", "mtime": "1.25",
            "SCHILY.acl.access": "user::rw-\nuser:7:r--\ngroup::r--\nmask::r--\nother::---\n",
        }),
    ])  # fmt: skip
    ((entry, _),) = read(data)
    assert entry.xattrs[b"user.a=b"] == b"v=1"
    assert b"system.posix_acl_access" in entry.xattrs
    assert entry.mtime == 1_250_000_000


def test_large_and_negative_numbers() -> None:
    data = tar([file("a", uid=3_000_000_000, mtime=-5)], tarfile.GNU_FORMAT)
    ((entry, _),) = read(data)
    assert (entry.uid, entry.mtime) == (3_000_000_000, -5 * 10**9)


def test_a_global_header_holds_for_all_members() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", pax_headers={"uid": "77"}) as made:
        for name in ("a", "b"):
            made.addfile(file(name)[0])  # type: ignore[index]
    assert [entry.uid for entry, _ in read(out.getvalue())] == [77, 77]


WHOLE = tar([directory("d"), file("d/f", b"x" * 1000, pax_headers={"a": "b"}), symlink("l", "t" * 150)])
# Two empty records end it; what follows pads it.
END = -(-len(WHOLE.rstrip(b"\0")) // 512) * 512 + 1024


@given(st.integers(0, END - 1))
def test_a_tar_that_is_cut_off_is_refused(length: int) -> None:
    with pytest.raises(Malformed):
        read(WHOLE[:length])


@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_a_damaged_tar_is_read_or_refused(at: int, change: int) -> None:
    data = bytearray(WHOLE)
    data[at] ^= change
    with suppress(Malformed):
        read(bytes(data))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("no tar", b"\x7fELF" + bytes(2044)),
        ("a huge extended header", tar([file("a", pax_headers={"x": "y"})])[:124] + b"77777777777\0"),
        ("a size beyond 64 bits", tar([file("a")])[:124] + b"\xbf" + b"\xff" * 11 + tar([file("a")])[136:]),
        ("garbage behind the end", tar([file("a")]) + b"x" * 512),
    ],
)
def test_forged_headers_are_refused(name: str, data: bytes) -> None:
    with pytest.raises(Malformed):
        read(data)


def test_bsdtar(tmp_path: Path) -> None:
    if shutil.which("bsdtar") is None:
        pytest.skip("bsdtar (libarchive-tools) is not installed")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / ("n" * 200)).write_text("x")
    data = subprocess.run(["bsdtar", "-C", tmp_path, "-cf", "-", "t"], check=True, capture_output=True).stdout
    assert [content for _, content in read(data)] == [b"", b"x"]
