"""What an ordinary user's daemon does in spite of permission bits: nothing is left of it, even if it is
killed.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import resource
import signal
import stat
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support import syscalls
from tests.support.patience import patient
from tests.unit.union_support import copy_up, get
from unionfs.core.places import Gate, Layer, Place
from unionfs.errors import LayerError
from unionfs.sys import calls
from unionfs.sys.capabilities import keep_capabilities
from unionfs.sys.namespaces import CLONE_NEWUSER, unshare
from unionfs.sys.override import Override
from unionfs.sys.process import children_of
from unionfs.sys.trees import remove_path
from unionfs.union.changes import Caller, Changes
from unionfs.union.copyup import CopyUp
from unionfs.union.layers import LayerStack
from unionfs.union.rights import Rights
from unionfs.union.tree import Union

UID = 1000
CRASHED = 9


@pytest.fixture
def home(area: Path) -> Path:
    """A directory of the ordinary user."""
    if os.geteuid() != 0:
        pytest.skip("another identity needs root")
    os.chown(area, UID, UID)
    return area


def as_user(action: Callable[[], Any], *, groups: list[int] | None = None) -> Any:
    """The JSON-able result of ``action`` in a child of the user's, or its exit code if that is not 0."""
    codecs.lookup("ascii")  # whose module the user may not be able to import
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups(groups or [])
            os.setresgid(UID, UID, UID)
            os.setresuid(UID, UID, UID)
            os.umask(0)
            syscalls.set_dumpable()  # as after execve(2), so that /proc/self is the user's
            os.write(writer, json.dumps(action()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code else json.loads(data)


def error_of(action: Callable[[], Any]) -> Any:
    """The result of ``action``, or the name of its errno."""
    try:
        return action()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


@contextmanager
def opened(home: Path, *lowers: str) -> Iterator[Union]:
    layers = [f"{home}/{name}" for name in lowers or ("l0",)]
    stack = LayerStack.open(layers, f"{home}/upper", f"{home}/work", userxattr=True)
    union = Union(stack)
    try:
        yield union
    finally:
        union.close()
        stack.close()


@pytest.mark.parametrize("closed", ["l1/p", "l0/p/d"])
def test_what_another_user_closes_is_not_left_out(home: Path, closed: str) -> None:
    """Whether it has a name, or a whiteout, cannot be known: an error, not a merge without it."""
    as_user(lambda: [os.makedirs(home / name) for name in ("l0/p/d", "l1/p/d", "upper", "work")] and None)
    (home / "l1/p/d/file").touch()

    def look() -> Any:
        with opened(home, "l0", "l1") as union:
            return error_of(lambda: get(union, "p/d/file") is not None)

    assert as_user(look) is True
    os.chown(home / closed, 0, 0)
    (home / closed).chmod(0o700)
    assert as_user(look) == "EACCES"


# -- crashes ------------------------------------------------------------------------------------------


def build(home: Path) -> None:
    for name in ("l0", "upper", "work", "l0/m", "l0/m/s", "l0/d", "l0/e"):
        (home / name).mkdir()
    for name in ("l0/m/f", "l0/m/s/g", "l0/e/f"):
        (home / name).write_text("x")
    (home / "l0/m").chmod(0o555)


def change(home: Path) -> None:
    """Changes that need rights for the moment."""
    me = Caller(UID, UID)
    with opened(home) as union:
        changes = Changes(union)
        copy_up(union, get(union, "m/f"))
        copy_up(union, get(union, "m/s/g"))
        root = union.nodes.root
        changes.rmdir(root, b"d")
        changes.mkdir(root, b"d", 0o300, me)
        changes.mkdir(root, b"t", 0, me)
        changes.rmdir(root, b"t")
        CopyUp(union).directory(get(union, "e"))
        changes.unlink(get(union, "e"), b"f")
        (home / "upper/e").chmod(0o100)
        changes.rmdir(root, b"e")


MODES = {
    "m": {0o555}, "m/s": {0o777}, "m/f": {0o666}, "m/s/g": {0o666}, "d": {0o300}, "t": {0},
    "e": {0o777, 0o100},
}  # fmt: skip
CHANGING = ("chmod", "rename", "unlink", "rmdir", "symlink", "mkdir", "setxattr")


def crash_at(number: int) -> None:
    """End this process instead of its change of the disk with that number."""
    left = number

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(CRASHED)
            return call(*args, **kwargs)

        return instead

    for name in CHANGING:
        setattr(os, name, counted(getattr(os, name)))
    calls.renameat2 = counted(calls.renameat2)


def test_a_crash_leaves_what_the_next_mount_mends(home: Path) -> None:
    """At any change of the disk: afterwards every mode is one that somebody has set."""
    for number in range(1000):
        one = home / str(number)

        def run(one: Path = one, number: int = number) -> None:
            one.mkdir()
            build(one)
            crash_at(number)
            change(one)

        def again(one: Path = one) -> None:
            with opened(one):
                pass

        code = as_user(run)
        assert code in (None, CRASHED)
        assert as_user(again) is None
        assert os.listdir(one / "work/work") == []
        for name, modes in MODES.items():
            path = one / "upper" / name
            if path.is_dir() or path.is_file():
                assert stat.S_IMODE(path.stat().st_mode) in modes, (number, name)
        if code is None:
            break
    assert number > 30


def test_an_object_elsewhere_is_not_changed(home: Path) -> None:
    """Notes of another user, or of a mode that differs in more than the owner's bits, are ignored."""
    as_user(
        lambda: [
            os.mkdir(f"{home}/{name}") for name in ("l0", "upper", "work", "upper/a", "upper/b", "work/work")
        ]
    )
    (home / "upper/root").mkdir(mode=0o755)
    inode = {name: (home / "upper" / name).stat().st_ino for name in ("a", "b", "root")}
    (home / "upper/a").chmod(0o755)
    (home / "upper/b").chmod(0o755)

    def forge() -> None:
        for number, (name, mode) in enumerate([("root", 0o55), ("a", 0o77), ("b", 0o55), ("b/", 0o4755)]):
            note = f"mode={mode:o} ino={inode[name.rstrip('/')]}" if name != "b/" else "mode=9 ino=x"
            os.symlink(note, f"{home}/work/work/#mode{number}")

    as_user(forge)
    with opened(home):
        pass
    found = {name: stat.S_IMODE((home / "upper" / name).stat().st_mode) for name in inode}
    assert found == {"a": 0o755, "b": 0o55, "root": 0o755}


def test_setgid_that_could_not_be_restored(home: Path) -> None:
    """chmod(2) by somebody outside the group clears setgid, so such a directory is left alone."""
    as_user(lambda: [os.mkdir(f"{home}/{name}") for name in ("work", "d")])
    os.chown(home / "d", UID, 4)
    (home / "d").chmod(0o2555)

    def widen() -> Any:
        with os.scandir(home):
            fd = os.open(f"{home}/d", os.O_PATH)
            with Rights(os.open(f"{home}/work", os.O_PATH)).widened(fd):
                return stat.S_IMODE(os.fstat(fd).st_mode)

    assert as_user(widen) == 0o2555
    assert as_user(widen, groups=[4]) == 0o2755
    assert stat.S_IMODE((home / "d").stat().st_mode) == 0o2555


# -- files that are read in spite of their mode -------------------------------------------------------


def _fds(pid: int) -> list[int] | None:
    """The open fds of a child that has answered; it closes those of the answer afterwards."""
    directory = f"/proc/{pid}/fd"
    if not os.access(directory, os.R_OK):
        return None
    until = time.monotonic() + patient(5)
    while (fds := sorted(map(int, os.listdir(directory)))) != [0, 1, 2, 3] and time.monotonic() < until:
        time.sleep(0.01)
    return fds


def read_by_override(home: Path) -> Any:
    opener, at = Override(), os.open(home, os.O_PATH)

    def read(name: bytes) -> Any:
        fd = opener.open(at, name, os.O_RDONLY)
        return "impossible" if fd is None else os.read(fd, 10).decode()

    def xattr(name: bytes) -> Any:
        value = opener.getxattr(os.open(name, os.O_PATH, dir_fd=at), b"user.a")
        return None if value is None else value.decode()

    results = [
        error_of(lambda name=name: read(name)) for name in (b"mine", b"group", b"other", b"none", b"closed/f")
    ]
    results += [error_of(lambda: xattr(b"mine")), error_of(lambda: xattr(b"other"))]
    for child in children_of(os.getpid()):
        results.append(_fds(child))
        os.kill(child, signal.SIGKILL)
    results.append(read(b"mine"))
    opener.close()
    return results


def make_files(home: Path) -> None:
    (home / "closed").mkdir()
    for name, owner, group in (
        ("mine", UID, UID),
        ("group", UID, 4),
        ("other", 0, 0),
        ("closed/f", UID, UID),
    ):
        (home / name).write_text(name)
        os.setxattr(home / name, "user.a", b"value")
        os.chown(home / name, owner, group)
        (home / name).chmod(0)
    os.chown(home / "closed", UID, UID)
    (home / "closed").chmod(0)


def test_override(home: Path) -> None:
    """Exactly the own files of the own group; its child has no other fds, and is replaced when killed."""
    make_files(home)
    results = as_user(lambda: read_by_override(home))
    if results[0] == "impossible":
        pytest.skip("no user namespaces here")
    fds = results.pop(7)
    assert results == ["mine", "EACCES", "EACCES", "ENOENT", "closed/f", "value", "EACCES", "mine"]
    assert fds in (None, [0, 1, 2, 3])


def test_the_child_ends_with_its_daemon(home: Path) -> None:
    make_files(home)

    def start() -> Any:
        fd = Override().open(os.open(home, os.O_PATH), b"mine", os.O_RDONLY)
        return [fd is not None, children_of(os.getpid())]

    possible, children = as_user(start)  # which ends without closing it
    if not possible:
        pytest.skip("no user namespaces here")
    try:
        fd = os.pidfd_open(children[0])
    except ProcessLookupError:  # it has ended
        fd = -1
    if fd >= 0:
        import select

        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(patient(10) * 1000)


def test_without_user_namespaces(home: Path) -> None:
    """The upper can be changed; what a lower denies stays denied."""
    for name in ("l0", "upper", "work"):
        (home / name).mkdir()
        os.chown(home / name, UID, UID)
    make_files(home / "l0")

    def change() -> Any:
        unshare(CLONE_NEWUSER)
        with open("/proc/sys/user/max_user_namespaces", "wb", buffering=0) as limit:
            limit.write(b"0")  # in this one
        keep_capabilities([])
        with opened(home) as union:
            changes = Changes(union)
            root = union.nodes.root
            changes.mkdir(root, b"t", 0, Caller(os.geteuid(), os.getegid()))
            changes.rmdir(root, b"t")
            return [
                error_of(lambda: copy_up(union, get(union, "mine"))),
                error_of(lambda: get(union, "closed/f") and None),
                error_of(
                    lambda: [name.decode() for name in union.nodes.root.territory.listing(root).names()]
                ),
            ]

    results = as_user(change)
    assert results[:2] == ["EACCES", "EACCES"]
    assert sorted(results[2]) == ["closed", "group", "mine", "other"]
    assert subprocess.run(["find", home / "work/work", "-mindepth", "1"], capture_output=True).stdout == b""


# -- leftovers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o555, 0o000, 0o100, 0o200, 0o300, 0o400])
def test_leftovers_without_permission_bits(home: Path, mode: int) -> None:
    """The next mount empties work."""

    def leave() -> None:
        for name in (
            "l0",
            "upper",
            "work",
            "work/work",
            "work/work/#1",
            "work/work/#1/d",
            "work/work/#1/d/e",
        ):
            os.mkdir(f"{home}/{name}")
        Path(f"{home}/work/work/#1/d/f").write_text("x")
        for name in ("d/f", "d/e", "d", ""):
            os.chmod(f"{home}/work/work/#1/{name}", mode)

    def again() -> None:
        with opened(home):
            pass

    as_user(leave)
    assert as_user(again) is None
    assert os.listdir(home / "work/work") == []


def test_leftovers_of_another_user(home: Path) -> None:
    """They are named as they are, with a cure."""
    as_user(lambda: [os.mkdir(f"{home}/{name}") for name in ("l0", "upper", "work", "work/work")])
    (home / "work/work/#\xe9").mkdir(mode=0o755)
    (home / "work/work/#\xe9/f").touch()

    def again() -> str:
        try:
            with opened(home):
                return ""
        except LayerError as error:
            return str(error)

    left = f"{home}/work/work/#\xe9/f"
    assert as_user(again) == (
        f"work {home}/work cannot be emptied of what an earlier mount left: {left}: permission denied; "
        "remove it, or choose an empty directory."
    )


# -- trees of any depth -------------------------------------------------------------------------------

LEVELS = 3000


def deep(top: Path) -> int:
    """Make a tree of that many levels, with a file below; returns an O_PATH fd of the last directory."""
    fd = os.open(top, os.O_PATH)
    for _ in range(LEVELS):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_PATH, dir_fd=fd)
        os.close(fd)
        fd = below
    return fd


def test_mending_in_a_deep_tree(home: Path) -> None:
    """A note about an object below more directories than Python has frames, or this process fds."""

    def run() -> Any:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
        for name in ("l0", "upper", "work", "work/work"):
            (home / name).mkdir()
        bottom = deep(home / "upper")
        os.mkdir("closed", 0o700, dir_fd=bottom)
        os.mkdir("closed/f", 0o700, dir_fd=bottom)
        for number, (name, mode) in enumerate([("closed", 0), ("closed/f", 0o555)]):
            note = f"mode={mode:o} ino={os.stat(name, dir_fd=bottom).st_ino}"
            os.symlink(note, f"{home}/work/work/#mode{number}")
        os.chmod("closed/f", 0o755, dir_fd=bottom)
        with opened(home):
            pass
        closed = os.stat("closed", dir_fd=bottom).st_mode
        os.chmod("closed", 0o700, dir_fd=bottom)
        return [stat.S_IMODE(closed), stat.S_IMODE(os.stat("closed/f", dir_fd=bottom).st_mode)]

    assert as_user(run) == [0, 0o555]
    remove_path(str(home / "upper"))


def test_override_without_free_fds(home: Path) -> None:
    """EMFILE, as from open(2)."""
    make_files(home)

    def run() -> Any:
        opener, at = Override(), os.open(home, os.O_PATH)
        first = opener.open(at, b"mine", os.O_RDONLY)
        if first is None:
            return None
        os.close(first)
        taken = []
        most = max(map(int, os.listdir("/proc/self/fd"))) + 32  # a test process may have many
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        with suppress(OSError):
            while True:
                taken.append(os.dup(at))
        result = error_of(lambda: opener.open(at, b"mine", os.O_RDONLY))
        for fd in taken:
            os.close(fd)
        return [result, os.read(opener.open(at, b"mine", os.O_RDONLY) or -1, 10).decode()]

    result = as_user(run)
    if result is None:
        pytest.skip("no user namespaces here")
    assert result == ["EMFILE", "mine"]


def test_up_a_deep_tree_of_two_layers(area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to a directory of one layer does not close those of the other, for which it is walked again."""
    deepest: list[Place] = []
    for number in range(2):
        top = area / str(number)
        top.mkdir()
        os.close(deep(top))
        place = Layer(number, str(top), os.open(top, os.O_PATH), is_upper=False).root
        for _ in range(LEVELS):
            place = Place(place.layer, place, b"d")
        deepest.append(place)
    gate, opened = Gate(512), 0
    real = os.open

    def counted(*args: Any, **kwargs: Any) -> int:
        nonlocal opened
        opened += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(os, "open", counted)
    ways: list[Place | None] = [*deepest]
    while ways[0] is not None:
        for place in filter(None, ways):
            gate.fd(place)
        ways = [place.parent if place else None for place in ways]
    roots = [place.layer.root_fd for place in deepest]
    gate.close()
    for fd in roots:
        os.close(fd)
    remove_path(str(area / "0"))
    remove_path(str(area / "1"))
    assert opened < 2 * LEVELS * LEVELS / 64
