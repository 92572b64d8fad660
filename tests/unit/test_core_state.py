"""What a daemon leaves for another one: records of nodes, and a change of names that was in progress."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

from tests.support.world import errno_of
from tests.unit.union_support import ME, OpenUnion, close_nodes, copy_up
from tests.unit.union_support import open_union as open_union
from unionfs.core.files import Handle
from unionfs.core.memo import Memo, Wanted
from unionfs.core.node import Node
from unionfs.core.restoring import Restoring
from unionfs.core.setting import Change
from unionfs.core.state import State, StateError
from unionfs.core.steps import set_hook
from unionfs.fuse.direct import former
from unionfs.fuse.operations import Operations
from unionfs.fuse.protocol import requests as rq
from unionfs.sys import calls
from unionfs.union import origin
from unionfs.union.shortcuts import Shortcuts
from unionfs.union.tree import Union

LONG = [b"n" * length for length in (1, 17, 18, 19, 69, 70, 71, 122, 255)]
CLONE_FILES = 0x400
RESENT = 1 << 63


class Daemons:
    """Unions on the same layers, one after the other."""

    def __init__(self, open_union: OpenUnion) -> None:
        self._open_union = open_union
        self._states: list[State] = []
        self._later: list[Union] = []
        #: What the last one has taken over: open files, backing ids, and those without open files.
        self.taken: tuple[dict[int, tuple[int, Handle]], set[int], set[int]] = {}, set(), set()

    def first(self, *, slow: bool = False) -> Union:
        """A union that records."""
        self._states.append(State())
        return self._open_union(state=self._states[-1], fast_layers=not slow)

    def after(self, union: Union, *, slow: bool = False) -> tuple[Union, Operations]:
        """A union that has taken over what another one knew. ``slow``: at first without its lowers."""
        assert union.state is not None
        self._states.append(State(os.dup(union.state.fd)))
        new = Union(union.stack, state=self._states[-1], shortcuts=Shortcuts(fast_layers=not slow))
        self._later.append(new)
        operations = Operations(new)
        files = new.files
        handles = operations.files.handles
        self.restoring = Restoring(new.nodes, new.stack.layers, handles, files.reopen, files.open_again)
        self.taken = self.restoring.take_over()
        return new, operations

    def close(self) -> None:
        for union in self._later:
            close_nodes(union)
            union.close()
        for state in self._states:
            state.close()


@pytest.fixture
def daemons(open_union: OpenUnion) -> Iterator[Daemons]:
    found = Daemons(open_union)
    yield found
    set_hook(None)
    found.close()


def get(union: Union, path: str) -> Node:
    node = union.nodes.root
    for name in path.split("/"):
        found = union.lookup(node, name.encode())
        assert found is not None, path
        node = found[0]
        node.looked_up()
    return node


def in_a_child(act: Callable[[], object]) -> None:
    """Run it in a child that has the same open files, as a daemon and its holder have,
    but not the same memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = ctypes.c_ulong(CLONE_FILES | signal.SIGCHLD)
    pid = libc.syscall(ctypes.c_long(_clone()), flags, None, None, None, None)
    if pid == 0:
        try:
            act()
        finally:
            os._exit(1)
    assert pid > 0
    os.waitpid(pid, 0)


def _clone() -> int:
    return {"x86_64": 56, "aarch64": 220}[os.uname().machine]


def test_names_of_all_lengths(tmp_path: Path, daemons: Daemons) -> None:
    union = daemons.first()
    ids = {}
    for number, name in enumerate(LONG):
        (tmp_path / "l0" / os.fsdecode(name)).mkdir()
        (tmp_path / "l0" / os.fsdecode(name) / f"f{number}").touch()
        ids[name] = get(union, os.fsdecode(name)).id, get(union, f"{os.fsdecode(name)}/f{number}").id
    assert union.state is not None
    assert len(union.state) == 2 * len(LONG)
    new, _ = daemons.after(union)
    assert len(new.nodes) == 1 + 2 * len(LONG)
    for number, name in enumerate(LONG):
        file = new.nodes.get(ids[name][1])
        assert file is not None
        assert (file.name, file.lookups) == (b"f%d" % number, 1)
        assert file.parent is new.nodes.get(ids[name][0])
        assert get(new, f"{os.fsdecode(name)}/f{number}") is file
        assert file.lookups == 2


