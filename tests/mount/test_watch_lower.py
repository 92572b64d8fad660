"""`--watch-lower`: what others change in the lowers shows in the union, as in a mount that is made then."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.cli_calls import wait_for
from tests.support.live_lowers import SECONDS, World, shown, world
from tests.support.mounting import Mount, mounted

WATCH = ["watch_lower"]


@pytest.fixture
def made(kernel_overlay: None, area: Path, session: str) -> Iterator[World]:
    with world(area, session, WATCH) as found:
        yield found


def shows(condition: Callable[[], bool]) -> None:
    """Wait until the union shows a change."""

    def holds() -> bool:
        try:
            return condition()
        except OSError:  # ENOENT or ESTALE, while it is not shown yet
            return False

    assert wait_for(holds, SECONDS)


def replace(path: Path, text: str) -> None:
    """Put another file in place of one."""
    new = path.with_name("replacing")
    new.write_text(text)
    new.rename(path)


def whiteout(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))


def test_names(made: World) -> None:
    made.wait()
    (made.top / "d/f30").write_text("new\n")
    (made.bottom / "new").write_text("new\n")
    (made.top / "e/new").symlink_to("x")
    made.wait()
    (made.top / "d/f6").unlink()  # the bottom's shows
    for lower in (made.top, made.bottom):
        (lower / "d/f7").unlink()
        (lower / "d/sub/deep/g7").unlink()
    made.wait()
    replace(made.top / "d/f5", "replaced\n")
    replace(made.top / "d/f1", "below the upper's\n")
    replace(made.top / "d/f2", "below a whiteout\n")
    made.wait()
    os.rename(made.top / "d/f9", made.top / "e/moved")
    (made.top / "link").unlink()
    (made.top / "link").symlink_to("elsewhere")
    made.wait()
    os.rename(made.top / "e", made.top / "e2")
    made.wait()
    (made.top / "e2/later").write_text("later\n")
    os.rename(made.top / "d/sub/deep", made.top / "e2/deep")
    made.wait()
    (made.top / "e2/deep/g3").write_text("changed after two renames\n")
    made.wait()


def test_trees_and_types(made: World) -> None:
    shutil.rmtree(made.top / "vanishes")
    made.wait()
    shutil.rmtree(made.bottom / "vanishes")
    (made.top / "d/sub/new/x/y").mkdir(parents=True)
    (made.top / "d/sub/new/x/y/z").write_text("z\n")
    made.wait()
    (made.top / "changes-kind").unlink()
    (made.top / "changes-kind").mkdir()
    (made.top / "changes-kind/x").write_text("x")
    shutil.rmtree(made.top / "d/sub")
    (made.top / "d/sub").mkdir()
    (made.top / "d/sub/other").write_text("other")
    made.wait()
    shutil.rmtree(made.top / "changes-kind")
    (made.top / "changes-kind").write_text("a file again\n")
    shutil.copytree(made.bottom / "d", made.bottom / "copy")
    made.wait()
    (made.bottom / "copy/sub/deep/g5").write_text("in a new directory of the lower one\n")
    # What was changed there can be changed here, too.
    (made.union / "d/sub/other").write_text("copied up\n")
    (made.union / "changes-kind").write_text("copied up\n")
    made.wait()


def test_attributes(made: World) -> None:
    numbers = {name: (made.union / name).stat().st_ino for name in ("d/f3", "d/sub")}
    with (made.union / "d/f3").open("rb") as opened:
        (made.top / "d/f3").chmod(0o600)
        (made.top / "d/sub").chmod(0o700)
        made.wait()
        assert os.fstat(opened.fileno()).st_mode & 0o777 == 0o600
        os.chown(made.top / "d/f3", 1000, 1001)
        os.chown(made.top / "d/sub", 1000, 1001)
        made.wait()
        assert os.fstat(opened.fileno()).st_uid == 1000
        os.utime(made.top / "d/f3", ns=(1, 2))
        os.utime(made.bottom / "d/sub/deep/g3", ns=(1, 2))
        os.utime(made.top, ns=(1, 2))
        made.wait()
        os.setxattr(made.top / "d/f3", "user.x", b"1")
        os.setxattr(made.top / "d/sub", "user.x", b"1")
        made.wait()
        os.removexattr(made.top / "d/f3", "user.x")
        made.wait()
        assert opened.read() == b"top 3\n"
        assert os.fstat(opened.fileno()).st_uid == 1000
    assert {name: (made.union / name).stat().st_ino for name in numbers} == numbers


def test_data_in_place(made: World) -> None:
    """Of files that are cached, open and mapped."""
    path, lower = made.union / "d/sub/deep/g1", made.top / "d/sub/deep/g1"
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        size = len(mapped)
        assert mapped[:3] == b"top"
        assert opened.read() == lower.read_bytes()
        with lower.open("r+b") as writing:
            writing.write(b"new")
        shows(lambda: mapped[:3] == b"new" and os.pread(opened.fileno(), 3, 0) == b"new")
        with lower.open("ab") as writing:
            writing.write(b"appended\n")
        shows(lambda: os.pread(opened.fileno(), 100, size) == b"appended\n")
        assert os.fstat(opened.fileno()).st_size == size + 9
        os.truncate(lower, 5000)
        shows(lambda: os.fstat(opened.fileno()).st_size == 5000)
        assert os.pread(opened.fileno(), 100, 4990) == lower.read_bytes()[4990:]
        os.truncate(lower, 9000)
        shows(lambda: os.pread(opened.fileno(), 100, 8990) == bytes(10))
        assert mapped[4995:5005] == lower.read_bytes()[4995:5005]
    made.wait()


def test_what_is_open_stays(made: World) -> None:
    """A file that was replaced or removed stays as it is for those who have it open."""
    with (
        (made.union / "d/f5").open("rb") as replaced,
        (made.union / "d/sub/deep/g5").open("rb") as removed,
        mmap.mmap(removed.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        old = (made.top / "d/sub/deep/g5").read_bytes()
        replace(made.top / "d/f5", "another\n")
        (made.top / "d/sub/deep/g5").unlink()
        (made.bottom / "d/sub/deep/g5").unlink()
        made.wait()
        assert replaced.read() == b"top 5\n"
        assert removed.read() == mapped[:] == old
        assert os.fstat(removed.fileno()).st_size == len(old)
        assert os.fstat(removed.fileno()).st_nlink in (0, 1)  # as the kernel has cached it
        os.posix_fadvise(removed.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(removed.fileno(), len(old), 0) == old
        assert (made.union / "d/f5").read_text() == "another\n"


def test_the_working_directory_stays(made: World) -> None:
    here = os.open(made.union / "d/sub", os.O_RDONLY | os.O_DIRECTORY)
    try:
        (made.top / "d/sub").chmod(0o711)
        (made.top / "d/sub/fresh").write_text("fresh\n")
        shutil.rmtree(made.bottom / "d")
        made.wait()
        assert sorted(os.listdir(here)) == ["deep", "fresh"]
        assert os.fstat(here).st_mode & 0o777 == 0o711
    finally:
        os.close(here)


def test_whiteouts_and_opaque_directories(made: World) -> None:
    (made.top / "d/f3").unlink()
    whiteout(made.top / "d/f3")
    (made.top / "d/f4").unlink()
    made.wait()
    assert not (made.union / "d/f3").exists()
    assert (made.union / "d/f4").read_text() == "bottom 4\n"
    (made.bottom / "d/late").write_text("late\n")
    whiteout(made.top / "d/late")
    os.setxattr(made.top / "d/sub/deep", "trusted.overlay.opaque", b"y")
    (made.bottom / "d/sub/deep/hidden").write_text("hidden\n")
    made.wait()
    (made.top / "d/late").unlink()
    os.removexattr(made.top / "d/sub/deep", "trusted.overlay.opaque")
    (made.top / "d/f3").unlink()
    made.wait()


def test_whiteouts_by_name(made: World) -> None:
    (made.bottom / "d/one").write_text("one\n")
    shows(lambda: (made.union / "d/one").exists())
    (made.top / "d/.wh.one").touch()
    shows(lambda: not (made.union / "d/one").exists())
    (made.top / "d/.wh.one").unlink()
    shows(lambda: (made.union / "d/one").read_text() == "one\n")
    (made.bottom / "d/sub/below").write_text("below\n")
    shows(lambda: (made.union / "d/sub/below").exists())
    (made.top / "d/sub/.wh..wh..opq").touch()
    shows(lambda: not (made.union / "d/sub/below").exists())
    (made.top / "d/sub/.wh..wh..opq").unlink()
    shows(lambda: (made.union / "d/sub/below").exists())


def test_hard_links(kernel_overlay: None, area: Path, session: str) -> None:
    """Of which all names, some or none are known."""
    with world(area, session, WATCH, links=True) as made:
        (made.top / "d/f10").write_text("changed by one name\n")
        made.wait()
        os.link(made.top / "e/link2", area / "outside")
        (area / "outside").write_text("changed by a name outside\n")
        made.wait()
        replace(made.top / "e/link1", "another file\n")
        made.wait()
        (made.top / "e/link0").unlink()
        made.wait()
        os.rename(made.top / "e/link2", made.top / "e/link3")
        made.wait()
        os.rename(made.top / "d/f10", made.top / "e/link4")
        (area / "outside").write_text("changed again\n")
        made.wait()


def test_hard_links_without_an_upper(root: None, area: Path, session: str) -> None:
    for name in ("a", "b"):
        (area / "lower" / name).mkdir(parents=True)
    lower = area / "lower"
    (lower / "a/one").write_text("one\n")
    for name in ("a/two", "b/three", "b/four"):
        os.link(lower / "a/one", lower / name)
    with mounted(area, lowers=[lower], session=session, options=WATCH) as mount:

        def same() -> bool:
            seen = shown(mount.mountpoint)
            return seen == shown(lower) and all(
                (mount.mountpoint / name).stat().st_nlink == (lower / name).stat().st_nlink
                for name in seen
                if not stat.S_ISDIR(int(str(seen[name][0]), 8))
            )

        shows(same)
        (lower / "b/three").write_text("changed\n")
        shows(same)
        replace(lower / "a/one", "replaced\n")
        shows(same)
        (lower / "a/two").rename(lower / "b/two")
        shows(same)
        (lower / "b/four").unlink()
        (lower / "b/three").chmod(0o600)
        shows(same)
        (lower / "b/two").rename(lower / "a/two")
        (lower / "b/three").write_text("changed again\n")
        shows(same)


def test_new_hard_links(made: World) -> None:
    for number in range(3):
        os.link(made.top / "d/f10", made.top / f"e/link{number}")
    made.wait()
    number = (made.union / "e/link0").stat().st_ino
    (made.top / "e/link1").write_text("changed by one name\n")
    made.wait()
    (made.top / "d/f10").unlink()
    replace(made.top / "e/link1", "another file\n")
    made.wait()
    (made.top / "e/link2").chmod(0o640)
    made.wait()
    assert (made.union / "e/link0").stat().st_ino == number
    (made.union / "e/link0").write_text("copied up\n")
    (made.top / "e/link2").write_text("the copy stays\n")
    assert (made.union / "e/link0").read_text() == "copied up\n"


def test_the_upper_stays(made: World) -> None:
    """Neither a copied-up file nor what was written to it is touched by changes below it."""
    with (made.union / "d/f11").open("r+b") as opened:
        opened.write(b"ours")
        opened.flush()
        (made.top / "d/f11").write_text("theirs\n")
        replace(made.bottom / "d/f11", "theirs\n")
        (made.top / "d/f12").write_text("seen\n")
        shows(lambda: (made.union / "d/f12").read_text() == "seen\n")
        assert (made.union / "d/f11").read_bytes() == b"ours11\n"
    made.wait()


def test_copy_up_after_a_change(made: World) -> None:
    """What is copied up is the lower's present file."""
    (made.top / "d/f13").write_text("longer than before\n")
    shows(lambda: (made.union / "d/f13").stat().st_size == 19)
    with (made.union / "d/f13").open("a") as appending:
        appending.write("appended\n")
    assert (made.union / "d/f13").read_text() == "longer than before\nappended\n"
    assert (made.top / "d/f13").read_text() == "longer than before\n"


