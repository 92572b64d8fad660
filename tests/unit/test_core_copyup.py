"""Copies of small files in the compiled core: what the tests of bundles do not look at."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.mount.direct_calls import can_reflink, shared_bytes
from tests.support.world import errno_of
from tests.unit.test_core_answers import UNIQUE, Mount
from tests.unit.test_core_answers import mount as mount
from tests.unit.test_core_setattr import in_lower, setattr_body
from tests.unit.test_union_bundles import PAST, Sample, failing_after, on_disk, small
from tests.unit.union_support import ME, OpenUnion, close_nodes, get
from tests.unit.union_support import copy_up as in_steps
from tests.unit.union_support import open_union as open_union
from unionfs.core.copyup import SmallCopyUps
from unionfs.core.memo import Memo, Wanted
from unionfs.core.node import Attributes, Node
from unionfs.core.setting import Change
from unionfs.core.steps import set_hook
from unionfs.fuse.protocol import Opcode, encode
from unionfs.fuse.protocol import flags as fl
from unionfs.union import origin
from unionfs.union.changes import Changes
from unionfs.union.copyup import CopyUp
from unionfs.union.filecopy import SMALL
from unionfs.union.layers import LayerStack
from unionfs.union.tree import Union

FICLONE = 0x40049409
PLAIN_STEPS = ["open", "create", "data", "origin", "times", "enter", "appear"]
ORIGIN = "user.overlay.origin"


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    """A directory of the lower with two samples, f and g."""
    path = tmp_path / "l0/d"
    path.mkdir(parents=True)
    for name in ("f", "g"):
        Sample().make(path / name)
    os.utime(path, ns=(PAST, PAST))
    return path


def xattrs(path: Path) -> dict[str, bytes]:
    return {name: os.getxattr(path, name) for name in os.listxattr(path)}


def chattr(flag: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        done = subprocess.run(["chattr", flag, path], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"chattr {flag}: {done.stderr.strip()}")

    return change


@pytest.mark.parametrize(
    "make",
    [chattr("+S"), chattr("+A"), chattr("+i"), chattr("+a"), lambda path: os.chmod(path, 0o444),
     lambda path: os.link(path, path.with_name("h")), lambda path: os.setxattr(path, "user.x", b"")],
)  # fmt: skip
def test_what_is_not_plain_is_recognized_first(
    lower: Path, open_union: OpenUnion, make: Callable[[Path], None]
) -> None:
    """As soon as the file is open, before anything is made. (Without the permission to write there can be no
    xattr `user.overlay.origin`.)"""
    union = open_union()
    copies, node = small(union), get(union, "d/f")
    make(lower / "f")
    try:
        with failing_after(0) as steps:
            assert copies.copy(node) is None
        assert steps == ["open"]
        assert not node.in_place
        assert (copies.count, copies.copied_bytes) == (0, 0)
    finally:
        subprocess.run(["chattr", "-S", "-A", "-i", "-a", lower / "f"], check=False, capture_output=True)


def test_what_was_replaced_in_the_layer_is_not_plain(lower: Path, open_union: OpenUnion) -> None:
    """By another file, for which the node does not stand, and by a fifo."""
    union = open_union()
    copies, nodes = small(union), [get(union, "d/f"), get(union, "d/g")]
    Sample(7).make(lower / "new")
    (lower / "new").rename(lower / "f")
    (lower / "g").unlink()
    os.mkfifo(lower / "g")
    with failing_after(0) as steps:
        assert [copies.copy(node) for node in nodes] == [None, None]
    assert steps == ["open", "open"]


def test_what_has_lost_its_name_is_not_copied(lower: Path, open_union: OpenUnion) -> None:
    """Nor looked at: another process has removed it, and the node has no name to appear under."""
    union = open_union()
    copies, node, directory = small(union), get(union, "d/f"), get(union, "d")
    node.looked_up()
    union.nodes.lose(node, directory, b"f")
    with failing_after(0) as steps:
        assert copies.copy(node) is None
    assert steps == []


@pytest.mark.parametrize("owner", [(1000, 0), (0, 2000)])
def test_an_owner_or_a_group_of_another_user(
    root: None, lower: Path, tmp_path: Path, open_union: OpenUnion, owner: tuple[int, int]
) -> None:
    Sample(owner=owner).make(lower / "f")
    before = on_disk(lower / "f")
    union = open_union()
    assert small(union).copy(get(union, "d/f")) is not None
    assert on_disk(tmp_path / "upper/d/f") == before


def test_figures(lower: Path, open_union: OpenUnion) -> None:
    union = open_union()
    copies, began = small(union), time.monotonic_ns()
    for number, name in enumerate(("f", "g"), 1):
        assert copies.copy(get(union, f"d/{name}")) is not None
        assert (copies.count, copies.copied_bytes) == (number, number * Sample().size)
        assert 0 < copies.nanoseconds < time.monotonic_ns() - began


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        (None, []), (Change(mode=0o600), []), (Change(mode=0o600, uid=0), ["set"]),
        (Change(mtime_ns=PAST), ["set"]),
    ],
)  # fmt: skip
def test_a_copy_is_made_with_its_new_mode(
    root: None, lower: Path, tmp_path: Path, open_union: OpenUnion, change: Change | None, steps: list[str]
) -> None:
    """So it need not be set, and is never another one."""
    union = open_union()
    with failing_after(0) as found:
        assert small(union).copy(get(union, "d/f"), change) is not None
    assert found == [*PLAIN_STEPS, *steps]
    expected = Sample().mode if change is None or change.mode is None else change.mode
    assert stat.S_IMODE((tmp_path / "upper/d/f").stat().st_mode) == expected


def test_a_part_of_a_file_is_modified_now(lower: Path, tmp_path: Path, open_union: OpenUnion) -> None:
    """A truncated copy must not show without its time; the whole of a file keeps it."""
    union = open_union()
    copies, now = small(union), time.time_ns()
    assert copies.copy(get(union, "d/f"), limit=100) is not None
    assert copies.copy(get(union, "d/g"), limit=Sample().size + 1) is not None
    part, whole = (tmp_path / "upper/d" / name for name in ("f", "g"))
    assert part.read_bytes() == (lower / "f").read_bytes()[:100]
    assert now - 10**9 < part.stat().st_mtime_ns < time.time_ns() + 10**9
    assert part.stat().st_atime_ns == Sample().times[0]
    assert on_disk(whole) == on_disk(lower / "g")
    assert whole.read_bytes() == (lower / "g").read_bytes()
    assert copies.copied_bytes == 100 + Sample().size


def test_a_kept_copy_is_not_inherited(lower: Path, open_union: OpenUnion) -> None:
    """By a program that the daemon starts."""
    union = open_union()
    copies, node = small(union), get(union, "d/f")
    assert copies.copy(node, keep=True) is not None
    assert node.use is not None
    assert node.use.file is not None
    assert not os.get_inheritable(node.use.file.fd)
    assert (node.use.file.readable, node.use.file.writable) == (True, True)
    union.files.take_back(node, node.use.file)


def test_a_filesystem_without_a_uuid(
    lower: Path, tmp_path: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The origin is empty, as the kernel's overlayfs and the copy in steps have it; the number stays."""
    monkeypatch.setattr(origin, "filesystem_uuid", lambda fd: None)
    union = open_union()
    f, g = get(union, "d/f"), get(union, "d/g")
    number = f.ino
    assert small(union).copy(f) is not None
    in_steps(union, g)
    assert xattrs(tmp_path / "upper/d/f") == xattrs(tmp_path / "upper/d/g") == {ORIGIN: b""}
    assert (f.ino, f.from_origin, g.from_origin) == (number, False, False)


