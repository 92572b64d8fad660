"""Changes made by bundles of system calls: as those made in steps, and nothing half-made after a failure."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import acl
from tests.unit.union_support import ME, OpenUnion, find, get
from tests.unit.union_support import open_union as open_union
from unionfs.core.copyup import SmallCopyUps
from unionfs.core.node import Node
from unionfs.core.setting import Change, set_attributes
from unionfs.core.steps import NotPlain, set_hook
from unionfs.sys import calls
from unionfs.union.changes import Caller, Changes
from unionfs.union.copyup import CopyUp
from unionfs.union.filecopy import SMALL, FileCopy, small_copy_ups
from unionfs.union.tree import Union

PAST, FUTURE = 10**18, 4 * 10**18
"""An access time in the future stays when the file is read."""
IS_ROOT = os.geteuid() == 0


class Sample(NamedTuple):
    """A file to be copied up."""

    size: int = 2000
    mode: int = 0o644
    owner: tuple[int, int] = (os.geteuid(), os.getegid())
    times: tuple[int, int] = (FUTURE, PAST + 1)

    def make(self, path: Path) -> None:
        path.write_bytes(os.urandom(1) * self.size)
        os.chown(path, *self.owner)
        os.chmod(path, self.mode)
        os.utime(path, ns=self.times)


SAMPLES = [
    Sample(), Sample(0), Sample(1), Sample(70_000), Sample(SMALL), Sample(mode=0o600), Sample(mode=0o755),
    Sample(times=(FUTURE + 7, -PAST - 7)), *([Sample(owner=(1000, 2000), mode=0o640)] if IS_ROOT else []),
]  # fmt: skip


def small(union: Union) -> SmallCopyUps:
    union.stack.volatile = True  # so no sync to a disk is needed
    found = small_copy_ups(CopyUp(union))
    assert found is not None
    return found


def in_steps(union: Union, node: Node) -> None:
    with FileCopy(CopyUp(union), node) as copy:
        copy.copy()
        copy.finish()


def on_disk(path: Path) -> tuple[object, ...]:
    st = path.stat()
    times = st.st_atime_ns, st.st_mtime_ns  # before the data is read
    return st.st_mode, st.st_uid, st.st_gid, st.st_nlink, st.st_size, st.st_blocks, *times


def known(union: Union, node: Node) -> tuple[object, ...]:
    shown = union.attributes(node)
    return (
        node.in_place, node.from_origin, node.flags, node.no_capability, node.lower_data, shown.nlink,
        shown.lasting, node.ino == shown.ino, shown.ino,
    )  # fmt: skip


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_copy_is_the_same_as_one_made_in_steps(
    tmp_path: Path, open_union: OpenUnion, sample: Sample
) -> None:
    lower, upper = tmp_path / "l0/d", tmp_path / "upper/d"
    lower.mkdir(parents=True)
    for name in ("a", "b"):
        sample.make(lower / name)
    shutil.copyfile(lower / "a", lower / "b")
    for name in ("a", "b"):
        os.utime(lower / name, ns=sample.times)
    os.utime(lower, ns=(PAST, PAST))
    before = {name: on_disk(lower / name) for name in ("a", "b")}
    union = open_union()
    copies, a, b = small(union), get(union, "d/a"), get(union, "d/b")
    numbers = {node: node.ino for node in (a, b)}
    shown = copies.copy(a)
    in_steps(union, b)
    assert on_disk(upper / "a") == on_disk(upper / "b") == before["a"] == before["b"]
    assert {name: on_disk(lower / name) for name in ("a", "b")} == before
    assert (upper / "a").read_bytes() == (upper / "b").read_bytes() == (lower / "a").read_bytes()
    assert os.listxattr(upper / "a") == os.listxattr(upper / "b") == ["user.overlay.origin"]
    for name in ("a", "b"):
        origin = os.getxattr(upper / name, "user.overlay.origin")
        assert union.origins.number_of(origin) == (lower / name).stat().st_ino
    assert known(union, a)[:-1] == known(union, b)[:-1]
    assert {node: node.ino for node in (a, b)} == numbers
    assert shown is not None
    assert shown.packed() == union.attributes(a).packed()
    assert upper.stat().st_mtime_ns == PAST
    assert os.listdir(tmp_path / "work/work") == []


CHANGES: list[dict[str, int]] = [
    {"mode": 0o600}, {"mode": 0o4711}, {"mtime_ns": 7}, {"atime_ns": -7, "mtime_ns": 8},
    {"uid": os.geteuid()}, *([{"uid": 7, "gid": 8, "mode": 0o6755}] if IS_ROOT else []),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", ["lower", "upper", "open"])
def test_changed_attributes(
    tmp_path: Path, open_union: OpenUnion, change: dict[str, int], where: str
) -> None:
    """The native filesystem says how they change."""
    for made in (tmp_path / "l0/f", tmp_path / "native"):
        made.parent.mkdir(exist_ok=True)
        Sample().make(made)
    native = tmp_path / "native"
    if "uid" in change:
        os.chown(native, change["uid"], change.get("gid", -1))
    if "mode" in change:
        os.chmod(native, change["mode"])
    if "mtime_ns" in change:
        atime, mtime = change.get("atime_ns", native.stat().st_atime_ns), change["mtime_ns"]
        os.utime(native, ns=(atime, mtime))
    union = open_union()
    copies, node = small(union), get(union, "f")
    if where == "lower":
        found = copies.copy(node, Change(**change))
    else:
        assert copies.copy(node, keep=where == "open") is not None
        found = set_attributes(union.gate, node, Change(**change))
    assert found is not None
    assert on_disk(tmp_path / "upper/f") == on_disk(native)
    assert found.packed() == union.attributes(node).packed()
    assert found.ctime_ns == (tmp_path / "upper/f").stat().st_ctime_ns


def with_xattr(path: Path) -> None:
    os.setxattr(path, "user.x", b"1")


def with_hole(path: Path) -> None:
    os.truncate(path, 100_000)


def append_only(path: Path) -> None:
    done = subprocess.run(["chattr", "+a", path], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"chattr +a: {done.stderr.strip()}")


def too_large(path: Path) -> None:
    path.write_bytes(b"x" * (SMALL + 1))


@pytest.mark.parametrize(
    "make",
    [with_xattr, with_hole, append_only, too_large, lambda path: os.chmod(path, 0o4755),
     lambda path: os.link(path, path.with_name("g"))],
)  # fmt: skip
def test_what_is_not_plain_is_left_alone(
    tmp_path: Path, open_union: OpenUnion, make: Callable[[Path], None]
) -> None:
    (tmp_path / "l0").mkdir()
    Sample().make(tmp_path / "l0/f")
    make(tmp_path / "l0/f")
    try:
        union = open_union()
        copies, node, fds = small(union), get(union, "f"), os.listdir("/proc/self/fd")
        assert copies.copy(node) is None
        assert os.listdir("/proc/self/fd") == fds
        assert os.listdir(tmp_path / "upper") == os.listdir(tmp_path / "work/work") == []
        in_steps(union, node)
        assert (tmp_path / "upper/f").read_bytes() == (tmp_path / "l0/f").read_bytes()
    finally:
        subprocess.run(["chattr", "-a", tmp_path / "l0/f"], check=False, capture_output=True)


LAST = OSError(errno.EIO, "the step before is the last")


@contextmanager
def failing_after(number: int, error: Exception = LAST) -> Iterator[list[str]]:
    """Let a bundle fail after so many steps, which go into the list."""
    steps: list[str] = []

    def hook(step: str) -> None:
        steps.append(step)
        if len(steps) == number:
            raise error

    set_hook(hook)
    try:
        yield steps
    finally:
        set_hook(None)


COPY_STEPS = [
    "open", "create", "data", "origin", *(["owner"] if IS_ROOT else []), "times", "enter", "appear", "set",
]  # fmt: skip


@pytest.mark.parametrize("number", range(1, len(COPY_STEPS) + 1))
def test_a_copy_up_that_fails_after_a_step(tmp_path: Path, open_union: OpenUnion, number: int) -> None:
    """It is complete or not there, and can be made again."""
    lower, upper = tmp_path / "l0/d", tmp_path / "upper/d"
    lower.mkdir(parents=True)
    Sample(owner=(1000, 2000) if IS_ROOT else Sample().owner).make(lower / "f")
    os.utime(lower, ns=(PAST, PAST))
    before = on_disk(lower / "f"), (lower / "f").read_bytes()
    union = open_union()
    copies, node = small(union), get(union, "d/f")
    fds = os.listdir("/proc/self/fd")
    with failing_after(number) as steps, pytest.raises(OSError, match="is the last"):
        copies.copy(node, Change(mtime_ns=9))
    assert steps == COPY_STEPS[:number]
    assert len(os.listdir("/proc/self/fd")) <= len(fds) + 1  # that of the upper's directory
    assert os.listdir(tmp_path / "work/work") == []
    assert (on_disk(lower / "f"), (lower / "f").read_bytes()) == before
    appeared = "appear" in steps
    assert (upper / "f").exists() == appeared
    if appeared:
        assert on_disk(upper / "f")[:-1] == before[0][:-1]
        found = set_attributes(union.gate, node, Change(mtime_ns=9))
    else:
        found = copies.copy(node, Change(mtime_ns=9))
    assert found is not None
    assert (upper / "f").read_bytes() == before[1]
    assert (upper / "f").stat().st_mtime_ns == found.st.st_mtime_ns == 9
    if upper.exists():
        assert upper.stat().st_mtime_ns == PAST


def test_readers_of_the_lower_go_on_with_the_copy(tmp_path: Path, open_union: OpenUnion) -> None:
    (tmp_path / "l0").mkdir()
    Sample().make(tmp_path / "l0/f")
    union = open_union()
    copies, node = small(union), get(union, "f")
    file = union.files.lend(node, write=False)
    assert copies.copy(node, keep=True) is not None
    assert node.use is not None
    assert node.use.file is not file
    kept = node.use.file
    assert kept is not None
    kept.write(b"new", 0)
    assert read_start(tmp_path / "upper/f") == b"new"
    assert read_start(tmp_path / "l0/f") != b"new"
    union.files.take_back(node, kept)
    file.release()


def read_start(path: Path) -> bytes:
    return path.read_bytes()[:3]


# -- entries --------------------------------------------------------------------------------------------


def make(changes: Changes, union: Union, kind: str, name: bytes = b"new", caller: Caller = ME) -> Node:
    parent = get(union, "d")
    if kind == "file":
        node, shown, fd = changes.create(parent, name, 0o664, caller)
        os.close(fd)
    elif kind == "directory":
        node, shown = changes.mkdir(parent, name, 0o775, caller)
    elif kind == "symlink":
        node, shown = changes.symlink(parent, name, b"to/where", caller)
    else:
        node, shown = changes.mknod(parent, name, stat.S_IFIFO | 0o622, 0, caller)
    node.looked_up()
    assert shown.packed() == union.attributes(node).packed()
    return node


def make_natively(path: Path, kind: str, caller: Caller) -> None:
    """What the kernel makes for this caller."""
    old = os.umask(caller.umask)
    try:
        if kind == "file":
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o664))
        elif kind == "directory":
            os.mkdir(path, 0o775)
        elif kind == "symlink":
            os.symlink(b"to/where", path)
        else:
            os.mkfifo(path, 0o622)
    finally:
        os.umask(old)
    inherits = path.parent.stat().st_mode & stat.S_ISGID
    os.chown(path, caller.uid, -1 if inherits else caller.gid, follow_symlinks=False)


def look(path: Path) -> tuple[object, ...]:
    st = path.lstat()
    xattrs = os.listxattr(path, follow_symlinks=False)
    return st.st_mode, st.st_uid, st.st_gid, st.st_size, st.st_nlink, xattrs


KINDS = ["file", "directory", "symlink", "fifo"]
CALLERS = [Caller(*ME[:2], 0o022), Caller(*ME[:2], 0o077), *([Caller(1000, 2000, 0o027)] if IS_ROOT else [])]


def opened(tmp_path: Path, open_union: OpenUnion, mode: int = 0o755) -> tuple[Union, Changes]:
    """A union with a directory ``d`` in the upper, in which something was made already."""
    for directory in (tmp_path / "upper/d", tmp_path / "l0/d", tmp_path / "native"):
        directory.mkdir(parents=True)
        os.chmod(directory, mode)
    for name in ("a", "b"):
        Sample().make(tmp_path / "l0/d" / name)
    union = open_union()
    changes = Changes(union)
    changes.mkdir(get(union, "d"), b"first", 0o700, Caller(*ME[:2], 0o077))
    return union, changes


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [0o755, 0o2775])
@pytest.mark.parametrize("over", [False, True])
def test_made_as_the_kernel_makes_it(
    tmp_path: Path, open_union: OpenUnion, kind: str, caller: Caller, mode: int, over: bool
) -> None:
    union, changes = opened(tmp_path, open_union, mode)
    name = "a" if over else "new"
    if over:
        get(union, "d/a")
        changes.unlink(get(union, "d"), b"a")
    make_natively(tmp_path / "native" / name, kind, caller)
    old = os.umask(0)
    try:
        with failing_after(0) as steps:
            node = make(changes, union, kind, name.encode(), caller)
    finally:
        os.umask(old)
    made, expected = look(tmp_path / "upper/d" / name), look(tmp_path / "native" / name)
    assert made[:-1] == expected[:-1]
    assert made[-1] == (["user.overlay.opaque"] if over and kind == "directory" else [])
    assert find(union, f"d/{name}") is node
    assert (node.flags, node.from_origin, node.no_capability) == (0, False, True)
    assert os.listdir(tmp_path / "work/work") == []
    plain = not over or not mode & stat.S_ISGID
    replaces = [*(["opaque"] if kind == "directory" else []), "appear"]
    assert steps == ["begin", *(["make"] if plain else []), *(replaces if plain and over else [])]


@pytest.mark.parametrize("umask", [0, 0o077])
@pytest.mark.parametrize("over", [False, True])
def test_a_default_acl_is_inherited(tmp_path: Path, open_union: OpenUnion, over: bool, umask: int) -> None:
    """Also by what replaces a whiteout, and before anybody has asked whether the directory has one."""
    for directory in ("upper/d", "l0/d", "native"):
        (tmp_path / directory).mkdir(parents=True)
        os.setxattr(tmp_path / directory, acl.DEFAULT, acl.simple(7, 5, 0, users={1000: 6}))
    (tmp_path / "l0/d/a").touch()
    union = open_union()
    changes, caller = Changes(union), Caller(*ME[:2], umask)
    name = "a" if over else "new"
    if over:
        get(union, "d/a")
        changes.unlink(get(union, "d"), b"a")
    for kind in ("file", "directory"):
        make_natively(tmp_path / "native" / name, kind, caller)
        make(changes, union, kind, name.encode(), caller)
        made, natively = tmp_path / "upper/d" / name, tmp_path / "native" / name
        assert os.getxattr(made, acl.ACCESS) == os.getxattr(natively, acl.ACCESS)
        assert made.stat().st_mode == natively.stat().st_mode
        if kind == "file":
            changes.unlink(get(union, "d"), name.encode())
            natively.unlink()
    assert os.getxattr(made, acl.DEFAULT) == os.getxattr(natively, acl.DEFAULT)


@pytest.mark.parametrize(
    ("kind", "number"), [("file", 2), ("symlink", 2), ("directory", 2), ("directory", 3)]
)
@pytest.mark.parametrize("error", [LAST, NotPlain()])
def test_a_replaced_whiteout_is_still_there_after_a_failure(
    tmp_path: Path, open_union: OpenUnion, kind: str, number: int, error: Exception
) -> None:
    union, changes = opened(tmp_path, open_union)
    get(union, "d/a")
    changes.unlink(get(union, "d"), b"a")
    fds = open_beside_directories(union)
    with failing_after(number, error) as steps:
        if error is LAST:
            with pytest.raises(OSError, match="is the last"):
                make(changes, union, kind, b"a")
        else:
            make(changes, union, kind, b"a")
    assert steps == ["begin", "make", "opaque"][:number]
    assert open_beside_directories(union) == fds
    assert os.listdir(tmp_path / "work/work") == []
    left = (tmp_path / "upper/d/a").lstat()
    assert (stat.S_ISCHR(left.st_mode) and left.st_rdev == 0) == (error is LAST)
    assert (find(union, "d/a") is None) == (error is LAST)


def test_what_exists_is_not_replaced(tmp_path: Path, open_union: OpenUnion) -> None:
    union, changes = opened(tmp_path, open_union)
    make(changes, union, "file", b"there")
    for kind in KINDS:
        with pytest.raises(FileExistsError):
            make(changes, union, kind, b"there")
    with pytest.raises(OSError, match="Invalid"):
        make(changes, union, "file", b".wh.x")


UNLINK_STEPS = {"lower": ["hold", "remove"], "upper": ["hold", "remove"], "both": ["hold", "make", "remove"]}


@pytest.mark.parametrize(
    ("where", "number", "error"),
    [(where, last, LAST) for where, steps in UNLINK_STEPS.items() for last in range(len(steps) + 1)]
    + [(where, last, NotPlain()) for where, steps in UNLINK_STEPS.items() for last in range(1, len(steps))],
)  # fmt: skip
def test_removed(
    tmp_path: Path, open_union: OpenUnion, where: str, number: int, error: Exception
) -> None:
    """With a failure after a step the name is there as before, or gone for good."""
    union, changes = opened(tmp_path, open_union)
    name = "new" if where == "upper" else "a"
    if where == "upper":
        node = make(changes, union, "file")
    else:
        node = get(union, "d/a")
        node.looked_up()
    if where == "both":
        assert small(union).copy(node) is not None
    all_steps = UNLINK_STEPS[where]
    lower = on_disk(tmp_path / "l0/d/a")
    with failing_after(number, error) as steps:
        fails = error is LAST and number > 0
        with pytest.raises(OSError, match="is the last") if fails else nullcontext():
            changes.unlink(get(union, "d"), name.encode())
    expected = all_steps[:number] if number else all_steps
    assert steps[: len(expected)] == expected
    assert on_disk(tmp_path / "l0/d/a") == lower
    assert os.listdir(tmp_path / "work/work") == []
    gone = not fails or number == len(all_steps)
    assert (find(union, f"d/{name}") is None) == gone
    assert node.unlinked == gone
    assert (node.held >= 0) == gone
    if gone:
        assert union.attributes(node).nlink == 0
        if where == "upper":
            assert not (tmp_path / "upper/d/new").exists()
        else:
            left = (tmp_path / "upper/d/a").lstat()
            assert stat.S_IFMT(left.st_mode) == stat.S_IFCHR
            assert left.st_rdev == 0


def test_a_removed_name_of_several(tmp_path: Path, open_union: OpenUnion) -> None:
    union, changes = opened(tmp_path, open_union)
    node, directory = make(changes, union, "file"), get(union, "d")
    changes.link(node, directory, b"other")
    changes.unlink(directory, b"new")
    assert (node.unlinked, node.held) == (False, -1)
    assert union.attributes(node).nlink == 1
    changes.unlink(directory, b"other")
    assert node.unlinked
    assert union.attributes(node).nlink == 0


def test_whiteouts_share_an_inode(tmp_path: Path, open_union: OpenUnion) -> None:
    """As overlayfs's; a new one is made when the last name of the old one is gone."""
    union, changes = opened(tmp_path, open_union)
    directory = get(union, "d")
    for name in (b"a", b"b"):
        get(union, f"d/{os.fsdecode(name)}")
        changes.unlink(directory, name)
    left = [(tmp_path / "upper/d" / name).lstat() for name in ("a", "b")]
    assert left[0].st_ino == left[1].st_ino
    assert [st.st_nlink for st in left] == [2, 2]
    for name in (b"a", b"b"):
        os.close(changes.create(directory, name, 0o600, ME)[2])
        changes.unlink(directory, name)
    assert {(tmp_path / "upper/d" / name).lstat().st_rdev for name in ("a", "b")} == {0}
    assert [find(union, f"d/{name}") for name in ("a", "b")] == [None, None]