def test_slots_are_used_again(tmp_path: Path, daemons: Daemons) -> None:
    union = daemons.first()
    state = union.state
    assert state is not None
    for name in LONG:
        (tmp_path / "l0" / os.fsdecode(name)).touch()
    for _ in range(3):
        nodes = [get(union, os.fsdecode(name)) for name in LONG]
        memory = state.memory
        for node in nodes:
            union.nodes.forget(node, 1)
        assert len(state) == 0
    for name in LONG:
        get(union, os.fsdecode(name))
    assert state.memory == memory


def test_forgotten_without_being_used(tmp_path: Path, daemons: Daemons) -> None:
    """A former node, and its parents, are dropped without a system call."""
    (tmp_path / "l0/d/e").mkdir(parents=True)
    (tmp_path / "l0/d/e/f").touch()
    union = daemons.first()
    ids = [get(union, path).id for path in ("d", "d/e", "d/e/f")]
    new, operations = daemons.after(union)
    for id_, count in zip(ids, (3, 2, 1), strict=True):
        operations.forget(id_, count)
    assert len(new.nodes) == 1
    assert new.state is not None
    assert len(new.state) == 0


@pytest.mark.parametrize("change", [b"other", struct.pack("=I", 77)])
def test_another_version_is_refused(change: bytes) -> None:
    state = State()
    os.pwrite(state.fd, change, 8 if len(change) == 4 else 0)
    copy = os.dup(state.fd)
    with pytest.raises(StateError, match="version"):
        State(copy)
    os.close(copy)
    state.close()


def test_an_xattr_that_a_request_was_to_change() -> None:
    """A request that is sent again has its number with another bit, however often it is sent."""
    state = State()
    for again in (0, RESENT):
        for existed in (True, False):
            state.changes_xattr(77 | again, existed)
            assert state.xattr_existed(77 | RESENT) is existed
            assert state.xattr_existed(77) is None
            assert state.xattr_existed(78 | RESENT) is None
    state.close()


def test_an_object_that_is_another_one(tmp_path: Path, daemons: Daemons) -> None:
    """Its node is stale, and the name gets a new one."""
    union = daemons.first()
    (tmp_path / "upper/a").touch()
    (tmp_path / "upper/b").touch()
    id_ = get(union, "a").id
    os.rename(tmp_path / "upper/b", tmp_path / "upper/a")
    new, _ = daemons.after(union)
    assert new.nodes.get(id_) is None
    assert get(new, "a").id != id_


class Opened(NamedTuple):
    """How a file was opened."""

    name: str
    writes: bool
    maps: bool
    backing_id: int
    unique: int


class Who(NamedTuple):
    """The process that opens one, and the number of its request."""

    uid: int
    gid: int
    pid: int
    unique: int


OPENED = [
    Opened("upper", writes=True, maps=True, backing_id=0, unique=11),
    Opened("upper", writes=True, maps=False, backing_id=0, unique=12),
    Opened("lower", writes=False, maps=False, backing_id=0, unique=13),
    Opened("through", writes=True, maps=True, backing_id=7, unique=14),
    Opened("through", writes=False, maps=False, backing_id=7, unique=15),
]


def test_open_files(tmp_path: Path, daemons: Daemons) -> None:
    """They are as they were opened; those to write can be written."""
    union = daemons.first()
    for name in ("l0/lower", "upper/upper", "upper/through"):
        (tmp_path / name).write_text(name)
    handles = Operations(union).files.handles
    for number, one in enumerate(OPENED, 1):
        node = get(union, one.name)
        if one.backing_id and node.use is None:
            node.in_use().passes_through(one.backing_id, of_upper=True)
        who = Who(0, 0, 1, one.unique | (RESENT if one.writes else 0))
        file = union.files.lend(node, write=one.writes)
        assert handles.register(node, file, who, writes=one.writes, maps=one.maps) == number
        handle = handles.get(number)
        assert handle is not None
        node.in_use().opened(handle)
    _, operations = daemons.after(union)
    opened, backing_ids, kept = daemons.taken
    assert (backing_ids, kept) == ({7}, set())
    assert sorted(opened) == [one.unique for one in OPENED]
    for number, one in enumerate(OPENED, 1):
        handle = operations.files.handles.get(number)
        assert opened[one.unique] == (number, handle)
        assert handle is not None
        assert (handle.writes, handle.maps, handle.through) == (one.writes, one.maps, one.backing_id > 0)
        assert handle.node.name == one.name.encode()
        assert handle.file.read(100, 0).endswith(one.name.encode())
        if one.writes:
            handle.file.write(b"%d" % number, 0)
    assert (tmp_path / "upper/upper").read_text() == "2pper/upper"
    assert (tmp_path / "upper/through").read_text() == "4pper/through"
    use = opened[14][1].node.use
    assert (use.backing_id, use.of_upper, use.through, use.writers, use.mappers) == (7, True, 2, 1, 1)
    use = opened[11][1].node.use
    assert (use.backing_id, use.cached, use.through) == (0, 2, 0)
    assert operations.files.handles.next == len(OPENED) + 1
    fds = {opened[one.unique][1].file.fd for one in OPENED if one.name != "lower"}
    assert operations.files.handles.fds == len(fds)  # a lower's file is closed when there are many
    for number in range(1, len(OPENED) + 1):
        operations.files.handles.release(number)
    assert operations.files.handles.all() == []