def test_the_directory_is_told_of_once(lower: Path, tmp_path: Path, open_union: OpenUnion) -> None:
    """Its size may change with the first copy that enters it; the ctime shown stays for all."""
    told: list[tuple[Node | None, Node | None]] = []
    union = open_union()
    plain = small(union)
    assert plain.copy(get(union, "d/g")) is not None  # makes the directory
    directory, nodes = get(union, "d"), []
    for name in ("h", "i"):
        Sample().make(lower / name)
        nodes.append(get(union, f"d/{name}"))
    shown = union.attributes(directory)
    copies = SmallCopyUps(
        union, union.work, told=lambda node, resized: told.append((node, resized)),
        directory=lambda node: node.parts[0], clones_never=set(), limit=Sample().size, remembers=False,
    )  # fmt: skip
    for node in nodes:
        assert copies.copy(node) is not None
    assert told == [(nodes[0], directory), (nodes[1], None)]
    after = union.attributes(directory)
    assert (after.ctime_ns, after.st.st_mtime_ns) == (shown.ctime_ns, PAST)


def test_a_change_of_the_directory_between_two_copies(
    lower: Path, tmp_path: Path, open_union: OpenUnion
) -> None:
    """Its time stays for the second one."""
    union = open_union()
    copies, directory = small(union), get(union, "d")
    assert copies.copy(get(union, "d/f")) is not None
    Changes(union).mkdir(directory, b"made", 0o700, ME)
    os.utime(tmp_path / "upper/d", ns=(PAST, PAST + 5))
    assert copies.copy(get(union, "d/g")) is not None
    assert (tmp_path / "upper/d").stat().st_mtime_ns == PAST + 5
    shown = union.attributes(directory)
    assert shown.st.st_mtime_ns == PAST + 5
    assert shown.ctime_ns < (tmp_path / "upper/d").stat().st_ctime_ns


