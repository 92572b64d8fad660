"""Nodes that supersede others, and nodes without a name: ids, successors and lookup counts."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.unit.test_union_bound import show
from tests.unit.union_support import ME, OpenUnion, copy_up, find, get, open_union
from unionfs.core.files import Handle
from unionfs.core.node import Node
from unionfs.core.nodes import ROOT_ID, Stored
from unionfs.fuse.direct.nodeio import NodeIos
from unionfs.fuse.protocol import Init, Privileges, Settings, negotiate
from unionfs.fuse.protocol.requests import InitRequest
from unionfs.settings.features import Features
from unionfs.union.changes import Changes
from unionfs.union.layers import LayerStack
from unionfs.union.setids import Process
from unionfs.union.tree import Union

__all__ = ["open_union"]


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    (tmp_path / "l0/d").mkdir(parents=True)
    (tmp_path / "l0/f").write_bytes(b"lower")
    (tmp_path / "l0/d/g").write_bytes(b"lower")
    return tmp_path / "l0"


def _known(union: Union, path: str, lookups: int = 1) -> Node:
    node = get(union, path)
    node.lookups += lookups
    return node


def test_the_old_id_leads_to_the_new_node(lower: Path, open_union: OpenUnion) -> None:
    union = open_union()
    nodes = union.nodes
    old = _known(union, "d/g")
    copy_up(union, old)
    new = nodes.supersede(old)
    assert new.id != old.id
    assert new.ino == old.ino
    assert nodes.get(old.id) is nodes.get(new.id) is new
    assert nodes.named(old.id) is old
    assert get(union, "d/g") is new
    assert union.attributes(new).ino == new.ino
    newer = nodes.supersede(new)
    assert nodes.get(old.id) is nodes.get(new.id) is newer
    assert len({old.id, new.id, newer.id}) == 3


@pytest.mark.parametrize("first", ["old", "new"])
def test_both_are_given_back(lower: Path, open_union: OpenUnion, first: str) -> None:
    """In either order of the kernel's FORGETs; the name then leads to a new node."""
    union = open_union()
    nodes = union.nodes
    old = _known(union, "d/g", 3)
    directory = get(union, "d")
    copy_up(union, old)
    new = nodes.supersede(old)
    new.lookups += 2
    order = [(old, 3), (new, 2)] if first == "old" else [(new, 2), (old, 3)]
    nodes.forget(*order[0])
    assert nodes.get(new.id) is new  # the old one leads to it, or it is itself known
    assert (nodes.named(old.id) is None) == (first == "old")
    nodes.forget(*order[1])
    assert nodes.named(old.id) is nodes.named(new.id) is None
    assert directory.children == {} or nodes.named(directory.id) is None
    assert len(nodes) == 1
    assert get(union, "d/g").ino == old.ino


def test_a_chain_is_given_back(lower: Path, open_union: OpenUnion) -> None:
    union = open_union()
    nodes = union.nodes
    chain = [_known(union, "f")]
    copy_up(union, chain[0])
    for _ in range(5):
        chain.append(nodes.supersede(chain[-1]))
        chain[-1].lookups += 1
    assert all(nodes.get(node.id) is chain[-1] for node in chain)
    for node in (chain[2], chain[5], chain[0], chain[4], chain[1], chain[3]):
        nodes.forget(node, 1)
    assert len(nodes) == 1
    assert find(union, "f") is not None


def test_open_files_keep_the_old_one(lower: Path, open_union: OpenUnion) -> None:
    union = open_union()
    nodes = union.nodes
    old = _known(union, "f")
    handles = old.in_use().handles
    handles.append(object())  # type: ignore[arg-type]
    copy_up_free = nodes.supersede(old)
    copy_up_free.lookups += 1
    nodes.forget(old, 1)
    nodes.forget(copy_up_free, 1)
    assert nodes.named(old.id) is old
    assert nodes.get(old.id) is copy_up_free
    handles.clear()
    nodes.forget(old, 0)
    assert len(nodes) == 1


