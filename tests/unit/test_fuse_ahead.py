"""Listings prepared ahead, request by request and without a mount."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.unit.test_union_bound import show
from tests.unit.union_support import ME, OpenUnion, copy_up, get
from tests.unit.union_support import open_union as open_union
from unionfs.core.node import Node
from unionfs.fuse.direct.device import Device
from unionfs.fuse.direct.listings import ListingRequests
from unionfs.fuse.inline import begin
from unionfs.fuse.operations import Operations
from unionfs.fuse.protocol import Opcode
from unionfs.fuse.protocol.requests import Readdirplus
from unionfs.union.changes import Changes
from unionfs.union.copyup import CopyUp
from unionfs.union.merge import Merge
from unionfs.union.merged import Merged
from unionfs.union.tree import Union

SIZE = 4096
ENTRY = 128
"""The bytes of struct fuse_entry_out, before each struct fuse_dirent."""


class Walked:
    """A union with directories ``d0``, ``d1`` ... for successive listings."""

    def __init__(self, union: Union) -> None:
        self.union = union
        self._device = Device(os.open(os.devnull, os.O_WRONLY))
        self.operations = Operations(union)
        self.listings = ListingRequests(self.operations)
        self.ahead = self.listings.ahead
        self.list(union.nodes.root)

    def list(self, node: Node, size: int = SIZE) -> bytes:
        """The answer to READDIRPLUS, without the nodes' generations, which differ from union to union."""
        request = Readdirplus.of(unique=1, nodeid=node.id, offset=0, size=size)
        reply = begin(self.listings.waiting[Opcode.READDIRPLUS](request))
        assert isinstance(reply, list)
        records, at = bytearray(b"".join(reply)[16:]), 0
        while at < len(records):
            records[at + 8 : at + 16] = bytes(8)
            (length,) = struct.unpack_from("=I", records, at + ENTRY + 16)
            at += (ENTRY + 24 + length + 7) & ~7
        return bytes(records)

    def in_order(self) -> list[Node]:
        """The directories below the root, in listing order."""
        return [node for node in (self.union.nodes.root.children or {}).values() if node.is_dir]

    def prepare_all(self) -> None:
        """Do all pending work."""
        while self.ahead.step():
            pass

    def walk(self, count: int) -> Node:
        """List that many directories; returns the next one, which is prepared."""
        directories = self.in_order()
        for node in directories[:count]:
            self.list(node)
        self.prepare_all()
        return directories[count]

    def close(self) -> None:
        self._device.close()


Walk = Callable[..., Walked]


@pytest.fixture
def walk(tmp_path: Path, open_union: OpenUnion) -> Iterator[Walk]:
    for number in range(12):
        (tmp_path / f"l0/d{number}").mkdir(parents=True)
        for name in ("one", "two", "three"):
            (tmp_path / f"l0/d{number}/{name}").write_text(name * number)
    made: list[Walked] = []

    def make(*, upper: bool = True) -> Walked:
        made.append(Walked(open_union(upper=upper)))
        return made[-1]

    yield make
    for walked in made:
        walked.close()


def test_what_was_prepared_is_the_same(walk: Walk) -> None:
    asked, walked = walk(upper=False), walk()
    node = walked.walk(4)
    assert walked.ahead.begun == 3
    assert walked.ahead.used == 2
    counted = len(walked.union.nodes)
    assert [child.lookups for child in (node.children or {}).values()] == [0, 0, 0]
    assert walked.list(node) == asked.list(asked.in_order()[4])
    assert walked.ahead.used == 3
    assert len(walked.union.nodes) == counted
    assert [child.lookups for child in (node.children or {}).values()] == [1, 1, 1]


def test_half_of_it_is_prepared(walk: Walk) -> None:
    """The rest is done on request."""
    asked, walked = walk(upper=False), walk()
    for node in walked.in_order()[:4]:
        walked.list(node)
    assert walked.ahead.step()
    assert walked.ahead.step()
    assert walked.list(walked.in_order()[4]) == asked.list(asked.in_order()[4])
    assert walked.ahead.used == 3
    assert not walked.ahead.step() or walked.ahead.begun == 4


