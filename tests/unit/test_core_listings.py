"""Answers to READDIR and READDIRPLUS: the same bytes as the Python form, `protocol_reference`."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.protocol.protocol_reference import NO_ENTRY, attribute_values
from tests.unit.protocol.protocol_reference import Dirents as Specified
from tests.unit.test_union_bound import show
from tests.unit.test_union_metacopy import metacopy
from tests.unit.union_support import OpenUnion, copy_up, get, whiteout
from tests.unit.union_support import open_union as open_union
from unionfs.core.entries import Entries
from unionfs.core.listings import Dirents, Lister
from unionfs.core.node import Node
from unionfs.core.nodes import Stored
from unionfs.core.territory import Territory
from unionfs.core.validity import valid
from unionfs.fuse.protocol import FOREVER, NEVER
from unionfs.settings.shown import Shown
from unionfs.union.changes import Changes
from unionfs.union.layers import LayerStack
from unionfs.union.tree import Union

NAMES = st.binary(max_size=1100).filter(lambda name: 0 not in name)
WORDS = st.integers(0, 2**64 - 1)
SMALL = st.integers(0, 2**32 - 1)
TIMES = st.integers(-(2**62), 2**62)
MODES = st.sampled_from([0, stat.S_IFREG | 0o4755, stat.S_IFDIR, stat.S_IFCHR, stat.S_IFLNK, 0o170000])
LIMITS = st.integers(0, 4096)
ENTRY_SIZE = 128
Values = tuple[bytes, int, int, int, list[int], list[int], int, bool]


class Somewhere(Territory):
    """A territory without objects."""


def tried(add: Callable[[], bool]) -> bool | None:
    """The result; None for an invalid name."""
    try:
        return add()
    except ValueError:
        return None


@given(st.lists(st.tuples(NAMES, WORDS, WORDS, MODES), max_size=20), LIMITS, st.booleans())
def test_entries_without_nodes(given_: list[tuple[bytes, int, int, int]], limit: int, plus: bool) -> None:
    one, other = Dirents(limit), Specified(limit)
    for name, ino, off, mode in given_:
        if plus:
            expected = tried(lambda: other.add_plus(name, ino, off, mode, NO_ENTRY))  # noqa: B023
        else:
            expected = tried(lambda: other.add(name, ino, off, mode))  # noqa: B023
        assert tried(lambda: one.add(name, ino, off, mode, plus=plus)) == expected  # noqa: B023
        assert one.size == other.size
    assert one.packed() == other.packed()


def node_of(number: int, generation: int, *, lasting: bool = True) -> Node:
    territory = Somewhere(lasting=lasting, has_markers=True, read_only=False)
    places = [None]
    return Node(number, territory, None, b"", stat.S_IFREG, places, generation=generation)  # type: ignore[arg-type]


def result_of(values: list[int], times: list[int], mode: int) -> os.stat_result:
    ino, dev, nlink, size, blocks, rdev = values
    return os.stat_result(
        (mode, ino, dev, nlink, 1, 2, size >> 1, 0, 0, 0),
        {
            "st_atime_ns": times[0], "st_mtime_ns": times[1], "st_ctime_ns": times[2],
            "st_blksize": 4096, "st_blocks": blocks >> 1, "st_rdev": rdev,
        },
    )  # fmt: skip


@given(
    st.lists(
        st.tuples(
            NAMES, WORDS, WORDS, SMALL, st.lists(SMALL, min_size=6, max_size=6),
            st.lists(TIMES, min_size=3, max_size=3), MODES, st.booleans(),
        ),
        max_size=10,
    ),
    LIMITS,
)  # fmt: skip
def test_entries_with_nodes(given_: list[Values], limit: int) -> None:
    one, other = Dirents(limit), Specified(limit)
    for name, off, number, generation, values, times, mode, lasting in given_:
        node = node_of(number or 1, generation, lasting=lasting)
        found = node.attributes_of(result_of(values, times, mode))
        expected: bool | None = False
        if other.fits_plus(name):
            packed = attribute_values(found.st, found.ino, found.nlink, found.ctime_ns)
            arguments = (
                name, off, node.id, generation, FOREVER if lasting else NEVER,
                FOREVER if found.lasting else NEVER, packed,
            )  # fmt: skip
            expected = tried(lambda: other.add_found(*arguments) is None)  # type: ignore[func-returns-value] # noqa: B023
        assert tried(lambda: one.add_node(name, off, found)) == expected  # noqa: B023
        assert one.size == other.size
    nodes = one.nodes
    one.sent()
    assert all(node.lookups == 1 for node in nodes)
    assert one.packed() == other.packed()


def test_an_answer_is_not_extended_after_it_was_packed() -> None:
    answer = Dirents(4096)
    assert answer.add(b"name", 1, 1, stat.S_IFREG)
    data = answer.packed()
    assert not answer.add(b"name", 1, 1, stat.S_IFREG)
    assert len(data) == 32


# -- whole directories ------------------------------------------------------------------------------------


def lister(union: Union) -> Lister:
    return Lister(union.nodes, union.merge, union.number_of_unreachable)


def number_listed(union: Union, node: Node) -> int:
    """The number of the only name in a directory, listed without attributes."""
    answer = Dirents(4096)
    assert lister(union).add_names(node, node.territory.listing(node).entries(), 0, answer) == 1
    (number,) = struct.unpack_from("=Q", answer.packed())
    assert isinstance(number, int)
    return number


def specified_names(union: Union, node: Node, entries: Entries) -> bytes:
    """READDIR, each name looked up by its territory."""
    answer = Specified(1 << 20)
    for index in range(len(entries)):
        name = entries.name(index)
        try:
            found = node.territory.number(node, name)
        except OSError:
            found = union.number_of_unreachable(node, name)
        else:
            found = found or node.territory.number_of_bare_whiteout(node, name)
        if found is not None:
            answer.add(name, found[0], entries.cookie(index), found[1])
    return answer.packed()


def specified_nodes(union: Union, node: Node, entries: Entries) -> bytes:
    """READDIRPLUS, each name looked up by its territory."""
    answer = Specified(1 << 20)
    for index in range(len(entries)):
        name, cookie = entries.name(index), entries.cookie(index)
        try:
            found = node.territory.lookup(node, name)
        except OSError:
            unknown = union.number_of_unreachable(node, name)
        else:
            if found is not None:
                child, attributes = found
                packed = attribute_values(
                    attributes.st, attributes.ino, attributes.nlink, attributes.ctime_ns
                )
                answer.add_found(
                    name, cookie, child.id, child.generation, FOREVER if child.territory.lasting else NEVER,
                    valid(child, attributes.lasting), packed,
                )  # fmt: skip
                continue
            unknown = node.territory.number_of_bare_whiteout(node, name)
        if unknown is not None:
            answer.add_plus(name, unknown[0], cookie, unknown[1], NO_ENTRY)
    return answer.packed()


def records(answer: bytes | bytearray, *, plus: bool) -> list[tuple[bytes, bytes]]:
    """Each name with its record, without the generation, which differs from union to union, and without the
    access time."""
    found, at, before = [], 0, ENTRY_SIZE if plus else 0
    while at < len(answer):
        ino, off, length, kind = struct.unpack_from("=QQII", answer, at + before)
        entry = bytearray(answer[at : at + before])
        entry[8:16] = entry[64:72] = bytes(8 if plus else 0)
        entry[88:92] = bytes(4 if plus else 0)
        found.append(
            (bytes(answer[at + before + 24 :][:length]), bytes(entry) + repr((ino, off, kind)).encode())
        )
        at += (before + 24 + length + 7) & ~7
    return found


def everything(top: Path) -> None:
    """Objects of all types in ``d`` of three layers, with markers of all kinds."""
    for layer in ("upper", "l0", "l1"):
        (top / layer / "d/sub").mkdir(parents=True)
        for name in ("file", f"in-{layer}"):
            (top / layer / "d" / name).write_text(layer)
        (top / layer / "d/empty").touch()
    low = top / "l1/d"
    for name in ("hidden", "removed", "bare", "marked", "linked", "copied", "known"):
        (low / name).write_text(name)
    os.link(low / "linked", low / "linked-too")
    os.symlink("target", low / "symlink")
    os.mkfifo(low / "fifo")
    os.mknod(low / "device", stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(low / "block", stat.S_IFBLK, os.makedev(7, 3))
    whiteout(top / "upper/d/hidden")
    (top / "l0/d/.wh.removed").touch()
    (top / "l0/d/bare").touch()
    os.setxattr(top / "l0/d/bare", "user.overlay.whiteout", b"y")
    os.link(top / "upper/d/in-upper", top / "upper/d/linked-upper")
    (top / "upper/d/redirected").mkdir()
    os.setxattr(top / "upper/d/redirected", "user.overlay.redirect", b"a/b")


def marked(top: Path) -> None:
    """The same in a directory that hides xattr whiteouts."""
    everything(top)
    os.setxattr(top / "l0/d", "user.overlay.opaque", b"x")
    (top / "l0/d/marked").touch()
    os.setxattr(top / "l0/d/marked", "user.overlay.whiteout", b"y")


def with_metacopy(top: Path) -> None:
    everything(top)
    (top / "l1/d/data").write_text("some data")
    metacopy(top / "upper/d/data")


@pytest.mark.skipif(os.geteuid() != 0, reason="devices need root")
@pytest.mark.parametrize("make", [everything, marked, with_metacopy])
@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("looked_up", [(), (b"known", b"sub", b"linked", b"in-upper")], ids=["new", "known"])
def test_whole_directories(
    tmp_path: Path, open_union: OpenUnion, make: Callable[[Path], None], upper: bool, looked_up: tuple[bytes]
) -> None:
    for name in ("l0", "l1", "upper", "work"):
        (tmp_path / name).mkdir()
    make(tmp_path)

    def prepared(union: Union) -> tuple[Union, Node, Entries]:
        union.markers.follows_metacopy = True
        node = get(union, "d")
        for name in looked_up:
            union.lookup(node, name)
        return union, node, node.territory.listing(node).entries()

    first = open_union(2, upper=upper)
    union, node, entries = prepared(first)
    plain = specified_names(union, node, entries)
    plus = specified_nodes(union, node, entries)
    union, node, entries = prepared(Union(first.stack))
    names, nodes = Dirents(1 << 20), Dirents(1 << 20)
    assert lister(union).add_names(node, entries, 0, names) == len(entries)
    assert set(node.children or {}) == {name for name in looked_up if upper or name != b"in-upper"}
    assert lister(union).add_nodes(node, entries, 0, nodes) == len(entries)
    assert records(nodes.packed(), plus=True) == records(plus, plus=True)
    bare = {b"bare"}  # which has the number of its marker, as good as any
    assert [one for one in records(names.packed(), plus=False) if one[0] not in bare] == [
        one for one in records(plain, plus=False) if one[0] not in bare
    ]
    union.close()
    shown = {name for name, _ in records(plain, plus=False)}
    assert {name for name, _ in records(plus, plus=True)} == shown
    assert b"removed" not in shown
    assert (b"marked" in shown) is (make is not marked)
    assert (b"hidden" in shown) is not upper


def test_names_are_not_looked_up(tmp_path: Path, open_union: OpenUnion) -> None:
    """Their directory entries have number and type; those of subdirectories need a lookup."""
    (tmp_path / "l0/d/sub").mkdir(parents=True)
    (tmp_path / "l0/d/file").touch()
    number = os.stat(tmp_path / "l0/d/file").st_ino
    union = open_union()
    node = get(union, "d")
    entries = node.territory.listing(node).entries()
    (tmp_path / "l0/d/sub").rmdir()
    (tmp_path / "l0/d/file").unlink()
    answer = Dirents(4096)
    lister(union).add_names(node, entries, 0, answer)
    expected = Specified(4096)
    expected.add(b"file", number, entries.cookie(entries.names().index(b"file")), stat.S_IFREG)
    assert answer.packed() == expected.packed()


def test_copies_have_the_numbers_of_their_origins(tmp_path: Path, open_union: OpenUnion) -> None:
    (tmp_path / "l0/d").mkdir(parents=True)
    (tmp_path / "l0/d/file").write_text("lower")
    number = os.stat(tmp_path / "l0/d/file").st_ino
    union = open_union()
    copy_up(union, get(union, "d/file"))
    union = Union(union.stack)  # in which it is not known
    assert number_listed(union, get(union, "d")) == number
    union.close()


def test_a_number_that_another_object_has(tmp_path: Path, open_union: OpenUnion) -> None:
    """A file that lost its name keeps its number until it is forgotten; its inode is used again."""
    (tmp_path / "l0/d").mkdir(parents=True)
    (tmp_path / "l0/d/file").touch()
    union = open_union()
    node = get(union, "d")
    st_ = os.stat(tmp_path / "l0/d/file")
    other = union.nodes.add(union.nodes.root, b"other", st_, [union.nodes.root.parts[0]])
    assert other.id == st_.st_ino
    shown = number_listed(union, node)
    file = get(union, "d/file")
    assert other.ino != shown == file.ino
    # a known node keeps its number
    union.nodes.forget(other, 0)
    assert number_listed(union, node) == shown


@pytest.mark.parametrize("how", ["a copy whose origin is not stored", "another name is known"])
def test_an_upper_object_with_a_known_number(tmp_path: Path, open_union: OpenUnion, how: str) -> None:
    for name in ("l0/other", "upper/d/file"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.link(tmp_path / "upper/d/file", tmp_path / "upper/linked")
    union = open_union()
    node, other = get(union, "d"), get(union, "other")
    (tmp_path / "upper/linked").unlink()
    st_ = os.stat(tmp_path / "upper/d/file")
    if how == "another name is known":
        os.link(tmp_path / "upper/d/file", tmp_path / "upper/linked")
        union.nodes.linked(other, st_)
    else:
        union.nodes.copied_up(other, st_, Stored.UNKNOWN)
        union.nodes.forget(other, 0)
    assert number_listed(union, node) == other.ino != st_.st_ino


def test_another_filesystem(tmp_path: Path) -> None:
    """The numbers of its objects tell that they are from there."""
    with TemporaryDirectory(dir="/dev/shm") as elsewhere:
        top = Path(elsewhere)
        if top.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("there is only one filesystem")
        (top / "d").mkdir()
        (tmp_path / "d").mkdir()
        (top / "d/file").touch()
        stack = LayerStack.open([elsewhere, str(tmp_path)], None, None, userxattr=True)
        union = Union(stack)
        node = get(union, "d")
        assert number_listed(union, node) == get(union, "d/file").ino != (top / "d/file").stat().st_ino
        union.close()
        stack.close()


def test_types_in_xattrs(tmp_path: Path) -> None:
    """The type of a file is another one than that of its directory entry."""
    for layer in ("low", "top"):
        (tmp_path / layer / "d").mkdir(parents=True)
        os.setxattr(tmp_path / layer, "user.containers.override_stat", b"0:0:755:dir")
    for name, value in ((b"pipe", b"1:2:644:pipe"), (b"file", b"1:2:4711")):
        path = os.fsencode(tmp_path / "top/d") + b"/" + name
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        os.setxattr(path, "user.containers.override_stat", value)
    (tmp_path / "upper").mkdir()
    (tmp_path / "work").mkdir()
    stack = LayerStack.open(
        [str(tmp_path / "top"), str(tmp_path / "low")], str(tmp_path / "upper"), str(tmp_path / "work"),
        userxattr=True, shown=Shown(permissions=2),
    )  # fmt: skip
    union = Union(stack)
    node = get(union, "d")
    entries = node.territory.listing(node).entries()
    answer = Dirents(4096)
    lister(union).add_names(node, entries, 0, answer)
    assert answer.packed() == specified_names(union, node, entries)
    for _ in ("new", "known"):
        answer = Dirents(4096)
        lister(union).add_nodes(node, entries, 0, answer)
        assert answer.packed() == specified_nodes(union, node, entries)
    kinds = {child.name: child.kind for child in answer.nodes}
    assert kinds == {b"pipe": stat.S_IFIFO, b"file": stat.S_IFREG}
    union.close()
    stack.close()


def test_a_name_that_was_copied_up_since(tmp_path: Path, open_union: OpenUnion) -> None:
    """In an earlier listing the topmost part that has it is another one."""
    (tmp_path / "l0/d").mkdir(parents=True)
    (tmp_path / "upper/d").mkdir(parents=True)
    (tmp_path / "l0/d/file").write_text("lower")
    union = open_union()
    node = get(union, "d")
    entries = node.territory.listing(node).entries()
    assert entries.part(0) == 1
    (tmp_path / "upper/d/file").write_text("upper's")
    entries.later()
    answer = Dirents(4096)
    lister(union).add_nodes(node, entries, 0, answer)
    assert [child.in_place for child in answer.nodes] == [True]


def test_what_is_bound(tmp_path: Path, open_union: OpenUnion) -> None:
    for name in ("l0/at/below", "host/sub"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "host/file").touch()
    (tmp_path / "host/.wh.file").touch()
    first = open_union()
    show(first, "at", tmp_path / "host")
    other = Union(first.stack)
    other.bind(other.nodes.root, b"at", first.stack.bound[0])
    answers = []
    for union, specified in ((first, True), (other, False)):
        for node in (union.nodes.root, get(union, "at")):
            entries = node.territory.listing(node).entries()
            names, nodes = Dirents(4096), Dirents(4096)
            lister(union).add_names(node, entries, 0, names)
            if specified:
                assert names.packed() == specified_names(union, node, entries)
                answers.append(records(specified_nodes(union, node, entries), plus=True))
            else:
                lister(union).add_nodes(node, entries, 0, nodes)
                answers.append(records(nodes.packed(), plus=True))
    other.close()
    assert answers[:2] == answers[2:]
    assert {name for name, _ in answers[1]} == {b"file", b"sub", b".wh.file"}


def test_an_answer_that_is_full(tmp_path: Path, open_union: OpenUnion) -> None:
    """What does not fit is not looked up."""
    (tmp_path / "l0/d").mkdir(parents=True)
    for number in range(20):
        (tmp_path / f"l0/d/n{number:02}").touch()
    union = open_union()
    node = get(union, "d")
    entries = node.territory.listing(node).entries()
    answer = Dirents(160 * 7 + 20)
    assert lister(union).add_nodes(node, entries, 3, answer) == 10
    assert list(node.children or {}) == entries.names()[3:10] == [child.name for child in answer.nodes]
    assert lister(union).add_nodes(node, entries, 10, answer) == 10
    assert lister(union).add_names(node, entries, 19, Dirents(4096)) == 20
    assert lister(union).add_names(node, entries, 25, Dirents(4096)) == 25


def test_a_file_in_the_place_of_a_known_one(tmp_path: Path, open_union: OpenUnion) -> None:
    """Another process replaces it in a layer: it is another node, as in a lookup."""
    (tmp_path / "l0/d").mkdir(parents=True)
    (tmp_path / "l0/d/file").write_text("old")
    union = open_union()
    node, old = get(union, "d"), get(union, "d/file")
    (tmp_path / "new").write_text("new one")
    (tmp_path / "new").rename(tmp_path / "l0/d/file")
    answer = Dirents(4096)
    lister(union).add_nodes(node, node.territory.listing(node).entries(), 0, answer)
    assert [child.name for child in answer.nodes] == [b"file"]
    assert answer.nodes[0] is not old


def test_a_name_that_was_removed(tmp_path: Path, open_union: OpenUnion) -> None:
    (tmp_path / "l0/d").mkdir(parents=True)
    (tmp_path / "l0/d/file").touch()
    union = open_union()
    node = get(union, "d")
    entries = node.territory.listing(node).entries()
    get(union, "d/file")
    Changes(union).unlink(node, b"file")
    entries.later()
    answer = Dirents(4096)
    assert lister(union).add_nodes(node, entries, 0, answer) == 1
    assert answer.packed() == b""