def test_what_is_mounted_inside_stays(made: World) -> None:
    for name in ("d/sub", "e"):
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(made.union / name)], check=True)
        (made.union / name / "inside").touch()
    try:
        (made.top / "d/sub").chmod(0o700)
        (made.top / "d/sub/below").write_text("below the mount\n")
        (made.top / "e/new").write_text("below the mount\n")
        (made.top / "d/f3").write_text("changed\n")
        shows(lambda: (made.union / "d/f3").read_text() == "changed\n")
        assert os.listdir(made.union / "d/sub") == os.listdir(made.union / "e") == ["inside"]
    finally:
        for name in ("d/sub", "e"):
            subprocess.run(["umount", str(made.union / name)], check=True)
    made.wait()


def _change(made: World, chance: random.Random) -> None:
    """Change something in one of the lowers."""
    lower = chance.choice([made.top, made.bottom])
    paths = [path for path in sorted(lower.rglob("*")) if not path.is_symlink()]
    files = [path for path in paths if path.is_file()]
    directories = [*(path for path in paths if path.is_dir()), lower]
    where = chance.choice(directories)
    new = where / f"f{chance.randrange(30)}"
    match chance.randrange(14):
        case 0 | 1 if files:
            chance.choice(files).write_text("x" * chance.randrange(9000))
        case 2 if files:
            with chance.choice(files).open("a") as appending:
                appending.write("more\n")
        case 3 | 4 if files:
            chance.choice(files).unlink()
        case 5 if files:
            replace(chance.choice(files), f"replaced {chance.random()}\n")
        case 6 if files and not new.exists() and not new.is_symlink():
            chance.choice(files).rename(new)
        case 7 if not new.exists() and not new.is_symlink():
            (new / "x").mkdir(parents=True)
            (new / "x/y").write_text("y\n")
        case 8 if where != lower:
            shutil.rmtree(where)
        case 9 if where != lower and not new.exists() and where not in new.parents:
            where.rename(new)
        case 10:
            chance.choice([*files, where]).chmod(chance.choice([0o755, 0o700, 0o644]))
        case 11 if not new.exists() and not new.is_symlink():
            new.symlink_to(f"to{chance.random()}")
        case 12 if lower == made.top and not new.exists() and not new.is_symlink():
            whiteout(new)
        case 13 if lower == made.top and where != lower:
            os.setxattr(where, "trusted.overlay.opaque", chance.choice([b"y", b"n"]))
        case _ if not new.exists() and not new.is_symlink():
            new.write_text(f"{chance.random()}\n")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_any_changes(made: World, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(25):
        for _ in range(chance.randrange(1, 12)):
            _change(made, chance)
            if chance.random() < 0.2:
                made.seen()
        made.wait()


def _git(where: Path, *arguments: str) -> None:
    command = ["git", "-c", "user.name=n", "-c", "user.email=e", "-c", "gc.auto=0", *arguments]
    subprocess.run(command, cwd=where, check=True, capture_output=True)


@pytest.fixture
def tree(root: None, area: Path, session: str) -> Iterator[Mount]:
    """A union with one lower, in which others work."""
    for name in ("lower", "upper", "work"):
        (area / name).mkdir()
    with mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session,
        options=WATCH,
    ) as mount:
        yield mount