def test_a_whiteout_that_is_gone_is_made_anew(tmp_path: Path, open_union: OpenUnion) -> None:
    """The last one was removed by another process."""
    union, changes = opened(tmp_path, open_union)
    directory = get(union, "d")
    get(union, "d/a")
    changes.unlink(directory, b"a")
    (tmp_path / "upper/d/a").unlink()
    get(union, "d/b")
    changes.unlink(directory, b"b")
    assert (tmp_path / "upper/d/b").lstat().st_rdev == 0
    assert find(union, "d/b") is None


def open_beside_directories(union: Union) -> int:
    return len(os.listdir("/proc/self/fd")) - len(union.gate)


RENAME_STEPS = ["hold", "rename"]


@pytest.mark.parametrize("source", ["upper", "both"])
@pytest.mark.parametrize("target", ["none", "removed", "upper", "lower", "both"])
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize(("number", "error"), [(0, LAST), (1, LAST), (2, LAST), (1, NotPlain())])
def test_renamed(
    tmp_path: Path, open_union: OpenUnion, source: str, target: str, elsewhere: bool, number: int,
    error: Exception,
) -> None:  # fmt: skip
    """With a failure after a step both names are as before, or the file has the new one for good."""
    if elsewhere:
        (tmp_path / "l0/e").mkdir(parents=True)
        (tmp_path / "upper/e").mkdir(parents=True)
        Sample(3).make(tmp_path / "l0/e/b")
    union, changes = opened(tmp_path, open_union)
    old, new = get(union, "d"), get(union, "e" if elsewhere else "d")
    changes.mkdir(new, b"other", 0o700, Caller(*ME[:2], 0o077))
    name = "a" if source == "both" else "x"
    node = get(union, "d/a") if source == "both" else changes.mknod(old, b"x", 0o600, 0, ME)[0]
    node.looked_up()
    if source == "both":
        assert small(union).copy(node) is not None
    new_name, replaced = ("y" if target in ("none", "upper") else "b"), None
    if target == "upper":
        replaced = changes.mknod(new, b"y", 0o600, 0, ME)[0]
    elif target != "none":
        replaced = get(union, f"{new.name.decode()}/b")
    if replaced is not None:
        replaced.looked_up()
        union.flags.of(replaced)
        if target == "both":
            assert small(union).copy(replaced) is not None
        elif target == "removed":
            changes.unlink(new, b"b")
    here, there = tmp_path / "upper/d" / name, tmp_path / "upper" / new.name.decode() / new_name
    before = look(here), here.read_bytes()
    lower, fds = on_disk(tmp_path / "l0/d/a"), open_beside_directories(union)
    with failing_after(number, error) as steps:
        fails = error is LAST and number > 0
        with pytest.raises(OSError, match="is the last") if fails else nullcontext():
            assert changes.rename(old, name.encode(), new, new_name.encode(), 0) == []
    assert steps[: number or 2] == RENAME_STEPS[: number or 2]
    assert on_disk(tmp_path / "l0/d/a") == lower
    assert os.listdir(tmp_path / "work/work") == []
    found = find(union, f"d/{name}"), find(union, f"{new.name.decode()}/{new_name}")
    if fails and number == 1:
        assert found == (node, None if target == "removed" else replaced)
        assert (look(here), here.read_bytes()) == before
        assert open_beside_directories(union) == fds
        return
    assert found == (None, node)
    assert (look(there), there.read_bytes()) == before
    assert here.is_char_device() == (source == "both")
    assert here.exists() == (source == "both")
    assert replaced is None or (replaced.unlinked and replaced.held >= 0)
    assert (node.parent, node.name, node.unlinked) == (new, new_name.encode(), False)