def test_a_failure_before_the_copy_appears(mount: Mount, tmp_path: Path) -> None:
    """It is the answer, and nothing has changed."""
    node, _ = in_lower(mount, tmp_path)
    fds = len(os.listdir("/proc/self/fd"))
    with failing_after(2) as steps:
        answer = mount.ask(Opcode.SETATTR, node.id, setattr_body(fl.FATTR_MTIME))
    assert answer == b"".join(encode.error(UNIQUE, errno.EIO))
    assert steps == ["open", "create"]
    assert mount.told == []
    assert os.listdir(tmp_path / "upper/d") == os.listdir(tmp_path / "work/work") == []
    assert len(os.listdir("/proc/self/fd")) == fds


# -- data ---------------------------------------------------------------------------------------------------


def can_clone(path: Path) -> bool:
    with open(path / "one", "wb") as one, open(path / "other", "wb") as other:
        try:
            fcntl.ioctl(other, FICLONE, one.fileno())
        except OSError:
            return False
    return True


def test_a_device_that_never_clones_is_remembered(lower: Path, tmp_path: Path, open_union: OpenUnion) -> None:
    """Small and large copies share what they have found out."""
    union = open_union()
    assert small(union).copy(get(union, "d/f")) is not None
    expected = set() if can_clone(tmp_path) else {tmp_path.stat().st_dev}
    assert union.stack.never_clones == expected


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_small_files_share_extents(filesystem: Callable[..., Path], kind: str) -> None:
    """All of a file, where the filesystem can, unless its device is known not to; never a part of it."""
    place = filesystem(kind, 400 << 20)
    if not can_reflink(place):
        pytest.skip(f"this {kind} has no reflinks")
    paths = [str(place / name) for name in ("lower", "upper", "work")]
    for path in paths:
        os.mkdir(path)
    for name in ("whole", "again", "part", "never"):
        Sample(3 * 4096).make(place / "lower" / name)  # which a btrfs does not keep in its tree
    os.sync()
    with closing(LayerStack.open(paths[:1], *paths[1:])) as stack, closing(Union(stack)) as union:
        copies = small(union)
        for name in ("whole", "again"):
            assert copies.copy(get(union, name)) is not None
        assert copies.copy(get(union, "part"), limit=4096) is not None
        assert stack.never_clones == set()
        stack.never_clones.add(place.stat().st_dev)
        assert copies.copy(get(union, "never")) is not None
        close_nodes(union)
    os.sync()
    for name, shared in {"whole": 3 * 4096, "again": 3 * 4096, "part": 0, "never": 0}.items():
        copy = place / "upper" / name
        assert shared_bytes(copy) == shared
        assert copy.read_bytes() == (place / "lower" / name).read_bytes()[: copy.stat().st_size]