def test_further_names_go_along(lower: Path, open_union: OpenUnion) -> None:
    """Hard links: every name leads to the new node, and to the one object in the upper."""
    union = open_union()
    nodes, changes = union.nodes, Changes(union)
    old = _known(union, "f")
    copy_up(union, old)
    changes.link(old, get(union, "d"), b"link")
    new = nodes.supersede(old)
    new.lookups += 1
    assert get(union, "f") is get(union, "d/link") is new
    assert old.links is None
    changes.unlink(nodes.root, b"f")
    assert union.attributes(new).nlink == 1
    changes.unlink(get(union, "d"), b"link")
    assert union.attributes(new).nlink == 0
    held = new.held
    assert held >= 0
    nodes.forget(old, 1)
    nodes.forget(new, 1)
    assert new.held == -1
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(held)


def test_superseded_after_its_name_was_gone(lower: Path, open_union: OpenUnion) -> None:
    """The new node takes over the held fd, which is closed once."""
    union = open_union()
    nodes, changes = union.nodes, Changes(union)
    old = _known(union, "f")
    changes.unlink(nodes.root, b"f")
    assert old.held >= 0
    new = nodes.supersede(old)
    assert (old.held, new.unlinked) == (-1, True)
    assert union.attributes(new).st.st_size == 5
    new.lookups += 1
    nodes.forget(new, 1)
    assert union.attributes(new).nlink == 0
    nodes.forget(old, 1)
    assert new.held == -1
    assert len(nodes) == 1


def test_a_node_without_a_name(open_union: OpenUnion, tmp_path: Path) -> None:
    """Known only by its id until it gets a name; released with its fd."""
    union = open_union()
    changes, nodes = Changes(union), union.nodes
    node, attributes, fd = changes.tmpfile(nodes.root, 0o600, ME, 0)
    try:
        assert (attributes.nlink, node.unlinked) == (0, True)
        assert nodes.get(node.id) is node
        assert nodes.root.children == {}
        node.lookups += 1
        os.write(fd, b"data")
        changes.link(node, nodes.root, b"name")
        node.lookups += 1
        assert union.attributes(node).nlink == 1
        assert node.held == -1
        assert get(union, "name") is node
        assert (tmp_path / "upper/name").read_bytes() == b"data"
        changes.link(node, nodes.root, b"more")
        assert get(union, "more") is node
        assert union.attributes(node).nlink == 2
        changes.unlink(nodes.root, b"name")
        assert get(union, "more") is node
        changes.unlink(nodes.root, b"more")
        assert union.attributes(node).nlink == 0
    finally:
        os.close(fd)
    nodes.forget(node, 2)
    assert len(nodes) == 1
    assert node.held == -1


def test_a_node_without_a_name_that_never_gets_one(open_union: OpenUnion) -> None:
    union = open_union()
    changes, nodes = Changes(union), union.nodes
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        node, _, fd = changes.tmpfile(nodes.root, 0o600, ME, os.O_EXCL)
        node.lookups += 1
        os.close(fd)
        nodes.forget(node, 1)
    assert len(nodes) == 1
    assert nodes.get(ROOT_ID) is nodes.root
    assert len(os.listdir("/proc/self/fd")) == before


def test_how_long_attributes_last(lower: Path, tmp_path: Path, open_union: OpenUnion) -> None:
    """Those of a lower's file with several names do not: a copy-up of another name changes its link count.
    Storage can change behind the union's back."""
    os.link(lower / "f", lower / "hard")
    (tmp_path / "storage").mkdir()
    with_index = open_union()
    bound = show(with_index, "d", tmp_path / "storage")
    lasting = {name: with_index.attributes(get(with_index, name)).lasting for name in ("f", "hard", "d")}
    assert lasting == {"f": True, "hard": True, "d": False}
    assert with_index.attributes(bound).lasting is False
    with_index.close()
    with_index.stack.close()
    paths = [str(tmp_path / name) for name in ("l0", "upper", "work")]
    features = Features(index="off")
    with (
        closing(LayerStack.open(paths[:1], *paths[1:], userxattr=True, features=features)) as stack,
        closing(Union(stack)) as union,
    ):
        lasting = {name: union.attributes(get(union, name)).lasting for name in ("f", "hard", "d", "d/g")}
        assert lasting == {"f": False, "hard": False, "d": True, "d/g": True}
        copy_up(union, get(union, "f"))
        assert union.attributes(get(union, "f")).lasting is True