def test_another_directory_is_listed(walk: Walk) -> None:
    """The unused preparation is dropped, and none follows until the walk continues."""
    walked = walk()
    node = walked.walk(4)
    known = len(walked.union.nodes)
    assert node.children
    walked.list(walked.in_order()[8])
    assert not node.children
    assert len(walked.union.nodes) == known
    begun = walked.ahead.begun
    walked.list(walked.in_order()[9])
    assert walked.ahead.begun == begun
    walked.list(walked.in_order()[10])
    assert walked.ahead.begun == begun + 1


def test_a_node_that_was_known_is_forgotten(walk: Walk) -> None:
    """Its id is not sent again: it is invalid."""
    walked = walk()
    node = walked.in_order()[4]
    name, (child, _) = b"two", walked.union.lookup(node, b"two") or (node, None)
    child.lookups += 1
    assert walked.walk(4) is node
    walked.operations.forget(child.id, 1)
    walked.list(node)
    assert walked.ahead.used == 2
    assert node.children
    assert walked.union.nodes.get(node.children[name].id) is node.children[name] is not child


def test_the_directory_is_forgotten(walk: Walk) -> None:
    """Before the first step; then it is looked up and listed again."""
    asked, walked = walk(upper=False), walk()
    for node in walked.in_order()[:4]:
        walked.list(node)
    node = walked.in_order()[4]
    walked.operations.forget(node.id, 1)
    walked.prepare_all()
    again, _ = walked.union.lookup(walked.union.nodes.root, node.name) or (None, None)
    assert again is not None
    again.lookups += 1
    assert walked.list(again) == asked.list(asked.in_order()[4])
    assert walked.union.nodes.get(again.id) is again
    walked.list(walked.in_order()[8])
    walked.operations.forget(again.id, 1)
    for child in list((again.children or {}).values()):
        walked.operations.forget(child.id, 1)
    assert walked.union.nodes.get(again.id) is None


def test_a_directory_that_nobody_asks_for_is_forgotten(walk: Walk) -> None:
    walked = walk()
    node = walked.walk(4)
    walked.operations.forget(node.id, 1)
    known = len(walked.union.nodes)
    walked.list(walked.in_order()[8])
    assert walked.union.nodes.get(node.id) is None
    # the directory and its three names are gone, and those of another one are new
    assert len(walked.union.nodes) == known - 1


def test_a_name_is_removed_meanwhile(tmp_path: Path, walk: Walk, open_union: OpenUnion) -> None:
    """From a directory merged from two lowers, which thereby gets a part in the upper."""
    for number in range(12):
        (tmp_path / f"l1/d{number}").mkdir(parents=True)
        for name in range(20):
            (tmp_path / f"l1/d{number}/n{name}").write_text("lower")
    walked = Walked(open_union(2))
    for node in walked.in_order()[:4]:
        walked.list(node)
    node = walked.in_order()[4]
    for _ in range(4):
        assert walked.ahead.step()
    name = next(b"n%d" % number for number in range(20) if b"n%d" % number not in (node.children or {}))
    child, _ = walked.union.lookup(node, name) or (node, None)
    child.lookups += 1
    walked.operations.changes.unlink(node, name)
    walked.operations.forget(child.id, 1)
    walked.prepare_all()
    assert walked.union.lookup(node, name) is None
    assert name + b"\0" not in walked.list(node).replace(name + b"0", b"")
    walked.close()


@pytest.mark.parametrize("listed", [False, True], ids=["before its names are read", "then"])
def test_a_new_file_comes_and_goes(walk: Walk, listed: bool) -> None:
    """It leaves no entry in the upper."""
    walked = walk()
    for node in walked.in_order()[:4]:
        walked.list(node)
    node, other = walked.in_order()[4], walked.in_order()[9]
    if listed:
        walked.prepare_all()
    file, _, fd = walked.operations.changes.create(node, b"temporary", 0o644, ME)
    os.close(fd)
    file.lookups += 1
    walked.prepare_all()
    walked.operations.changes.rename(node, b"temporary", other, b"moved", 0)
    assert b"temporary" not in walked.list(node)
    assert walked.union.lookup(node, b"temporary") is None