def test_a_refused_rename_is_not_plain(tmp_path: Path, open_union: OpenUnion) -> None:
    union, changes = opened(tmp_path, open_union)
    directory, upper = get(union, "d"), tmp_path / "upper/d"
    changes.mknod(directory, b"x", 0o600, 0, ME)
    with pytest.raises(OSError, match="Invalid"):
        changes.rename(directory, b"x", directory, b".wh.y", 0)
    with pytest.raises(FileExistsError):
        changes.rename(directory, b"x", directory, b"a", calls.RENAME_NOREPLACE)
    with pytest.raises(IsADirectoryError):
        changes.rename(directory, b"x", directory, b"first", 0)
    os.setxattr(upper / "x", "user.overlay.metacopy", b"")
    assert changes.rename(directory, b"x", directory, b"y", 0) == [get(union, "d/x")]


@pytest.mark.parametrize(("number", "error"), [(0, LAST), (1, LAST), (2, LAST), (1, NotPlain())])
def test_a_removed_directory(tmp_path: Path, open_union: OpenUnion, number: int, error: Exception) -> None:
    union, changes = opened(tmp_path, open_union)
    parent = get(union, "d")
    node = make(changes, union, "directory")
    before = open_beside_directories(union)
    with failing_after(number, error) as steps:
        fails = error is LAST and number > 0
        with pytest.raises(OSError, match="is the last") if fails else nullcontext():
            changes.rmdir(parent, b"new")
    assert steps[: number or 2] == ["hold", "remove"][: number or 2]
    gone = not fails or number == 2
    assert (tmp_path / "upper/d/new").exists() != gone
    assert (find(union, "d/new") is None) == gone
    assert (node.unlinked, node.held >= 0) == (gone, gone)
    assert open_beside_directories(union) == before + gone
    if gone:
        assert union.attributes(node).nlink == 0


def test_directories_whose_removal_is_not_plain(tmp_path: Path, open_union: OpenUnion) -> None:
    """One that has names, one in which only whiteouts are left, and one that hides a lower's."""
    union, changes = opened(tmp_path, open_union)
    (tmp_path / "l0/d/hidden").mkdir()
    parent = get(union, "d")
    full = make(changes, union, "directory", b"full")
    fd = changes.create(full, b"f", 0o600, ME)[2]
    os.close(fd)
    with pytest.raises(OSError, match="not empty"):
        changes.rmdir(parent, b"full")
    with pytest.raises(NotADirectoryError):
        changes.rmdir(parent, b"a")
    os.mknod(tmp_path / "upper/d/first/gone", stat.S_IFCHR, 0)
    changes.rmdir(parent, b"first")
    assert not (tmp_path / "upper/d/first").exists()
    get(union, "d/hidden")
    changes.rmdir(parent, b"hidden")
    changes.mkdir(parent, b"hidden", 0o700, ME)
    changes.rmdir(parent, b"hidden")
    left = (tmp_path / "upper/d/hidden").lstat()
    assert stat.S_ISCHR(left.st_mode)
    assert os.listdir(tmp_path / "work/work") == []
