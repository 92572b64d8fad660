"""The names of real directories: the records of getdents64(2), valid or not, and their order."""

from __future__ import annotations

import errno
import os
import struct
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfs.core import entries as module
from unionfs.core.entries import Entries
from unionfs.core.places import Layer, Place
from unionfs.union import tickets

UNKNOWN, CHR, DIR, REG = 0, 2, 4, 8
HEAD = struct.Struct("=QQHB")
"""The head of struct linux_dirent64: d_ino, d_off, d_reclen, d_type."""
NAMES = st.binary(min_size=1, max_size=300).filter(lambda name: not set(name) & set(b"/\0"))


def record(name: bytes, ino: int = 5, kind: int = REG) -> bytes:
    """One record, as the kernel writes it."""
    size = (HEAD.size + len(name) + 1 + 7) & ~7
    return (HEAD.pack(ino, 1, size, kind) + name).ljust(size, b"\0")


def entries_of(*parts: list[bytes], whiteouts_by_name: bool = True) -> Entries:
    """The names in several parts of a directory."""
    fd = os.open("/", os.O_PATH)
    place = Place(Layer(0, "/", fd, is_upper=False), None, b"")
    found = Entries([place] * len(parts))
    os.close(fd)
    for index, names in enumerate(parts):
        found.add_records(index, b"".join(map(record, names)), whiteouts_by_name=whiteouts_by_name)
    return found.order()


def parts_of(found: Entries) -> dict[bytes, int]:
    return {found.name(index): found.part(index) for index in range(len(found))}


def hash_of(name: bytes) -> int:
    """FNV-1a of 64 bits, finished as in MurmurHash3."""
    value = 0xCBF29CE484222325
    for byte in name:
        value = (value ^ byte) * 0x100000001B3 & (1 << 64) - 1
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value ^= value >> 33
        value = value * factor & (1 << 64) - 1
    return (value ^ value >> 33) % (module.FIRST_TICKET - module.FIRST_HASH) + module.FIRST_HASH


def test_the_first_ticket() -> None:
    assert module.FIRST_TICKET == tickets.FIRST_TICKET


@given(st.sets(NAMES, max_size=40))
def test_names_come_in_the_order_of_their_hashes(names: set[bytes]) -> None:
    names -= {b".", b".."}
    found = entries_of(sorted(names), whiteouts_by_name=False)
    assert found.names() == sorted(names, key=lambda name: (hash_of(name), name))
    assert [found.hash(index) for index in range(len(found))] == sorted(map(hash_of, names))
    assert [found.cookie(index) for index in range(len(found))] == sorted(map(hash_of, names))


def test_real_directories(tmp_path: Path) -> None:
    """Longer than one buffer, with all that a name may be."""
    made = {b"n%d" % number * 20 for number in range(3000)}
    made |= {b"\xff\xfe", b" ", b"x" * 255, b".hidden", b"..."}
    for name in made:
        os.close(os.open(os.fsencode(tmp_path) + b"/" + name, os.O_CREAT | os.O_WRONLY))
    fd = os.open(tmp_path, os.O_RDONLY)
    found = Entries([Place(Layer(0, str(tmp_path), fd, is_upper=False), None, b"")])
    assert found.read(0, fd, whiteouts_by_name=True) is False
    assert set(found.order().names()) == made
    os.close(fd)