@pytest.mark.parametrize("size", [0, 1, 65536])
def test_a_file_that_becomes_shorter_while_it_is_copied(
    lower: Path, tmp_path: Path, open_union: OpenUnion, size: int
) -> None:
    """No part of it appears."""
    Sample(70_000).make(lower / "f")
    union = open_union()
    union.stack.never_clones.add(tmp_path.stat().st_dev)
    copies, node = small(union), get(union, "d/f")
    steps = []

    def shorten(step: str) -> None:
        steps.append(step)
        if step == "create":
            os.truncate(lower / "f", size)

    set_hook(shorten)
    try:
        assert copies.copy(node) is None
    finally:
        set_hook(None)
    assert steps == ["open", "create"]
    assert os.listdir(tmp_path / "upper") == os.listdir(tmp_path / "work/work") == []


def test_without_room(filesystem: Callable[..., Path]) -> None:
    """Nothing appears; the copy in steps reports the error. With room again it is made."""
    place = filesystem("tmpfs", 1 << 20)
    paths = [str(place / name) for name in ("lower", "upper", "work")]
    for path in paths:
        os.mkdir(path)
    Sample(70_000).make(place / "lower/f")
    with closing(LayerStack.open(paths[:1], *paths[1:])) as stack, closing(Union(stack)) as union:
        copies, node, fds = small(union), get(union, "f"), os.listdir("/proc/self/fd")
        with open(place / "filling", "wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        assert copies.copy(node) is None
        assert os.listdir(place / "upper") == os.listdir(place / "work/work") == []
        assert errno_of(in_steps, union, node) == errno.ENOSPC
        assert os.listdir("/proc/self/fd") == fds
        (place / "filling").unlink()
        assert copies.copy(node) is not None
        assert (place / "upper/f").read_bytes() == (place / "lower/f").read_bytes()


def answered(of: Memo, handler: Callable[[], Attributes | None]) -> Attributes | None:
    """What a handler returns as soon as it knows the calls on slow layers that it wants."""
    for _ in range(100):
        try:
            with of:
                return handler()
        except Wanted:
            calls = of.wanted()
            for call in calls:
                call.make(of)
            of.made(calls)
    raise AssertionError("it wants calls for ever")


@pytest.fixture
def memo() -> Iterator[Memo]:
    with closing(Memo()) as found:
        yield found


@pytest.mark.parametrize("size", [0, 5, 65536, 65537, 3 * 65536, SMALL])
def test_a_copy_from_a_slow_layer(
    lower: Path, tmp_path: Path, open_union: OpenUnion, memo: Memo, size: int
) -> None:
    """In a directory of the upper: all of it is read before anything is made, once."""
    Sample(size).make(lower / "f")
    before = on_disk(lower / "f")
    union = open_union(fast_layers=False)
    copies, node = small(union), get(union, "d/f")
    CopyUp(union).directory(get(union, "d"))
    with failing_after(0) as steps:
        assert answered(memo, lambda: copies.copy(node)) is not None
    assert [step for step in steps if step != "open"] == PLAIN_STEPS[1:]
    assert on_disk(tmp_path / "upper/d/f") == before
    assert (tmp_path / "upper/d/f").read_bytes() == (lower / "f").read_bytes()
    assert os.listdir(tmp_path / "work/work") == []


@pytest.mark.parametrize("size", [0, 70_000])
def test_a_slow_layer_s_file_that_becomes_shorter(
    lower: Path, tmp_path: Path, open_union: OpenUnion, memo: Memo, size: int
) -> None:
    """While it is read: then nothing is made."""
    Sample(200_000).make(lower / "f")
    union = open_union(fast_layers=False)
    copies, node = small(union), get(union, "d/f")

    def handler() -> Attributes | None:
        try:
            return copies.copy(node)
        except Wanted:
            if len(steps) > 1:  # its attributes are known
                os.truncate(lower / "f", size)
            raise

    with failing_after(0) as steps:
        assert answered(memo, handler) is None
    assert set(steps) == {"open"}
    assert os.listdir(tmp_path / "upper") == os.listdir(tmp_path / "work/work") == []