def test_open_files_of_a_lower_that_does_not_answer(tmp_path: Path, daemons: Daemons) -> None:
    """They are taken over when a request needs them: one with their number, or one that is sent again."""
    union = daemons.first(slow=True)
    for name in ("f", "g", "h"):
        (tmp_path / "l0" / name).write_text(name)
    handles = Operations(union).files.handles
    for unique, name in enumerate(("f", "g", "h"), 11):
        node = get(union, name)
        file = union.files.lend(node, write=False)
        number = handles.register(node, file, Who(0, 0, 1, unique), writes=False)
        handle = handles.get(number)
        assert handle is not None
        node.in_use().opened(handle)
    _, operations = daemons.after(union, slow=True)
    handles = operations.files.handles
    assert (daemons.taken[0], handles.all()) == ({}, [])
    assert daemons.restoring.opened_by(99) is None
    assert handles.all() == []
    found = daemons.restoring.opened_by(12)
    assert found is not None
    assert (found[0], found[1].node.name, handles.all()) == (2, b"g", [found[1]])
    late = handles.get(3)
    assert late is not None
    assert (late.node.name, late.file.read(9, 0)) == (b"h", b"h")
    assert found[1].file.read(9, 0) == b"g"
    assert handles.get(4) is None
    assert handles.all() == [found[1], late]


PATHS = ("d", "d/e", "d/e/f", "d/own")
SINCE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "nothing": (lambda upper: None, ["d", "d/e", "d/own"]),
    "a directory was made": (lambda upper: (upper / "d/e").mkdir(), ["d", "d/own"]),
    "a file was removed": (lambda upper: (upper / "d/own").unlink(), ["d", "d/e"]),
    "a file was replaced": (
        lambda upper: ((upper / "d/own").unlink(), (upper / "d/own").mkdir()), ["d", "d/e"],
    ),
    "a file was exchanged": (
        lambda upper: ((upper / "d/own").unlink(), (upper / "d/own").symlink_to("f")), ["d", "d/e"],
    ),
    "a directory is gone": (lambda upper: shutil.rmtree(upper / "d"), []),
}  # fmt: skip
"""What happened in the upper, and what the lower need not be asked about then."""


@pytest.mark.parametrize("since", SINCE)
def test_names_of_a_lower_that_does_not_answer(tmp_path: Path, daemons: Daemons, since: str) -> None:
    """Where the upper is as it was, its own files and all directories are found; the others are asked for."""
    (tmp_path / "l0/d/e").mkdir(parents=True)
    (tmp_path / "l0/d/e/f").touch()
    (tmp_path / "upper/d").mkdir(parents=True)
    (tmp_path / "upper/d/own").touch()
    union = daemons.first(slow=True)
    ids = {path: get(union, path).id for path in PATHS}
    change, expected = SINCE[since]
    change(tmp_path / "upper")
    new, _ = daemons.after(union, slow=True)
    found = {}
    for path in PATHS:
        with closing(Memo()) as memo, suppress(Wanted), memo:
            node = new.nodes.get(ids[path])  # none: another object has the name
            if node is not None:
                found[path] = node
    assert list(found) == expected
    parts = {path: [part.layer.index for part in node.parts] for path, node in found.items() if node.is_dir}
    assert parts == {path: [0, 1] if path == "d" else [1] for path in parts}
    if "d/own" in found:
        assert found["d/own"].place is not None
        assert found["d/own"].place.layer.index == 0
    for path, node in found.items():
        lookups = sum(one.startswith(path) for one in PATHS)
        assert (node.name, node.lookups) == (path.rpartition("/")[2].encode(), lookups)


