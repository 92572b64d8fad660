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
from pathlib import Path

import pytest
import trio

from tests.support.world import errno_of
from tests.unit.union_support import ME, OpenUnion, close_nodes
from tests.unit.union_support import open_union as open_union
from unionfs.core.node import Node
from unionfs.core.restoring import Restoring
from unionfs.core.setting import Change
from unionfs.core.state import State, StateError
from unionfs.core.steps import set_hook
from unionfs.fuse.direct import former
from unionfs.fuse.operations import Operations
from unionfs.fuse.protocol import requests as rq
from unionfs.sys import calls
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

    def first(self) -> Union:
        """A union that records."""
        self._states.append(State())
        return self._open_union(state=self._states[-1])

    def after(self, union: Union) -> tuple[Union, Operations]:
        """A union that has taken over what another one knew."""
        assert union.state is not None
        self._states.append(State(os.dup(union.state.fd)))
        new = Union(union.stack, state=self._states[-1])
        self._later.append(new)
        operations = Operations(new)
        files = new.files
        handles = operations.files.handles
        Restoring(new.nodes, new.stack.layers, handles, files.reopen, files.open_again).take_over()
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
    trio.run(operations.setattr, node.id, Change(mode=0o600), None)
    trio.run(operations.link, node.id, 1, b"second")
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
    setting = id_, b"user.x", b"new", os.XATTR_CREATE
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
