"""Open files without a mount: users of backing files, and their closing; unions without shortcuts."""

from __future__ import annotations

import errno
import os
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from tests.unit.union_support import OpenUnion, get
from tests.unit.union_support import open_union as open_union
from unionfs.core.files import OpenFile
from unionfs.core.opening import KeptFiles
from unionfs.core.setting import Change
from unionfs.fuse.inline import begin
from unionfs.fuse.operations import Operations
from unionfs.settings.features import Features
from unionfs.union.layers import LayerStack
from unionfs.union.setids import Process
from unionfs.union.shortcuts import NO_SHORTCUTS
from unionfs.union.tree import Union


@pytest.fixture
def union(tmp_path: Path, open_union: OpenUnion) -> Union:
    (tmp_path / "l0/d").mkdir(parents=True)
    for name in ("f", "g", "h"):
        (tmp_path / "l0/d" / name).write_text("data")
    union = open_union()
    union.stack.volatile = True  # so no sync to a disk is needed
    return union


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY | os.O_TRUNC])
def test_an_open_goes_on_with_the_file_of_its_copy_up(union: Union, tmp_path: Path, flags: int) -> None:
    operations = Operations(union)
    begin(operations.copy_ups.ensure(get(union, "d/g"), 0))  # opens the directories
    files, node = operations.files, get(union, "d/f")
    fds = os.listdir("/proc/self/fd")
    prepared = begin(files.prepare(node, flags, 0))
    assert isinstance(prepared, OpenFile)
    number = files.open(node, flags, Process(0, 0, 0), prepared, kills_set_ids=False)
    assert files[number].file is prepared
    assert prepared.users == 1
    assert begin(files.write(prepared, 0, b"D", None)) == 1
    assert (tmp_path / "upper/d/f").read_text() == ("D" if flags & os.O_TRUNC else "Data")
    files.release(number)
    assert not prepared.is_open
    assert os.listdir("/proc/self/fd") == fds


def test_readers_go_on_with_the_upper_after_a_copy_up(union: Union) -> None:
    operations = Operations(union)
    files, node = operations.files, get(union, "d/f")
    reader = files.open(node, os.O_RDONLY, Process(0, 0, 0), None, kills_set_ids=False)
    lower = files[reader].file
    prepared = begin(files.prepare(node, os.O_RDWR, 0))
    assert isinstance(prepared, OpenFile)
    assert files[reader].file is prepared is not lower
    assert not lower.is_open
    writer = files.open(node, os.O_RDWR, Process(0, 0, 0), prepared, kills_set_ids=False)
    files.release(writer)
    assert prepared.read(4, 0) == b"data"
    files.release(reader)
    assert not prepared.is_open


def test_files_that_stay_open_are_few_and_go_with_their_nodes(union: Union) -> None:
    union.files.kept = KeptFiles(2)
    nodes = [get(union, f"d/{name}") for name in "fgh"]
    for node in nodes:
        node.looked_up()
    kept = [union.files.keep(node, write=False) for node in nodes]
    assert (kept[0].is_open, len(union.files.kept)) == (False, 2)
    assert union.files.keep(nodes[1], write=False) is kept[1]
    union.nodes.forget(nodes[1], 1)
    assert (kept[1].is_open, len(union.files.kept), nodes[1].use) == (False, 1, None)


def test_without_shortcuts(union: Union) -> None:
    plain = Union(union.stack, shortcuts=NO_SHORTCUTS)
    operations = Operations(plain)
    node = get(plain, "d/f")
    known = get(union, "d/f")
    unread = union.files.opener.lend_unread(known, known.in_use())
    assert unread is not None
    assert not unread.is_open
    file = plain.files.opener.lend_unread(node, node.in_use())
    assert file is not None
    assert file.is_open
    assert not node.no_capability
    plain.files.take_back(node, file)
    begin(operations.copy_ups.ensure(node, 0))
    assert node.parent is not None
    begin(operations.copy_ups.ensure(get(plain, "d/g"), 0))
    assert not node.parent.parts[0].empty
    assert not node.no_capability
    plain.close()