def test_the_number_of_a_copy_whose_origin_is_not_stored(
    tmp_path: Path, daemons: Daemons, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers do not tell it, as of a filesystem without a uuid."""
    monkeypatch.setattr(origin, "filesystem_uuid", lambda fd: None)
    union = daemons.first()
    (tmp_path / "l0/f").write_text("f")
    node = get(union, "f")
    copy_up(union, node)
    number = (tmp_path / "l0/f").stat().st_ino
    assert (node.id, node.ino, node.in_place, node.from_origin) == (number, number, True, False)
    new, _ = daemons.after(union)
    found = new.nodes.get(node.id)
    assert found is not None
    assert (found.id, found.ino, found.in_place, found.lookups) == (number, number, True, 1)
    assert get(new, "f") is found


# -- a change in progress ---------------------------------------------------------------------------------


def _unlink(name: bytes) -> Callable[[Operations, bool], object]:
    def act(operations: Operations, resent: bool) -> None:
        if not (resent and former.is_removed(operations, 1, name)):
            operations.changes.unlink(operations.union.nodes.root, name)

    return act


def _rmdir(operations: Operations, resent: bool) -> None:
    if not (resent and former.is_removed(operations, 1, b"empty")):
        operations.rmdir(1, b"empty")


def _rename(name: bytes, new: bytes, flags: int = 0) -> Callable[[Operations, bool], object]:
    def act(operations: Operations, resent: bool) -> None:
        request = rq.Rename2.of(nodeid=1, name=name, newdir=1, newname=new, flags=flags, unique=RESENT)
        if not (resent and former.is_renamed(operations, request)):
            if flags and operations.union.state is not None:
                operations.union.state.exchanges(RESENT)
            root = operations.union.nodes.root
            assert not operations.changes.rename(root, name, root, new, flags)

    return act


def _mkdir(operations: Operations, resent: bool) -> None:
    if not (resent and former.made(operations, 1, b"made", stat.S_IFDIR)):
        operations.mkdir(1, b"made", 0o755, ME)


CHANGES: dict[str, Callable[[Operations, bool], object]] = {
    "unlink": _unlink(b"a"),
    "unlink of a lower's": _unlink(b"lower"),
    "unlink of a copy": _unlink(b"copy"),
    "rmdir": _rmdir,
    "rename": _rename(b"a", b"new"),
    "rename over another": _rename(b"a", b"b"),
    "rename of a copy": _rename(b"copy", b"b"),
    "rename of a directory": _rename(b"full", b"moved"),
    "exchange": _rename(b"a", b"b", calls.RENAME_EXCHANGE),
    "mkdir": _mkdir,
}


def _fill(tmp_path: Path) -> None:
    for name in ("l0", "upper", "upper/empty", "upper/full"):
        (tmp_path / name).mkdir()
    for name in ("l0/lower", "l0/copy", "upper/copy", "upper/a", "upper/b", "upper/full/f"):
        (tmp_path / name).write_text(name)


def _tree(union: Union) -> dict[str, str]:
    """What the union shows, by looking at all names."""
    found = {}
    for name in ("a", "b", "new", "lower", "copy", "empty", "full", "moved", "made"):
        known = union.lookup(union.nodes.root, name.encode())
        if known is not None:
            found[name] = _content(union, known[0])
    return found


def _content(union: Union, node: Node) -> str:
    if node.is_dir:
        return "directory"
    file = union.files.lend(node, write=False)
    try:
        return os.pread(file.fd, 100, 0).decode()
    finally:
        union.files.take_back(node, file)


def _die_at(step: int) -> None:
    """End this process at that step of a change: a step of a bundle, or behind a renameat2(2) in Python."""
    left = [step]

    def passed(*_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            os._exit(0)

    def rename(*arguments: object) -> None:
        passed()
        original(*arguments)
        passed()

    original: Callable[..., None] = calls.renameat2
    calls.renameat2 = rename
    set_hook(passed)


@pytest.mark.parametrize("what", CHANGES)
def test_killed_during_a_change(tmp_path: Path, daemons: Daemons, what: str) -> None:
    """At each step: afterwards the request, which is sent again, has been carried out once; and each
    node is still the object that it was."""
    _fill(tmp_path)
    change = CHANGES[what]
    expected: dict[str, str] = {}
    for step in range(12):
        for name in ("upper", "work", "l0"):
            _remove(tmp_path / name)
        _fill(tmp_path)
        union = daemons.first()
        operations = Operations(union)
        ids = {path: get(union, path).id for path in ("a", "b", "lower", "copy", "empty", "full", "full/f")}
        contents = {path: _content(union, _node(union, id_)) for path, id_ in ids.items()}

        def die(step: int = step, operations: Operations = operations) -> None:
            _die_at(step)
            change(operations, False)

        if step == 11:
            change(operations, False)
            new = union
        else:
            before = open_files()
            in_a_child(die)
            assert union.state is not None
            for fd in open_files() - before - union.state.files():
                os.close(fd)
            new, operations = daemons.after(union)
            change(operations, True)
        shown = _tree(new)
        expected = expected or _expected(what)
        assert shown == expected, step
        for path, id_ in ids.items():
            assert _content(new, _node(new, id_)) == contents[path], (step, path)


def test_killed_when_a_copied_up_name_was_removed(tmp_path: Path, daemons: Daemons) -> None:
    """Before that was recorded. The object that keeps another name is one of the upper."""
    union = daemons.first()
    (tmp_path / "l0/lower").write_text("lower")
    operations = Operations(union)
    node = get(union, "lower")
    trio.run(operations.setattr, node.id, Change(mode=0o600), None, 0)
    trio.run(operations.link, node.id, 1, b"second", 0)
    name = tmp_path / "upper/lower"

    def die() -> None:
        held = os.open(name, os.O_PATH)
        union.nodes.removing(union.nodes.root, b"lower", node, held)
        name.unlink()
        os.mknod(name, stat.S_IFCHR)
        os._exit(0)

    in_a_child(die)
    new, operations = daemons.after(union)
    _unlink(b"lower")(operations, True)
    found = _node(new, node.id)
    assert found.in_place
    assert new.attributes(found).nlink == os.stat(tmp_path / "upper/second").st_nlink
    assert get(new, "second") is found


@pytest.mark.parametrize("existed", [False, True])
def test_an_xattr_request_that_is_sent_again(tmp_path: Path, daemons: Daemons, existed: bool) -> None:
    """Whether it was carried out or not, the result is that of a single one."""
    union = daemons.first()
    natively = tmp_path / "native"
    for path in (natively, tmp_path / "upper/f"):
        path.touch()
        if existed:
            os.setxattr(path, "user.x", b"old")
    id_ = get(union, "f").id
    wanted = (
        errno_of(os.setxattr, natively, "user.x", b"new", os.XATTR_CREATE),
        os.getxattr(natively, "user.x"),
        errno_of(os.removexattr, natively, "user.x"),
        os.listxattr(natively),
    )
    operations = Operations(union)
    setting = id_, b"user.x", b"new", 0, os.XATTR_CREATE
    removing = id_, b"user.x", 0
    found: list[object] = [errno_of(trio.run, operations.setxattr, *setting, 8)]
    union, operations = daemons.after(union)
    assert errno_of(trio.run, operations.setxattr, *setting, 8 | RESENT) == found[0]
    found.append(os.getxattr(tmp_path / "upper/f", "user.x"))
    found.append(errno_of(trio.run, operations.removexattr, *removing, 10))
    union, operations = daemons.after(union)
    assert errno_of(trio.run, operations.removexattr, *removing, 10 | RESENT) == found[-1]
    assert (*found, os.listxattr(tmp_path / "upper/f")) == wanted
    # another request, which was not sent before
    assert errno_of(trio.run, operations.removexattr, *removing, 12) == errno.ENODATA


def open_files() -> set[int]:
    names = os.listdir("/proc/self/fd")
    # Not that of the listing.
    return {int(name) for name in names if os.path.lexists(f"/proc/self/fd/{name}")}


def _node(union: Union, id_: int) -> Node:
    node = union.nodes.get(id_)
    assert node is not None
    return node


def _expected(what: str) -> dict[str, str]:
    """The tree after the change, by hand."""
    tree = {
        "a": "upper/a", "b": "upper/b", "lower": "l0/lower", "copy": "upper/copy", "empty": "directory",
        "full": "directory",
    }  # fmt: skip
    match what:
        case "unlink":
            del tree["a"]
        case "unlink of a lower's":
            del tree["lower"]
        case "unlink of a copy":
            del tree["copy"]
        case "rmdir":
            del tree["empty"]
        case "rename":
            tree["new"] = tree.pop("a")
        case "rename over another":
            tree["b"] = tree.pop("a")
        case "rename of a copy":
            tree["b"] = tree.pop("copy")
        case "rename of a directory":
            tree["moved"] = tree.pop("full")
        case "exchange":
            tree["a"], tree["b"] = tree["b"], tree["a"]
        case "mkdir":
            tree["made"] = "directory"
    return tree


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
