"""`unionfs snapshot`: what a snapshot has, what programs see, and what is left after a kill.

The expected trees are copies that cp(1) made at that moment, and what kernel overlayfs shows of the layers.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.mount.cli_calls import REPOSITORY, UNIONFS, Place, refused, succeed, unionfs, wait_for
from tests.mount.user_calls import UID, Host
from tests.support import mounting
from tests.support.live_lowers import Shown, fill, shown
from tests.support.mounting import Mount, kernel_mounted, mounted
from unionfs.branches import snapshots
from unionfs.daemon import live
from unionfs.storage.snapshot_record import added
from unionfs.storage.snapshots import Store
from unionfs.sys.fds import Owned
from unionfs.sys.stopping import Stopped

_TAKEN = 3
_SESSIONS = (
    "direct-hybrid",
    pytest.param("direct-passthrough", marks=pytest.mark.slow),
    "direct-cached",
    pytest.param("direct-hybrid xfs", marks=pytest.mark.slow),
    pytest.param("direct-cached btrfs", marks=pytest.mark.slow),
)
_DISK = 512 << 20


class Snapshots:
    """A union with two lowers and some changes, and its snapshots."""

    def __init__(self, area: Path, mount: Mount) -> None:
        self.area = area
        self.mount = mount
        self.union = mount.mountpoint

    def take(self, name: str) -> dict[str, Any]:
        found = json.loads(succeed(unionfs("snapshot", "create", "--json", self.union, name)))
        assert isinstance(found, dict)
        return found

    def restore(self, name: str) -> None:
        succeed(unionfs("snapshot", "restore", self.union, name))

    def listed(self) -> dict[str, dict[str, Any]]:
        return {
            one["name"]: one for one in json.loads(succeed(unionfs("snapshot", "ls", "--json", self.union)))
        }

    def copy(self, name: str) -> Path:
        """A copy of what the union shows now."""
        target = self.area / f"copy-{name}"
        subprocess.run(["cp", "-a", str(self.union), str(target)], check=True)
        return target

    def kernels(self, name: str) -> Shown:
        """What kernel overlayfs shows of a snapshot."""
        lowers = [Path(path) for path in self.listed()[name]["lowers"]]
        at = self.area / "kernel"
        at.mkdir(exist_ok=True)
        # Options of mount(2) are at most a page.
        with (
            chdir(self.area),
            kernel_mounted(at, lowers=[path.relative_to(self.area) for path in lowers]) as mount,
        ):
            return shown(mount.mountpoint)

    def ours(self, name: str) -> Shown:
        """What a mount of it by unionfs shows."""
        at = self.area / "elsewhere"
        at.mkdir(exist_ok=True)
        words = [word for path in self.listed()[name]["lowers"] for word in ("-l", path)]
        succeed(unionfs("mount", *words, at))
        try:
            return shown(at)
        finally:
            succeed(unionfs("umount", at))


def _change(root: Path) -> None:
    """Changes of all kinds."""
    (root / "d/f1").write_text("changed\n")
    (root / "d/f2").unlink()
    (root / "d/f3").chmod(0o600)
    os.setxattr(root / "d/f3", "user.x", b"y")
    os.rename(root / "d/f4", root / "d/renamed")
    os.rename(root / "d/sub", root / "d/sub2")
    (root / "d/sub2/deep/g1").write_text("in a renamed directory\n")
    shutil.rmtree(root / "e")
    (root / "e").mkdir()
    (root / "e/opaque").write_text("new\n")
    os.link(root / "d/f5", root / "d/f5-linked")
    (root / "new").mkdir(mode=0o750)
    (root / "new/file").write_text("new\n")
    (root / "new/fifo").unlink(missing_ok=True)
    os.mkfifo(root / "new/fifo")
    (root / "link").unlink()
    (root / "link").symlink_to("elsewhere")


@pytest.fixture(params=_SESSIONS)
def made(request: pytest.FixtureRequest, kernel_overlay: None, area: Path) -> Iterator[Snapshots]:
    session, _, kind = request.param.partition(" ")
    if reason := mounting.session_reason(session):
        pytest.skip(reason)
    place = request.getfixturevalue("filesystem")(kind, _DISK) if kind else area
    with _made(place, session) as found:
        yield found


def test_contents(made: Snapshots) -> None:
    """A snapshot has what the union showed, wherever it is mounted; the union goes on with the same
    inodes."""
    _change(made.union)
    before = shown(made.union)
    numbers = {path: (made.union / path).lstat().st_ino for path in before}
    made.copy("first")
    first = made.take("first")
    assert first["open_files"] == 0
    assert first["files"] == []
    assert shown(made.union) == before
    assert {path: (made.union / path).lstat().st_ino for path in before} == numbers
    (made.union / "d/f1").write_text("changed again\n")
    (made.union / "d/f6").write_text("only now\n")
    (made.union / "d/renamed").unlink()
    os.rename(made.union / "d/sub2", made.union / "d/sub3")
    shutil.rmtree(made.union / "new")
    changed = [path for path in numbers if (made.union / path).exists() and not path.startswith("new")]
    assert {path: (made.union / path).lstat().st_ino for path in changed} == {
        path: numbers[path] for path in changed
    }
    after = shown(made.union)
    made.take("second")
    assert shown(made.union) == after
    copied = shown(made.area / "copy-first")
    assert made.ours("first") == copied == before
    assert made.kernels("first") == before
    assert made.ours("second") == made.kernels("second") == after


def test_restore(made: Snapshots) -> None:
    """What a snapshot has shows again at once, also names that the kernel knew not to exist, and the other
    way."""
    _change(made.union)
    before = shown(made.union)
    made.take("first")
    (made.union / "d/f1").write_text("changed again\n")
    shutil.rmtree(made.union / "d/sub2")
    (made.union / "d/sub2").mkdir()
    (made.union / "d/sub2/later").write_text("later\n")
    (made.union / "later").write_text("later\n")
    os.rename(made.union / "new", made.union / "newer")
    assert not (made.union / "new").exists()
    after = shown(made.union)
    made.take("second")
    (made.union / "later").write_text("dropped\n")
    with (made.union / "later").open("r+") as dropped, (made.union / "d/f7").open() as stays:
        made.restore("first")
        assert shown(made.union) == before
        assert not (made.union / "later").exists()
        assert dropped.read() == "dropped\n"
        dropped.write("and more\n")
        dropped.seek(0)
        assert dropped.read() == "dropped\nand more\n"
        assert stays.read() == "top 7\n"
    made.restore("second")
    assert shown(made.union) == after
    (made.union / "d/f1").write_text("on the second\n")
    assert made.ours("first") == before
    made.restore("first")
    assert shown(made.union) == before
    assert {name for name, one in made.listed().items() if one["current"]} == {"first"}


def test_programs_go_on(made: Snapshots) -> None:
    """Open files, mappings, removed files and the working directory go on in the union, and not in the
    snapshot."""
    (made.union / "new").mkdir()
    files = {name: made.union / f"new/{name}" for name in ("written", "mapped", "closed", "removed", "read")}
    for path in files.values():
        path.write_bytes(b"before" * 1000)
    other = made.union / "d/f5-linked"
    os.link(made.union / "d/f5", other)
    written = files["written"].open("r+b", buffering=0)
    with files["mapped"].open("r+b") as file, files["closed"].open("r+b") as closed:
        mapping, outlives = mmap.mmap(file.fileno(), 6000), mmap.mmap(closed.fileno(), 6000)
        closed.close()
        removed = files["removed"].open("r+b", buffering=0)
        files["removed"].unlink()
        nameless = os.open(made.union / "new", os.O_TMPFILE | os.O_RDWR, 0o600)
        os.write(nameless, b"before")
        linked = (made.union / "d/f5").open("r+b", buffering=0)
        reader = files["read"].open("rb", buffering=0)
        here = os.open(made.union / "new", os.O_RDONLY | os.O_DIRECTORY)
        mapping.flush()
        outlives.flush()
        os.sync()
        before = shown(made.union)
        made.take("first")
        written.write(b"AFTER")
        mapping[:5] = outlives[:5] = b"AFTER"
        removed.write(b"AFTER")
        linked.write(b"AFTER")
        os.pwrite(nameless, b"AFTER", 0)
        os.link(f"/proc/self/fd/{nameless}", made.union / "new/named", src_dir_fd=here, follow_symlinks=True)
        (made.union / "new/through-fd").unlink(missing_ok=True)
        os.close(os.open("through-fd", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        mapping.flush()
        outlives.flush()
        for name in ("written", "mapped", "closed"):
            assert files[name].read_bytes() == b"AFTERe" + b"before" * 999, name
        removed.seek(0)
        assert removed.read() == b"AFTERe" + b"before" * 999
        assert (made.union / "new/named").read_bytes() == b"AFTERe"
        assert other.read_bytes() == b"AFTER" + b"top 5\n"[5:]
        assert other.stat().st_ino == (made.union / "d/f5").stat().st_ino
        assert os.fstat(written.fileno()).st_ino == files["written"].stat().st_ino
        assert (made.union / "new/through-fd").exists()
        files["read"].write_bytes(b"AFTER")
        assert files["read"].read_bytes() == b"AFTER"
        # As in a lower: with a backing file of its own it keeps that.
        assert reader.read() == (b"AFTER" if made.mount.session == "direct-cached" else b"before" * 1000)
        mapping.close()
        outlives.close()
        for one in (written, removed, linked, reader):
            one.close()
        os.close(nameless)
        os.close(here)
    assert made.ours("first") == made.kernels("first") == before


def test_no_byte_is_lost(made: Snapshots) -> None:
    """Writers go on over snapshots: each line of each is there once, in order; each snapshot has a beginning
    of them."""
    stop, counts = threading.Event(), [0] * 4

    def write(number: int) -> None:
        with (made.union / f"log{number}").open("wb", buffering=0) as file:
            while not stop.is_set():
                file.write(b"%08d\n" % counts[number])
                counts[number] += 1
                if number % 2:
                    file.close()
                    file = (made.union / f"log{number}").open("ab", buffering=0)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(counts))]
    for thread in threads:
        thread.start()
    for number in range(_TAKEN):
        time.sleep(0.05)
        made.take(f"while{number}")
    stop.set()
    for thread in threads:
        thread.join()
    listed = made.listed()
    for number, count in enumerate(counts):
        assert (made.union / f"log{number}").read_bytes() == b"".join(b"%08d\n" % one for one in range(count))
        whole = (made.union / f"log{number}").read_bytes()
        for one in range(_TAKEN):
            lowers = listed[f"while{one}"]["lowers"]
            at = next(
                (Path(path) / f"log{number}" for path in lowers if (Path(path) / f"log{number}").exists()),
                None,
            )
            assert at is not None
            kept = at.read_bytes()
            if made.mount.session != "direct-cached":
                assert whole.startswith(kept)
            for start in range(0, len(kept), mmap.PAGESIZE):  # the kernel writes pages back in any order
                page = kept[start : start + mmap.PAGESIZE].rstrip(b"\0")
                assert whole[start:].startswith(page)


def test_hard_links_of_a_lower(made: Snapshots) -> None:
    """A copy in the index, some of whose names are only in a lower, has all names in the snapshot."""
    (made.union / "d/f10").write_text("changed by one name\n")
    before = shown(made.union)
    made.take("first")
    assert shown(made.union) == before
    (made.union / "e/f10-linked").write_text("changed by another\n")
    for name in ("d/f10", "d/f10-linked", "e/f10-linked"):
        assert (made.union / name).read_text() == "changed by another\n"
        assert (made.union / name).stat().st_nlink == 3
    assert made.ours("first") == made.kernels("first") == before
    made.restore("first")
    assert shown(made.union) == before


def test_the_short_form(hybrid: Snapshots) -> None:
    """A mount in place of a command."""
    made = hybrid
    assert succeed(unionfs("snapshot", made.union, "first")) == "first\n"
    found = json.loads(succeed(unionfs("snapshot", made.union.name, "--json", cwd=made.union.parent)))
    assert set(made.listed()) == {"first", found["name"]}
    refused(unionfs("snapshot", made.area / "none"), "not an active unionfs mount")
    done = unionfs("snapshot", "creat", made.union)
    assert done.returncode == 1
    assert "no such command 'creat'" in done.stderr


def test_bad_input(hybrid: Snapshots) -> None:
    made = hybrid
    made.take("first")
    refused(unionfs("snapshot", "create", made.union, "first"), "first", "already")
    refused(unionfs("snapshot", "create", made.union, "a/b"), "a/b")
    refused(unionfs("snapshot", "create", made.area), "not an active unionfs mount")
    refused(unionfs("snapshot", "restore", made.union, "second"), "no snapshot second")
    refused(unionfs("snapshot", "restore", made.union, ".."), "..")
    assert set(made.listed()) == {"first"}


@contextmanager
def _made(area: Path, session: str, *options: str) -> Iterator[Snapshots]:
    lowers = [area / "top", area / "bottom"]
    for lower, text in zip(lowers, ("top", "bottom"), strict=True):
        lower.mkdir()
        fill(lower, text)
    os.link(lowers[0] / "d/f10", lowers[0] / "d/f10-linked")
    os.link(lowers[0] / "d/f10", lowers[0] / "e/f10-linked")
    for name in ("upper", "work"):
        (area / name).mkdir()
    layers = {"lowers": lowers, "upper": area / "upper", "work": area / "work"}
    with mounted(area, **layers, session=session, options=options) as mount:
        yield Snapshots(area, mount)


@pytest.fixture
def hybrid(kernel_overlay: None, area: Path) -> Iterator[Snapshots]:
    """The same on the session that is the default here."""
    with _made(area, "direct") as found:
        yield found


@pytest.mark.slow
def test_removal_with_metacopy(kernel_overlay: None, area: Path) -> None:
    """Files of which only metadata was copied up have their data after layers were joined."""
    trees: dict[str, Shown] = {}
    with _made(area, "direct", "metacopy=on") as made:
        root = made.union
        for number, change in enumerate((
            lambda: ((root / "d/f1").chmod(0o600), (root / "d/f2").chmod(0o611)),
            lambda: (os.chown(root / "d/f1", 5, 6), os.rename(root / "d/f2", root / "e/moved")),
            lambda: (os.setxattr(root / "d/f1", "user.a", b"b"), (root / "d/f4").chmod(0o600)),
            lambda: ((root / "d/f4").write_text("data"), (root / "e/moved").chmod(0o644)),
        )):  # fmt: skip
            change()
            trees[f"s{number}"] = shown(root)
            made.take(f"s{number}")
        succeed(unionfs("snapshot", "rm", "--wait", root, "s1", "s0"))
        assert len(made.listed()["s3"]["lowers"]) == 4
        for name in ("s2", "s3"):
            assert made.ours(name) == trees[name]
        assert shown(root) == trees["s3"]


@pytest.mark.slow
def test_removal_joins_layers(hybrid: Snapshots) -> None:
    """Each of the snapshots that are left has what it had, here and on kernel overlayfs, when others are
    removed."""
    trees: dict[str, Shown] = {}

    def take(name: str) -> None:
        trees[name] = shown(hybrid.union)
        hybrid.take(name)

    _change(hybrid.union)
    take("s1")
    root = hybrid.union
    (root / "d/f1").unlink()
    (root / "d/f3").chmod(0o640)
    (root / "d/f8").write_text("changed\n")
    os.rename(root / "d/sub2", root / "e/sub4")
    (root / "e/sub4/deep/g2").unlink()
    shutil.rmtree(root / "vanishes")
    os.link(root / "d/f5", root / "d/f5-third")
    take("s2")
    (root / "vanishes").mkdir()
    (root / "vanishes/again").write_text("x")
    os.rename(root / "e/sub4", root / "sub5")
    (root / "d/f8").unlink()
    (root / "d/f8").mkdir()
    (root / "d/f1").write_text("back\n")
    (root / "d/f12").chown(1, 2) if hasattr(root, "chown") else os.chown(root / "d/f12", 1, 2)
    take("s3")
    (root / "sub5/deep/g3").write_text("last\n")
    os.setxattr(root / "new/file", "user.last", b"1")
    take("s4")
    now = trees["now"] = shown(root)
    succeed(unionfs("snapshot", "rm", "--wait", root, "s2"))
    assert set(hybrid.listed()) == {"s1", "s3", "s4"}
    assert shown(root) == now
    for name in ("s1", "s3", "s4"):
        assert hybrid.ours(name) == trees[name], name
        assert hybrid.kernels(name) == trees[name], name
    succeed(unionfs("snapshot", "rm", "--wait", root, "s1"))
    for name in ("s3", "s4"):
        assert hybrid.ours(name) == trees[name], name
        assert hybrid.kernels(name) == trees[name], name
    assert len(hybrid.listed()["s4"]["lowers"]) == 4
    hybrid.restore("s3")
    assert shown(root) == trees["s3"]
    succeed(unionfs("snapshot", "rm", "--wait", root, "s4"))
    assert set(os.listdir(hybrid.area / "upper.snapshots")) == {
        Path(hybrid.listed()["s3"]["layer"]).name, "record.json", "joining.lock",
    }  # fmt: skip
    assert shown(root) == trees["s3"]


def test_diff(hybrid: Snapshots) -> None:
    """What changed between two, to the present state, back, and between two that do not lie on each other."""

    def changes(*names: str) -> set[tuple[str, str]]:
        found = json.loads(succeed(unionfs("snapshot", "diff", "--json", hybrid.union, *names)))
        return {(one["change"], one["path"]) for one in found}

    root = hybrid.union
    (root / "d/f1").write_text("first\n")
    hybrid.take("s1")
    (root / "d/f2").unlink()
    (root / "added").mkdir()
    (root / "added/file").write_text("x\n")
    (root / "d/f3").chmod(0o600)
    os.rename(root / "d/sub", root / "d/sub2")
    hybrid.take("s2")
    (root / "d/f1").write_text("present\n")
    (root / "d/f4").write_bytes((root / "d/f4").read_bytes())
    os.utime(root / "d/f4", ns=(0, (hybrid.area / "top/d/f4").stat().st_mtime_ns))
    expected = {("D", "d/f2"), ("A", "added"), ("A", "added/file"), ("C", "d/f3"), ("R", "d/sub2")}
    assert changes("s1", "s2") == expected
    assert changes("s2") == {("C", "d/f1")}
    assert changes("s1") == expected | {("C", "d/f1")}
    # The other way a rename is a removal and an addition with all that is below.
    opposite = {
        ("A", "d/f2"),
        ("D", "added"),
        ("C", "d/f3"),
        ("D", "d/sub2"),
        ("A", "d/sub"),
        ("A", "d/sub/deep"),
    }
    opposite |= {("A", f"d/sub/deep/g{number}") for number in range(20)}
    assert changes("s2", "s1") == opposite
    assert changes("s2", "s2") == set()
    hybrid.restore("s1")
    (root / "d/f5").unlink()
    hybrid.take("s3")
    assert changes("s2", "s3") == opposite | {("D", "d/f5")}
    refused(unionfs("snapshot", "diff", root, "s1", "nothing"), "nothing")
    assert "d/f5" in succeed(unionfs("snapshot", "diff", "--stat", root, "s1"))


@pytest.mark.slow
def test_a_hundred(hybrid: Snapshots) -> None:
    """Snapshots stack; each has its state, and the union all."""
    root = hybrid.union

    def entries() -> list[live.LiveMount]:
        return [one for one in live.entries() if one.settings.mountpoint == str(root)]

    assert wait_for(entries)  # it comes after the mount is usable
    (entry,) = entries()
    (root / "many").mkdir()
    with (root / "many/open").open("wb", buffering=0) as file:
        for number in range(100):
            (root / f"many/{number}").write_text(f"{number}\n")
            (root / "many/same").write_text(f"{number}\n")
            file.write(b"%d\n" % number)
            snapshots.take(entry, f"s{number:03d}")
    assert sorted(os.listdir(root / "many")) == sorted([*map(str, range(100)), "same", "open"])
    assert (root / "many/open").read_text() == "".join(f"{number}\n" for number in range(100))
    whole = shown(root)
    for number in (0, 57):
        seen = hybrid.kernels(f"s{number:03d}")
        assert sorted(name for name in seen if name.startswith("many/")) == sorted(
            ["many/same", "many/open", *(f"many/{one}" for one in range(number + 1))]
        )
        assert seen["many/same"][-1] == (len(f"{number}\n"), f"{number}\n".encode())
        text = "".join(f"{one}\n" for one in range(number + 1))
        assert seen["many/open"][-1] == (len(text), text.encode())
    assert hybrid.kernels("s099") == whole
    hybrid.restore("s042")
    assert (root / "many/same").read_text() == "42\n"
    assert not (root / "many/43").exists()


# -- ends ---------------------------------------------------------------------------------------------------


def _again(place: Place, *, kernel: bool = True) -> Shown:
    """What the upper shows when it is mounted again, first by unionfs, then by kernel overlayfs."""
    place.mount()
    try:
        lowers = [Path(path) for path in place.entry().settings.lowers]
        seen = shown(place.merged)
    finally:
        succeed(unionfs("umount", place.merged))
    at = place.root / "kernel"
    at.mkdir(exist_ok=True)
    with kernel_mounted(at, lowers=lowers, upper=place.upper, work=place.work) as mount:
        assert shown(mount.mountpoint) == seen
    return seen


def test_mounted_again(kernel_overlay: None, place: Place) -> None:
    """A mount of the upper has its snapshots below it, also if they are given; other ones are refused."""
    place.mount()
    (place.merged / "base").write_text("first\n")
    succeed(unionfs("snapshot", "create", place.merged, "first"))
    (place.merged / "later").write_text("later\n")
    before = shown(place.merged)
    listed = json.loads(succeed(unionfs("snapshot", "ls", "--json", place.merged)))
    succeed(unionfs("umount", place.merged))
    assert _again(place) == before
    words = [word for path in listed[0]["lowers"] for word in ("-l", path)]
    succeed(unionfs("mount", *words, "-u", place.upper, "-w", place.work, place.merged))
    assert shown(place.merged) == before
    (place.merged / "base").write_text("second\n")
    succeed(unionfs("snapshot", "create", place.merged, "second"))
    succeed(unionfs("umount", place.merged))
    refused(unionfs("mount", *words, "-u", place.upper, "-w", place.work, place.merged), "other snapshots")
    (place.root / "upper.snapshots/record.json").write_text("{}")
    refused(unionfs("mount", *place.layers, place.merged), "cannot be read")


@pytest.mark.parametrize(
    "step",
    [
        pytest.param("staged", marks=pytest.mark.slow),
        pytest.param("announced", marks=pytest.mark.slow),
        "exchanged",
    ],
)
@pytest.mark.parametrize("what", ["snapshot", "restore"])
def test_killed_between_steps(kernel_overlay: None, place: Place, what: str, step: str) -> None:
    """The old or the new stack is there after each step on disk, and the next snapshot works."""
    place.mount()
    (place.merged / "base").write_text("first\n")
    succeed(unionfs("snapshot", "create", place.merged, "first"))
    first = shown(place.merged)
    (place.merged / "later").write_text("later\n")
    before = shown(place.merged)
    succeed(unionfs("umount", place.merged))
    with Owned(os.open(place.upper, os.O_PATH)) as fd, Store(fd, str(place.upper)) as store:
        assert store.open(make=False)
        record = store.record()
        after, id_ = added(record, "second")
        with store.staged(id_) as new, Owned(new):
            shutil.copystat(place.upper, f"/proc/self/fd/{new}")
            if what == "restore":
                after = replace(record, last=int(id_))
            if step != "staged":
                store.announce(after, new)
            if step == "exchanged":
                store.exchange(id_)
    expected = first if (what, step) == ("restore", "exchanged") else before
    assert _again(place) == expected
    names = ["first", *(["second"] if (what, step) == ("snapshot", "exchanged") else [])]
    place.mount()
    listed = json.loads(succeed(unionfs("snapshot", "ls", "--json", place.merged)))
    assert [one["name"] for one in listed] == names
    succeed(unionfs("snapshot", "create", place.merged, "third"))
    wait_for(lambda: len(list((place.root / "upper.snapshots").glob("0*"))) == len(names) + 1)
    succeed(unionfs("umount", place.merged))
    assert _again(place) == expected


@pytest.mark.slow
def test_killed_at_any_time(kernel_overlay: None, place: Place) -> None:
    """The daemon is killed while it takes a snapshot with open files: all of them are as before."""
    for number in range(10):
        pid = place.mount()
        files = [(place.merged / f"open{one}").open("ab", buffering=0) for one in range(50)]
        for file in files:
            file.write(b"%d\n" % number)
        before = shown(place.merged)
        with subprocess.Popen(
            [*UNIONFS, "snapshot", "create", "--no-stop", str(place.merged), f"killed{number}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
        ) as call:  # fmt: skip
            time.sleep(0.15 + number * 0.05)
            os.kill(pid, signal.SIGKILL)
            call.wait(30)
        for file in files:
            with suppress(OSError):
                file.close()
        succeed(unionfs("cleanup", place.merged))
        assert _again(place) == before


def test_killed_while_programs_are_stopped(hybrid: Snapshots) -> None:
    """Programs that the command has stopped go on when it is killed."""
    log = hybrid.union / "log"
    script = f"exec 3>>{log}; while echo line >&3; do sleep 0.01; done"
    with subprocess.Popen(["sh", "-c", script]) as writer:
        assert wait_for(lambda: log.exists() and log.read_text().count("line") > 3)
        ready, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                with Stopped() as stopped:
                    stopped.stop_all(lambda: {writer.pid}, 5.0)
                    os.write(told, b"1" if stopped.pids else b"0")
                    signal.pause()
            finally:
                os._exit(1)
        assert os.read(ready, 1) == b"1"
        before = log.read_text()
        assert Path(f"/proc/{writer.pid}/stat").read_text().rpartition(")")[2].split()[0] == "t"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert wait_for(lambda: log.read_text() != before)
        writer.kill()
        os.close(ready)
        os.close(told)


def test_refusals(kernel_overlay: None, place: Place) -> None:
    """Where the layers cannot change, one sentence says so, and nothing has changed."""
    for words, why in (
        (("--session", "pyfuse3"), "pyfuse3"), (("-o", "outlive"), "outlive"),
        (("--watch-lower",), "--watch-lower"), (("-o", "ro"), "read-only"),
    ):  # fmt: skip
        place.mount(*words)
        refused(unionfs("snapshot", "create", place.merged, "first"), why)
        succeed(unionfs("umount", place.merged))
    (place.root / "branch.json").touch()
    place.mount()
    refused(unionfs("snapshot", "create", place.merged, "first"), "belongs to a branch")
    succeed(unionfs("umount", place.merged))
    succeed(unionfs("mount", "-l", place.lower, place.merged))
    refused(unionfs("snapshot", "create", place.merged, "first"), "no upper")
    refused(unionfs("snapshot", "ls", place.merged), "no upper")
    succeed(unionfs("umount", place.merged))
    assert not (place.root / "upper.snapshots").exists()


def test_of_an_ordinary_user(host: Host, place: Place) -> None:
    """A user's own mount has snapshots, too, if its upper's directory is the user's; root leaves them to the
    user."""
    host.mount()
    succeed(host.run("sh", "-c", f"cd {place.merged} && echo first > base && mkdir d && echo x > d/x"))
    refused(host.unionfs("snapshot", "create", place.merged, "first"), "cannot be made", "writable")
    os.chown(place.root, UID, UID)
    with subprocess.Popen(
        ["nsenter", "-t", str(host.holder.pid), "-m", "setpriv", "--reuid", str(UID), "--regid",
         str(UID), "--clear-groups", "--",
         "sh", "-c", f"exec 3>>{place.merged}/d/log; while echo line >&3; do sleep 0.01; done"],
    ) as writer:  # fmt: skip
        assert wait_for(lambda: host.run("cat", place.merged / "d/log").stdout.count("line") > 3)
        succeed(host.unionfs("snapshot", "create", place.merged, "first"))
        taken = host.run("cat", place.merged / "d/log").stdout.count("line")
        assert wait_for(lambda: host.run("cat", place.merged / "d/log").stdout.count("line") > taken)
        writer.kill()
    succeed(host.run("sh", "-c", f"cd {place.merged} && echo second > base && rm -r d"))
    assert "D d/\n" in succeed(host.unionfs("snapshot", "diff", place.merged, "first"))
    by_root = host.root(
        "env", f"PYTHONPATH={REPOSITORY}", *UNIONFS, "snapshot", "create", place.merged, check=False
    )
    refused(by_root, "mount of uid", str(UID))
    succeed(host.unionfs("snapshot", "restore", place.merged, "first"))
    assert host.run("cat", place.merged / "base", place.merged / "d/x").stdout == "first\nx\n"
    succeed(host.unionfs("umount", place.merged))
    host.mount()
    assert host.run("cat", place.merged / "base").stdout == "first\n"
    succeed(host.unionfs("umount", place.merged))


def test_snapshot_in_use(hybrid: Snapshots) -> None:
    hybrid.take("first")
    at = hybrid.area / "elsewhere"
    at.mkdir()
    words = [word for path in hybrid.listed()["first"]["lowers"] for word in ("-l", path)]
    succeed(unionfs("mount", *words, at))
    refused(unionfs("snapshot", "rm", hybrid.union, "first"), "in use", str(at))
    succeed(unionfs("umount", at))
    succeed(unionfs("snapshot", "rm", hybrid.union, "first"))
    assert hybrid.listed() == {}


def test_no_space_for_copies(root: None, area: Path, filesystem: Callable[..., Path]) -> None:
    """If a file that is open for writing cannot be copied, nothing changes, and programs go on."""
    small = filesystem("ext4", size=24 << 20)
    for path in (area / "lower", small / "upper", small / "work"):
        path.mkdir()
    layers = {"lowers": [area / "lower"], "upper": small / "upper", "work": small / "work"}
    with mounted(area, **layers, session="direct") as mount:
        top = mount.mountpoint
        (top / "d").mkdir()
        small_file, large_file = top / "d/small", top / "d/large"
        with small_file.open("wb", buffering=0) as one, large_file.open("wb", buffering=0) as two:
            one.write(b"small")
            two.write(b"x" * (14 << 20))
            before = shown(top)
            refused(unionfs("snapshot", "create", top, "first"), "no space left on device; free space.")
            assert shown(top) == before
            one.write(b" and more")
            two.write(b"y")
            assert (top / "d/small").read_bytes() == b"small and more"
            assert (small / "upper/d/small").read_bytes() == b"small and more"
            two.truncate(0)
            succeed(unionfs("snapshot", "create", top, "first"))
            one.write(b" again")
        assert (top / "d/small").read_bytes() == b"small and more again"
        listed = json.loads(succeed(unionfs("snapshot", "ls", "--json", top)))
        assert (Path(listed[0]["layer"]) / "d/small").read_bytes() == b"small and more"


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_copies_share_blocks(kernel_overlay: None, filesystem: Callable[..., Path], kind: str) -> None:
    """With reflinks the copy of an open file takes no space but for what is written later."""
    with _made(filesystem(kind, _DISK), "direct") as made:
        content, size = os.urandom(1 << 20) * 64, 64 << 20
        with (made.union / "large").open("w+b", buffering=0) as file:
            file.write(content)
            os.fsync(file.fileno())
            before = _used(made.area)
            assert made.take("first")["open_files"] == 1
            assert _used(made.area) - before < size / 4
            os.pwrite(file.fileno(), b"later", 5)
            os.fsync(file.fileno())
            assert _used(made.area) - before < size / 4
        assert (Path(made.listed()["first"]["layer"]) / "large").read_bytes() == content
        assert (made.union / "large").read_bytes() == content[:5] + b"later" + content[10:]


def _used(where: Path) -> int:
    """Bytes of a filesystem that are in use, with everything on disk."""
    os.sync()
    st = os.statvfs(where)
    return (st.f_blocks - st.f_bfree) * st.f_frsize