def test_an_error_of_close_leaves_the_node_table_whole(
    union: Union, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """NFS reports EDQUOT by close(2), FUSE whatever its daemon likes; FORGET has nobody to report it to."""
    node = get(union, "d/f")
    kept = union.files.keep(node, write=False)
    close = os.close

    def refuse(fd: int) -> None:
        close(fd)
        if fd == number:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    number = kept.fd
    monkeypatch.setattr(os, "close", refuse)
    union.nodes.forget(node, node.lookups)
    monkeypatch.undo()
    assert "could not be closed" in caplog.text
    again = get(union, "d/f")
    assert again is not node
    assert union.nodes.get(again.id) is again


def test_a_truncation_that_fails_leaves_nothing_open(union: Union, tmp_path: Path) -> None:
    operations = Operations(union)
    files, node = operations.files, get(union, "d/f")
    begin(operations.copy_ups.ensure(node, 0))
    fds = os.listdir("/proc/self/fd")
    prepared = begin(files.prepare(node, os.O_WRONLY | os.O_TRUNC, 0))
    assert isinstance(prepared, OpenFile)
    done = subprocess.run(["chattr", "+a", tmp_path / "upper/d/f"], capture_output=True)
    if done.returncode != 0:
        pytest.skip("no append-only files here")
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(prepared.fd, 0)
        with pytest.raises(PermissionError):
            files.open(node, os.O_WRONLY | os.O_TRUNC, Process(0, 0, 0), prepared, kills_set_ids=False)
    finally:
        subprocess.run(["chattr", "-a", tmp_path / "upper/d/f"], check=True)
    assert os.listdir("/proc/self/fd") == fds
    assert node.use is None or node.use.handles == []


def test_bytes_that_were_read(union: Union) -> None:
    operations = Operations(union)
    for count in (5, 7):
        operations.files.was_read(count)
    assert operations.figures()["read_bytes"] == operations.files.bytes_read == 12


@pytest.mark.parametrize("datasync", [False, True])
async def test_a_sync_of_metadata_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datasync: bool
) -> None:
    """Of a file whose data a lower has, the upper's object is synced."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    for name in ("l0", "upper", "work"):
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "l0/m").write_text("data")
    synced: list[tuple[str, int]] = []
    with (
        closing(
            LayerStack.open(
                [str(tmp_path / "l0")], str(tmp_path / "upper"), str(tmp_path / "work"),
                features=Features(metacopy="on"),
            )
        ) as stack,
        closing(Union(stack)) as union,
    ):  # fmt: skip
        operations, node = Operations(union), get(union, "m")
        await operations.setattr(node.id, Change(mode=0o600), None, 0)
        assert (node.in_place, node.data_in_place) == (True, False)
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, lambda fd, name=name: synced.append((name, os.fstat(fd).st_ino)))
        file = union.files.lend(node, write=False)
        await operations.files.fsync(node, file, datasync=datasync)
        union.files.take_back(node, file)
    assert synced == [("fdatasync" if datasync else "fsync", (tmp_path / "upper/m").stat().st_ino)]


async def test_a_range_that_is_copied(union: Union, tmp_path: Path) -> None:
    """It counts as read and as written."""
    files = Operations(union).files
    source, target = (tmp_path / name for name in ("source", "target"))
    source.write_bytes(b"0123456789")
    opened = [
        OpenFile(os.open(path, os.O_RDWR | os.O_CREAT), readable=True, writable=True, waits=False)
        for path in (source, target)
    ]
    assert await files.copy_range(opened[0], 2, opened[1], 1, 5) == 5
    assert await files.copy_range(opened[0], 8, opened[1], 6, 5) == 2
    assert target.read_bytes() == b"\0" + b"2345689"
    assert (files.bytes_read, files.bytes_written) == (7, 7)
    for file in opened:
        file.release()


def test_what_a_release_closes(union: Union) -> None:
    files, node = Operations(union).files, get(union, "d/f")
    numbers = [files.open(node, os.O_RDONLY, Process(0, 0, 0), None, kills_set_ids=False) for _ in range(2)]
    handles = [files[number] for number in numbers]
    assert [files.get(number) for number in numbers] == handles
    assert files.release(numbers[0]) is handles[0]
    assert files.get(numbers[0]) is None
    assert node.use is not None
    assert node.use.handles == handles[1:]
    assert files.release(numbers[1]) is handles[1]
    assert not handles[1].file.is_open
