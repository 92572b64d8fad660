"""A walk through directories that are changed at any moment: as natively."""

from __future__ import annotations

import os
import random
import stat
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.mount import direct_calls as dc
from tests.support.mounting import mounted
from tests.support.syscalls import drop_caches
from tests.support.world import errno_of

EVERY = 13
"""Directories between two that are changed at random."""
WRITTEN = 10**18
"""The last change of the files, in nanoseconds."""

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
        """Wait for a short time, or make the kernel drop caches."""
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
    for number in range(500):
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
    """Directories about to be listed are changed in any way: as natively, also later."""
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
            # A listing is compared after the next directory was changed; but a change of a directory itself
            # belongs to its parent.
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