def _texts(root: Path) -> dict[str, str] | None:
    """All files of a tree; None if it changes meanwhile."""
    found = {}
    for where, _, names in os.walk(root):
        for name in names:
            path = os.path.join(where, name)
            try:
                found[os.path.relpath(path, root)] = Path(path).read_text()
            except OSError:
                return None
    return found


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.watchdog(380)
def test_a_checkout_of_ten_thousand_files(tree: Mount) -> None:
    (lower,) = tree.lowers
    _git(lower, "init", "-q", "-b", "one", ".")
    shutil.move(lower / ".git", lower.parent / "git")  # its own files are not the subject
    at = ("--git-dir", str(lower.parent / "git"), "--work-tree", str(lower))
    for number in range(10_000):
        path = lower / f"d{number % 50}/s{number % 7}/f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"one {number}\n")
    _git(lower, *at, "add", "-A")
    _git(lower, *at, "commit", "-qm", "one")
    _git(lower, *at, "checkout", "-qb", "two")
    for number in range(10_000):
        path = lower / f"d{number % 50}/s{number % 7}/f{number}"
        if number % 10 == 0:
            path.rename(path.with_name(f"n{number}"))
        else:
            path.write_text(f"two, {number}, longer\n")
    _git(lower, *at, "add", "-A")
    _git(lower, *at, "commit", "-qm", "two")
    for branch in ("one", "two"):
        assert _texts(tree.mountpoint) is not None  # now all is cached
        _git(lower, *at, "checkout", "-q", branch)
        expected = _texts(lower)
        # Reading all takes long on a busy machine, and the first time may have begun too early.
        assert any(_texts(tree.mountpoint) == expected for _ in range(3))


