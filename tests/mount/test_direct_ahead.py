"""Listings prepared before their request: useful for a walk, and never visible."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.mount import direct_calls as dc
from tests.support.mounting import mounted
from tests.support.syscalls import drop_caches
from tests.support.world import World, errno_of

MakeWorld = Callable[..., World]
EVERY = 19
"""Directories between two that are changed at random."""
WRITTEN = 10**18
"""The last change of the files, in nanoseconds."""
BETWEEN = 25
"""Directories between two changes: after one the daemon is careful for some time."""


def _remove_all(directory: Path) -> None:
    for path in sorted(directory.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _replace(directory: Path) -> None:
    (directory / "f0").unlink()
    (directory / "f0").mkdir()
    (directory / "f0/inner").write_bytes(b"1")


def _append(directory: Path) -> None:
    with (directory / "f1").open("ab") as file:
        file.write(b"more")


def _look_and_forget(directory: Path) -> None:
    (directory / "f0").stat()
    drop_caches(directory)


def _write_elsewhere(directory: Path) -> None:
    (directory.parent / f"beside-{directory.name}").write_bytes(b"1")


# The last one comes first, because after FORGETs most of the walk's history is useless.
CHANGES: dict[str, Callable[[Path], object]] = {
    "look, and forget": _look_and_forget,
    "create": lambda directory: (directory / "new").write_bytes(b"12345"),
    "remove": lambda directory: (directory / "f0").unlink(),
    "append": _append,
    "truncate": lambda directory: os.truncate(directory / "f1", 3),
    "chmod": lambda directory: (directory / "f1").chmod(0o640),
    "utime": lambda directory: os.utime(directory / "f1", ns=(1, 2)),
    "rename": lambda directory: (directory / "f1").rename(directory / "renamed"),
    "rename over": lambda directory: (directory / "f1").rename(directory / "f0"),
    "link": lambda directory: os.link(directory / "f1", directory / "linked"),
    "replace": _replace,
    "chmod of itself": lambda directory: directory.chmod(0o700),
    "remove all": _remove_all,
    "beside": _write_elsewhere,
}  # fmt: skip


def _build(root: Path) -> None:
    """Directories in three levels, each with some files; several times as many as changes."""
    count = len(CHANGES) * BETWEEN // 20 + 1
    for first in range(count):
        for second in range(19):
            directory = root / f"t/a{first}/b{second}"
            directory.mkdir(parents=True)
            for number in range(3):
                (directory / f"f{number}").write_bytes(b"x" * (first + second + number))
                os.utime(directory / f"f{number}", ns=(WRITTEN, WRITTEN + number))


Seen = list[tuple[str, int, int, int, int]]


def _listed(directory: Path) -> tuple[Seen, list[Path]]:
    """The result of one listing, and of stat for each name; and the directories in listing order."""
    found, below = [], []
    with os.scandir(directory) as entries:
        for entry in entries:
            st = entry.stat(follow_symlinks=False)
            assert st.st_ino == entry.inode()
            if entry.is_dir():
                below.append(directory / entry.name)
                found.append((entry.name, st.st_mode, 0, 0, 0))
            else:
                time_set = st.st_mtime_ns if st.st_mtime_ns <= WRITTEN + 10 else 0
                found.append((entry.name, st.st_mode, st.st_size, st.st_nlink, time_set))
    return sorted(found), below


def test_what_changes_before_it_is_listed(world: MakeWorld, session: str) -> None:
    """A directory prepared by the daemon is changed in every way, then listed: same as natively."""
    made = world(_build)
    changes = list(CHANGES.values())
    done: list[tuple[Path, Callable[[Path], object] | None, Seen]] = []
    todo = [Path("t")]
    begun = since = 0
    while todo:
        path = todo.pop()
        change = None
        since += 1
        if changes and since >= BETWEEN and path.parent.parent.name:
            since = 0
            time.sleep(0.01)
            if dc.is_direct(session):
                before, begun = begun, made.mount.figure("listings_prepared")
                assert begun > before, "nothing was prepared"
            change = changes.pop()
            change(made.union / path)
        seen, below = _listed(made.union / path)
        todo += [directory.relative_to(made.union) for directory in reversed(below)]
        done.append((path, change, seen))
    assert not changes
    for path, change, seen in done:
        if change is not None:
            change(made.native / path)
        assert seen == _listed(made.native / path)[0], path
    if dc.is_direct(session):
        assert made.mount.figure("prepared_listings_used") > len(done) // 4


@pytest.mark.alone  # the daemon prepares when the processors have nothing else to do
def test_a_walk(world: MakeWorld, session: str) -> None:
    """Every listing prepared for a walk in listing order is used, and there are many."""
    made = world(_build)
    expected = sorted(str(path.relative_to(made.native)) for path in made.native.rglob("*"))
    found = subprocess.run(["find", "t", "-mindepth", "1"], cwd=made.union, capture_output=True, text=True)
    assert sorted(found.stdout.splitlines()) == expected[1:]
    if dc.is_direct(session):
        directories = sum(path.is_dir() for path in made.native.rglob("*"))
        prepared = made.mount.figure("listings_prepared")
        assert made.mount.figure("prepared_listings_used") == prepared > directories - 10


def test_who_ends_a_walk(world: MakeWorld, session: str) -> None:
    """An unused preparation is dropped when another directory is listed."""
    dc.need_direct(session, "listing ahead")
    made = world(_build)
    nodes = made.mount.figure("nodes")
    todo = [made.union / "t"]
    while made.mount.figure("listings_prepared") < 5:
        todo += reversed(_listed(todo.pop())[1])
    time.sleep(0.01)
    drop_caches(made.union)
    os.listdir(made.union)
    assert dc.wait_for(lambda: made.mount.figure("nodes") <= nodes + 1)


def test_only_what_is_of_lowers_alone(root: None, area: Path, session: str) -> None:
    """No directory with a part in the upper is prepared; merged directories of lowers are."""
    dc.need_direct(session, "listing ahead")
    for top in ("upper", "lower/half", "upper/half", "lower/two", "bottom/two"):
        _build(area / top)
    (area / "bottom/two/t/a1/b1/deeper").touch()
    shutil.rmtree(area / "lower/two/t/a1/b2")
    os.mknod(area / "lower/two/t/a1/b2", stat.S_IFCHR, 0)
    (area / "work").mkdir()
    with mounted(
        area, lowers=[area / "lower", area / "bottom"], upper=area / "upper", work=area / "work",
        session=session,
    ) as mount:  # fmt: skip
        for top in ("t", "half"):
            subprocess.run(["find", mount.mountpoint / top], check=True, stdout=subprocess.DEVNULL)
            assert mount.figure("listings_prepared") == 0, top
        found = subprocess.run(["find", "two"], cwd=mount.mountpoint, capture_output=True, text=True)
        assert mount.figure("listings_prepared") == mount.figure("prepared_listings_used") > 0
        expected = subprocess.run(
            ["find", "two", "-not", "-path", "two/t/a1/b2*"], cwd=area / "bottom",
            capture_output=True, text=True,
        )  # fmt: skip
        assert sorted(found.stdout.splitlines()) == sorted(expected.stdout.splitlines())


class _Both:
    """Applies calls to the union and to a native copy; the results must be equal too."""

    def __init__(self, union: Path, native: Path, choice: random.Random) -> None:
        self.union, self.native, self.choice = union, native, choice
        self.held: list[int] = []
        self._number = 0

    def do(self, call: Callable[..., object], *names: str) -> None:
        """Run a call on these names."""
        found = errno_of(lambda: call(*[self.union / name for name in names]))
        assert found == errno_of(lambda: call(*[self.native / name for name in names])), (call, names)

    def change(self, directory: str) -> None:
        """Change an entry of a directory, or the directory itself."""
        pick = self.choice.choice
        names = [*sorted(os.listdir(self.native / directory)), "new"]
        one, other = f"{directory}/{pick(names)}", f"{directory}/{pick(names)}"
        self._number += 1
        outside = f"t/moved{self._number}"
        name, call, arguments = pick(
            [
                ("create", _create, (one,)), ("append", _append_to, (one,)),
                ("truncate", partial(_truncate, 200 + self._number), (one,)),
                ("unlink", os.unlink, (one,)), ("chmod", _chmod, (one,)), ("rename", os.rename, (one, other)),
                ("move", os.rename, (one, outside)), ("link", os.link, (one, other)),
                ("mkdir", os.mkdir, (one,)), ("rmdir", os.rmdir, (one,)), ("hold", self._hold, (one,)),
                ("itself", _chmod, (directory,)), *[("pass", None, ()), ("open and remove", None, ())] * 3,
            ]
        )  # fmt: skip
        if call is not None:
            self.do(call, *arguments)
        elif name == "pass":
            self.do(_create, f"{directory}/new")
            self.pause()
            self.do(os.rename, f"{directory}/new", outside)
        else:
            self.do(_create, f"{directory}/new")
            self.do(self._hold, f"{directory}/new")
            self.pause()
            self.do(os.unlink, f"{directory}/new")

    def pause(self) -> None:
        """Let the daemon do nothing, a step, some steps, or all of its work; or the kernel drop caches."""
        kind = self.choice.randrange(8)
        if kind < 3:
            time.sleep((0.00005, 0.0003, 0.003)[kind])
        elif kind == 3 and self.choice.random() < 0.2:
            drop_caches(self.union)

    def _hold(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        if path.is_relative_to(self.union):
            self.held.append(fd)
        else:
            os.close(fd)


def _create(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))


def _append_to(path: Path) -> None:
    with dc.opened(path, os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b"more")


def _truncate(size: int, path: Path) -> None:
    """``size``: another one than before, for with writeback the kernel keeps the mtime if it is the same."""
    os.truncate(path, size)


def _chmod(path: Path) -> None:
    os.chmod(path, 0o751)


def _build_layers(area: Path, choice: random.Random) -> None:
    """Two lowers and, in `native`, their merged view: with whiteouts, and small and large directories."""
    for name in ("l0", "l1", "native", "upper", "work"):
        (area / name).mkdir()
    for number in range(800):
        directory = f"t/a{number // 20}/b{number % 20}"
        count = choice.choice([3, 3, 8, 60, 120])
        for layer in ("l1", "l0"):
            (area / layer / directory).mkdir(parents=True)
            (area / "native" / directory).mkdir(parents=True, exist_ok=True)
            for name in {f"{directory}/f{choice.randrange(count)}" for _ in range(count // 2 + 1)}:
                (area / "native" / name).unlink(missing_ok=True)
                if layer == "l0" and choice.random() < 0.2:
                    os.mknod(area / layer / name, stat.S_IFCHR, 0)
                    continue
                data = b"x" * choice.randrange(100)
                for root in (layer, "native"):
                    (area / root / name).write_bytes(data)
                    os.utime(area / root / name, ns=(WRITTEN, WRITTEN + len(data)))


@pytest.mark.parametrize("seed", [2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 3, 4))])
def test_any_changes_at_any_moment(root: None, area: Path, session: str, seed: int) -> None:
    """Directories in preparation are changed in any way at any time and listed: as natively, also later."""
    choice = random.Random(seed)
    _build_layers(area, choice)
    lowers = [area / "l0", area / "l1"]
    with mounted(area, lowers=lowers, upper=area / "upper", work=area / "work", session=session) as mount:
        both = _Both(mount.mountpoint, area / "native", choice)
        todo, changed, since = ["t"], [], 0
        before: tuple[str, Seen] = "t", _listed(both.native / "t")[0]
        while todo:
            path = todo.pop()
            since += 1
            # A listing is compared after the next directory was changed, preferably when the daemon starts to
            # prepare it; but a change of a directory itself belongs to its parent.
            if since >= EVERY and path.count("/") == 2 and not path.startswith(before[0] + "/"):
                since = 0
                changed.append(path)
                both.pause()
                for _ in range(choice.choice([1, 1, 2, 4, 8])):
                    both.change(path)
                    both.pause()
            assert before[1] == _listed(both.native / before[0])[0], before[0]
            seen, below = _listed(both.union / path)
            before = path, seen
            todo += [str(directory.relative_to(both.union)) for directory in reversed(below)]
        assert len(changed) > 30
        for path in changed:
            assert _listed(both.union / path)[0] == _listed(both.native / path)[0], path
            for name in ("new", *(f"f{number}" for number in range(120))):
                there = os.path.lexists(both.union / path / name)
                assert there == os.path.lexists(both.native / path / name), (path, name)
        for fd in both.held:
            os.close(fd)
        if dc.is_direct(session):
            assert mount.figure("prepared_listings_used") > 50