def test_a_removed_directory_has_no_names(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    fd = os.open(tmp_path / "d", os.O_RDONLY)
    (tmp_path / "d").rmdir()
    found = Entries([Place(Layer(0, str(tmp_path), fd, is_upper=False), None, b"")])
    found.read(0, fd)
    assert len(found.order()) == 0
    os.close(fd)


def test_what_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    found = Entries([Place(Layer(0, str(tmp_path), fd, is_upper=False), None, b"")])
    with pytest.raises(OSError, match="Not a directory"):
        found.read(0, fd)
    os.close(fd)


def test_a_name_in_several_parts() -> None:
    found = entries_of([b"both", b"upper"], [b"lower", b"both"], [b"both", b"lower", b"lowest"])
    assert parts_of(found) == {b"both": 0, b"upper": 0, b"lower": 1, b"lowest": 2}
    assert [found.is_new, found.later(), found.is_new] == [True, None, False]


@pytest.mark.parametrize(
    ("name", "candidate"),
    [
        (b".wh.name", b"name"), (b".wh..name", b".name"), (b".wh....", b"..."), (b".wh.", None),
        (b".wh..", None), (b".wh...", None), (b".wh..wh..opq", None), (b".wh..wh.x", None),
        (b".whx", b".whx"), (b".wh", b".wh"),
    ],
)  # fmt: skip
def test_whiteouts_by_name(name: bytes, candidate: bytes | None) -> None:
    assert entries_of([name]).names() == ([] if candidate is None else [candidate])
    assert entries_of([name], whiteouts_by_name=False).names() == [name]
    found = entries_of([])
    assert found.add_records(0, record(name), whiteouts_by_name=True) is name.startswith(b".wh.")


def test_removed_files_of_nfs(tmp_path: Path) -> None:
    shown = [".nfs", ".nfs" + "0" * 23, ".nfs" + "0" * 25, ".nfs" + "g" * 24, ".nfs" + "A" * 24, "x" * 28]
    for name in [*shown, ".nfs0123456789abcdef01234567"]:
        (tmp_path / name).touch()
    fd = os.open(tmp_path, os.O_RDONLY)
    found = Entries([Place(Layer(0, str(tmp_path), fd, is_upper=False), None, b"")])
    found.read(0, fd, hides_removed=True)
    assert sorted(found.order().names()) == sorted(map(os.fsencode, shown))
    os.close(fd)


GOOD = record(b"good")
BAD = {
    "no length": HEAD.pack(1, 1, 0, REG) + b"name\0",
    "no room for a name": HEAD.pack(1, 1, HEAD.size, REG) + b"name\0",
    "longer than the data": HEAD.pack(1, 1, 64, REG) + b"name\0",
    "a part of a head": HEAD.pack(1, 1, 24, REG)[:12],
    "a head alone": HEAD.pack(1, 1, 24, REG),
    "no NUL": HEAD.pack(1, 1, 24, REG) + b"12345",
    "the NUL is the next record's": HEAD.pack(1, 1, 24, REG) + b"12345" + GOOD,
    "no name": HEAD.pack(1, 1, 24, REG) + bytes(5),
    "a slash": record(b"a/b"),
    "too long": record(b"x" * 1025),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=list(BAD))
@pytest.mark.parametrize("before", [b"", GOOD], ids=["at once", "later"])
def test_invalid_records(before: bytes, bad: bytes) -> None:
    with pytest.raises(OSError, match="Input/output error") as raised:
        entries_of([]).add_records(0, before + bad)
    assert raised.value.errno == errno.EIO


def test_the_longest_name() -> None:
    assert entries_of([b"x" * 1024]).names() == [b"x" * 1024]


@given(st.lists(st.one_of(st.binary(max_size=60), NAMES.map(record)), max_size=10))
def test_any_bytes(pieces: list[bytes]) -> None:
    """An error, or names that a directory can have."""
    found = entries_of([])
    with suppress(OSError):
        found.add_records(0, b"".join(pieces), whiteouts_by_name=True)
    assert all(0 < len(name) <= 1024 and not set(name) & set(b"/\0") for name in found.order().names())


def test_indices_are_checked() -> None:
    found = entries_of([b"one"])
    for index in (-1, 1):
        for ask in (found.name, found.hash, found.cookie, found.part):
            with pytest.raises(IndexError):
                ask(index)
    for part in (-1, 1):
        with pytest.raises(IndexError):
            found.add_records(part, GOOD)
        with pytest.raises(IndexError):
            found.read(part, 0)
