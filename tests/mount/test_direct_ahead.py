"""Listings that are prepared before they are asked for: of use to who walks, and never to be seen."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.mount import direct_calls as dc
from tests.support.mounting import mounted
from tests.support.world import World

MakeWorld = Callable[..., World]
WRITTEN = 10**18
"""When files were changed last, in nanoseconds."""
BETWEEN = 25
"""Directories from one change to the next: after one the daemon is careful for a while."""


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
    dc.drop_caches()


def _write_elsewhere(directory: Path) -> None:
    (directory.parent / f"beside-{directory.name}").write_bytes(b"1")


# The last comes first, and after forgetting much that was remembered of the walk is of no use.
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
    """Directories in three levels, each with some files; several times as many as there are changes."""
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
    """What one listing, and stat of each name, show; and the directories in the order of the listing."""
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
    """A directory that the daemon has prepared is changed in every way, and then listed: as natively."""
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


def test_a_walk(world: MakeWorld, session: str) -> None:
    """All that is prepared for a walk in the order of the listings is used, and there is a lot of it."""
    made = world(_build)
    expected = sorted(str(path.relative_to(made.native)) for path in made.native.rglob("*"))
    found = subprocess.run(["find", "t", "-mindepth", "1"], cwd=made.union, capture_output=True, text=True)
    assert sorted(found.stdout.splitlines()) == expected[1:]
    if dc.is_direct(session):
        directories = sum(path.is_dir() for path in made.native.rglob("*"))
        prepared = made.mount.figure("listings_prepared")
        assert made.mount.figure("prepared_listings_used") == prepared > directories - 10


def test_who_ends_a_walk(world: MakeWorld, session: str) -> None:
    """What was prepared for nobody is gone when somebody lists something else."""
    dc.need_direct(session, "listing ahead")
    made = world(_build)
    nodes = made.mount.figure("nodes")
    todo = [made.union / "t"]
    while made.mount.figure("listings_prepared") < 5:
        todo += reversed(_listed(todo.pop())[1])
    time.sleep(0.01)
    dc.drop_caches()
    os.listdir(made.union)
    assert dc.wait_for(lambda: made.mount.figure("nodes") <= nodes + 1)


def test_only_what_is_of_lowers_alone(root: None, area: Path, session: str) -> None:
    """Nothing with a part in the upper is prepared; merged directories of lowers are."""
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