def test_more_changes_than_the_queue_takes(tree: Mount) -> None:
    """The daemon does not see which names these are, and looks at all."""
    (lower,) = tree.lowers
    queue = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    names = [f"d{number % 9}/f{number}" for number in range(300)]
    for number in range(9):
        (lower / f"d{number}").mkdir()
    for name in names:
        (lower / name).write_text("old\n")
    expected = shown(lower)
    shows(lambda: shown(tree.mountpoint) == expected)
    assert not (tree.mountpoint / "d0/last").exists()
    os.kill(tree.pid, signal.SIGSTOP)
    try:
        for _ in range(queue // len(names) + 1):
            for name in names:
                os.utime(lower / name)
        for name in names[::2]:
            (lower / name).write_text("new and longer\n")
        (lower / "d0/last").write_text("last\n")
    finally:
        os.kill(tree.pid, signal.SIGCONT)
    expected = shown(lower)
    shows(lambda: shown(tree.mountpoint) == expected)
    (lower / "d0/last").write_text("the watches go on\n")
    shows(lambda: (tree.mountpoint / "d0/last").read_text() == "the watches go on\n")


def test_watches_end(tree: Mount) -> None:
    (lower,) = tree.lowers
    for number in range(10):
        (lower / f"d{number}/x").mkdir(parents=True)

    def watches() -> int:
        # The kernel forgets what was new while it was looked up; the next walk brings it back.
        shown(tree.mountpoint)
        return tree.figure("watches")

    shows(lambda: watches() == 21)
    for number in range(10):
        shutil.move(lower / f"d{number}", lower.parent)
    shows(lambda: os.listdir(tree.mountpoint) == [])
    shows(lambda: tree.figure("watches") == 1)
    assert tree.figure("watches_refused") == 0