@pytest.mark.parametrize("maps", [False, True])
def test_attributes_while_a_file_is_written_in_passthrough(
    lower: Path, open_union: OpenUnion, maps: bool
) -> None:
    """The kernel writes without the daemon. A mapping tells nobody of its stores, and outlives the close."""
    union = open_union()
    copy_up(union, get(union, "f"))
    node = get(union, "f")
    offered = InitRequest.of(major=7, minor=45, max_readahead=1 << 17, flags=int(sum(Init)))
    privileges = Privileges(initial_user_namespace=True, sys_admin=True)
    ios = NodeIos(-1, negotiate(offered, Settings(), privileges))
    file = union.files.lend(node, write=True)
    handle = Handle(file, Process(0, 0, 0), writes=True, maps=maps, node=node)

    def lasts() -> float:
        timeout = ios.valid(node, union.attributes(node))
        return timeout[0] + timeout[1] / 10**9

    forever = lasts()
    use = node.in_use()
    use.passes_through(3, of_upper=True)
    use.opened(handle)
    while_open = lasts()
    mapping = mmap.mmap(file.fd, 1)
    assert use.closed(handle) == 3
    while_mapped = lasts()
    union.files.take_back(node, file)
    while_mapped_alone = lasts()
    mapping.close()
    assert while_open < 1 < forever
    if not maps:
        assert while_mapped == while_mapped_alone == forever
        return
    assert while_open == while_mapped == while_mapped_alone == 0
    assert lasts() == 0  # from before it was known that nobody has a mapping
    assert lasts() == forever


def test_only_a_file_that_stays_open_is_reported_when_forgotten(
    lower: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fds of a directory, and the use of any node, end without a call of Python code."""
    union = open_union()
    dropped: list[Node] = []
    end = union.files.gone

    def gone(node: Node) -> None:
        dropped.append(node)
        end(node)

    monkeypatch.setattr(union.files, "gone", gone)
    kept, opened = _known(union, "f"), _known(union, "d/g")
    directory = _known(union, "d")
    (part,) = directory.parts
    assert part.fd >= 0
    file = union.files.keep(kept, write=False)
    union.files.take_back(opened, union.files.lend(opened, write=False))
    assert opened.use is not None
    for node in (kept, opened, directory):
        union.nodes.forget(node, 1)
    assert dropped == [kept]
    assert (file.is_open, part.fd, kept.use, opened.use) == (False, -1, None, None)
    assert list(union.nodes) == [union.nodes.root]


def test_a_held_object_that_cannot_be_examined(
    lower: Path, open_union: OpenUnion, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel forgets it all the same, and nobody could be told of an error."""
    union = open_union()
    nodes = union.nodes
    node = _known(union, "d/g")
    copy_up(union, node)
    nodes.copied_up(node, os.stat(union.require_upper().path + "/d/g"), Stored.UNKNOWN)
    directory = get(union, "d")
    Changes(union).unlink(directory, b"g")
    assert node.held >= 0
    os.close(node.held)
    nodes.forget(node, node.lookups)
    assert nodes.get(node.id) is None
    assert node.held == -1
    assert "Bad file descriptor" in caplog.text


def test_objects_are_somewhere(lower: Path, open_union: OpenUnion) -> None:
    """Compiled code takes the first real directory of an object for granted."""
    union = open_union()
    root, st = union.nodes.root, os.stat(lower / "f")
    assert union.merge.search([], b"f") is None
    assert not union.merge.is_visible_below([], b"f")
    assert union.merge.search(root.parts, b"f", -9) is not None
    assert union.merge.search(root.parts, b"f", 9) is None
    calls: list[Callable[[], object]] = [
        lambda: Node(99, root.territory, root, b"f", stat.S_IFREG, []),
        lambda: Node(99, root.territory, root, b"f", stat.S_IFDIR, []),
        lambda: root.has_parts([]),
        lambda: union.nodes.add(root, b"f", st, []),
        lambda: union.nodes.number(b"f", st, []),
        lambda: union.nodes.add_root(root.territory, []),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="one real directory at least"):
            call()