def test_a_file_is_superseded(walk: Walk) -> None:
    """It is open for reading in passthrough, another process opens it for writing, the copy-up still runs."""
    walked = walk()
    node = walked.in_order()[4]
    old, _ = walked.union.lookup(node, b"one") or (node, None)
    old.lookups += 1
    walked.walk(4)
    new = walked.union.nodes.supersede(old)
    walked.list(node)
    assert walked.ahead.used == 2
    assert (old.lookups, new.lookups) == (1, 1)


@pytest.mark.parametrize("stays", [True, False])
def test_times_of_access(walk: Walk, stays: bool) -> None:
    """Known names may have been read in between, if the lower's filesystem records access times."""
    walked = walk()
    walked.union.stack.layers[-1].atime_stays = stays
    node = walked.in_order()[4]
    child, _ = walked.union.lookup(node, b"one") or (node, None)
    child.lookups += 1
    walked.walk(4)
    walked.list(node)
    assert walked.ahead.used == (3 if stays else 2)
    assert child.lookups == 2


def test_the_look_at_the_upper_fails(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the prepared listing is dropped."""
    walked = walk()
    node = walked.walk(4)
    CopyUp(walked.union).directory(node)
    with monkeypatch.context() as patched:
        patched.setattr(Merge, "shows_only_lowers", Mock(side_effect=OSError(24, "too many open files")))
        with pytest.raises(OSError, match="too many"):
            walked.list(node)
    walked.list(walked.in_order()[8])
    assert not node.children


def test_a_copy_up_makes_it_useless(walk: Walk) -> None:
    walked = walk()
    node = walked.walk(4)
    copy_up(walked.union, get(walked.union, f"{node.name.decode()}/one"))
    assert node.in_place
    walked.list(node)
    assert walked.ahead.used == 2
    # and the prediction becomes more careful
    for other in walked.in_order()[5:]:
        walked.list(other)
    assert walked.ahead.begun == 3


def test_it_is_copied_up_itself(walk: Walk) -> None:
    """This changes no entry."""
    asked, walked = walk(upper=False), walk()
    node = walked.walk(4)
    CopyUp(walked.union).directory(node)
    assert walked.list(node) == asked.list(asked.in_order()[4])
    assert walked.ahead.used == 3
    assert [child.lookups for child in (node.children or {}).values()] == [1, 1, 1]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_it_is_renamed(walk: Walk, elsewhere: bool) -> None:
    """In another parent the number of ``..`` is another one."""
    walked = walk()
    node, root = walked.walk(4), walked.union.nodes.root
    parent = walked.in_order()[0] if elsewhere else root
    Changes(walked.union).rename(root, node.name, parent, b"renamed", 0)
    answer = walked.list(node)
    assert walked.ahead.used == (2 if elsewhere else 3)
    assert answer == walked.list(node)


def test_a_smaller_answer(walk: Walk) -> None:
    asked, walked = walk(upper=False), walk()
    node = walked.walk(4)
    assert walked.list(node, 400) == asked.list(asked.in_order()[4], 400)
    assert walked.ahead.used == 2


@pytest.mark.parametrize("error", [OSError(5, "an error"), RuntimeError("a bug")], ids=["error", "bug"])
def test_it_fails(walk: Walk, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Then the result is as without preparation."""
    asked, walked = walk(upper=False), walk()
    for node in walked.in_order()[:4]:
        walked.list(node)

    def fail(*arguments: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Merged, "lookup", fail)
        walked.prepare_all()
    node = walked.in_order()[4]
    assert not node.children
    assert walked.list(node) == asked.list(asked.in_order()[4])
    assert walked.ahead.used == 2


def test_what_is_bound_is_not_prepared(walk: Walk, tmp_path: Path) -> None:
    """Others change it at any time, so the whole directory is listed on request."""
    (tmp_path / "host").mkdir()
    walked = walk()
    node = walked.in_order()[4]
    show(walked.union, f"{node.name.decode()}/two", tmp_path / "host")
    assert walked.walk(4) is node
    walked.list(node)
    assert walked.ahead.used == 2
    assert walked.ahead.begun == 3  # nor is the bound directory itself, the next one
