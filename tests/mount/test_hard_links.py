"""Lower hard links stay hard links: every step is the same on kernel overlayfs with ``index=on``."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.oracle import normalise
from tests.support import snapshot, syscalls
from tests.support.mounting import Mount, kernel_mounted, mounted
from tests.support.world import outcome

DIRECTORIES = (b".", b"d", b"d/e", b"other")
NAMES = (b"a", b"b", b"c")
Shown = dict[bytes, tuple[int, int, bytes, frozenset[bytes]]]


def _build(home: Path) -> list[Path]:
    """Two lowers: files of each type with names in several directories, one hidden, one outside, and one
    that a whiteout removes; and a file with one name."""
    upper, lower = home / "lower0", home / "lower1"
    for root in (upper, lower):
        for directory in DIRECTORIES:
            (root / os.fsdecode(directory)).mkdir(parents=True, exist_ok=True)
        (root / "a").write_bytes(b"data" * 100)
        for name in ("b", "d/a", "d/e/a", "other/c"):
            os.link(root / "a", root / name)
        (root / "single").write_bytes(b"single")
    (lower / "low").write_bytes(b"low")
    os.link(lower / "low", lower / "d/low")
    os.link(lower / "low", lower / "gone")
    os.mknod(upper / "gone", stat.S_IFCHR, 0)
    (upper / "partly").write_bytes(b"partly")
    os.link(upper / "partly", home / "outside")
    (upper / "d/b").symlink_to("target")
    os.link(upper / "d/b", upper / "other/b", follow_symlinks=False)
    os.mkfifo(upper / "d/c")
    os.link(upper / "d/c", upper / "d/e/c")
    return [upper, lower]


def _shown(root: Path) -> Shown:
    """Type, link count, content and the names that are the same file, by path."""
    tree = snapshot.take(root)
    same: dict[int, set[bytes]] = {}
    for path, entry in tree.items():
        same.setdefault(entry.ino, set()).add(path)
    return {
        path: (stat.S_IFMT(entry.mode), entry.nlink, entry.content, frozenset(same[entry.ino]))
        for path, entry in tree.items()
        if not stat.S_ISDIR(entry.mode)
    }


class _Side:
    """One filesystem over its own copy of the layers."""

    def __init__(self, home: Path, session: str, options: tuple[str, ...]) -> None:
        home.mkdir()
        self.home, self.session, self.options = home, session, options
        self.lowers = _build(home)
        self._count = 0
        self._new()
        self._mount = ExitStack()
        self.root = Path()
        self.enter()

    def _new(self) -> None:
        self.upper, self.work = self.home / f"upper{self._count}", self.home / f"work{self._count}"
        self.upper.mkdir()
        self.work.mkdir()
        self._count += 1

    def mounted(self, session: str) -> Any:
        layers = {"lowers": self.lowers, "upper": self.upper, "work": self.work}
        if session == "kernel":
            return kernel_mounted(self.home, **layers, options=self.options)  # type: ignore[arg-type]
        return mounted(self.home, **layers, session=session, options=self.options)  # type: ignore[arg-type]

    def enter(self) -> None:
        mount: Mount = self._mount.enter_context(self.mounted(self.session))
        self.root = mount.mountpoint

    def leave(self) -> None:
        self._mount.close()

    def push(self) -> None:
        self.leave()
        self.lowers.insert(0, self.upper)
        self._new()
        self.enter()


@contextmanager
def _sides(area: Path, session: str, *options: str) -> Iterator[tuple[_Side, _Side]]:
    ours = _Side(area / "u", session, options or ("index=on",))
    try:
        kernel = _Side(area / "k", "kernel", options or ("index=on", "xino=on"))
        try:
            yield ours, kernel
        finally:
            kernel.leave()
    finally:
        ours.leave()


def _write(root: Path, path: bytes) -> None:
    fd = os.open(os.fsencode(root) + b"/" + path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "wb") as file:
        file.write(b"more")


def _step(rng: random.Random) -> Callable[[Path], object]:
    """One random change of one of the names."""

    def path() -> bytes:
        return rng.choice(DIRECTORIES) + b"/" + rng.choice((*NAMES, b"low", b"partly", b"single"))

    one, other = path(), path()
    kind = rng.choice(["write", "write", "times", "unlink", "rename", "exchange", "link", "truncate", "new"])

    def run(root: Path) -> object:
        top = os.fsencode(root) + b"/"
        match kind:
            case "write":
                return _write(root, one)
            case "times":
                return os.utime(top + one, ns=(1, 1), follow_symlinks=False)
            case "unlink":
                return os.unlink(top + one)
            case "rename":
                return os.rename(top + one, top + other)
            case "exchange":
                return syscalls.renameat2(top + one, top + other, syscalls.RENAME_EXCHANGE)
            case "link":
                return os.link(top + one, top + other, follow_symlinks=False)
            case "truncate":
                with open(top + one, "r+b", opener=_no_follow) as file:
                    return file.truncate(3)
        return os.close(os.open(top + one, os.O_CREAT | os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW, 0o644))

    run.__doc__ = f"{kind} {one!r} {other!r}"
    return run


def _named(step: str | None) -> set[bytes]:
    """The names that a step may give to another file."""
    kind, *paths = (step or "").split()
    if kind in ("write", "times", "truncate"):
        return set()
    return {os.path.normpath(path[2:-1]).encode() for path in paths}


def _no_follow(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
def test_as_kernel_with_index(kernel_overlay: None, area: Path, session: str, seed: int) -> None:
    """Random changes, remounts, dropped caches; then each side's upper under the other filesystem."""
    rng = random.Random(seed)
    with _sides(area, session) as (ours, kernel):
        played: list[str | None] = []
        before = {path: entry.ino for path, entry in snapshot.take(ours.root).items()}
        for number in range(60):
            step = _step(rng)
            played.append(step.__doc__)
            expected = outcome(step, kernel.root)
            assert (outcome(step, ours.root), played) == (expected, played)
            if number % 12 == 11:
                played.append("remount")
                for side in (ours, kernel):
                    side.leave()
                    side.enter()
            elif rng.random() < 0.2:
                syscalls.drop_caches(ours.root)
            assert (_shown(ours.root), played) == (_shown(kernel.root), played)
            tree = snapshot.take(ours.root)
            assert not normalise.strict(tree)
            now = {path: entry.ino for path, entry in tree.items()}
            for path in now.keys() & before.keys() - _named(step.__doc__):
                assert (path, now[path]) == (path, before[path])
            before = now
        for side, other in ((ours, "kernel"), (kernel, session)):
            shown = _shown(side.root)
            side.leave()
            with side.mounted(other) as mount:
                assert _shown(mount.mountpoint) == shown


def test_open_files_of_two_names_are_one(kernel_overlay: None, area: Path, session: str) -> None:
    """Data, locks' inode and link count, before and after the copy-up by either name."""
    if session == normalise.KEEPING:
        pytest.skip("an open lower file stays the lower's, see docs/compliance.md")

    def use(root: Path) -> list[object]:
        found: list[object] = []
        with open(root / "a", "rb") as first, open(root / "d/a", "rb") as second:
            with open(root / "b", "r+b") as writer:
                writer.write(b"new!")
                writer.flush()
                os.fsync(writer.fileno())
                for file in (first, second):
                    file.seek(0)
                    found.append(file.read(6))
                numbers = {os.fstat(file.fileno()).st_ino for file in (first, second, writer)}
                found += [len(numbers), os.stat(root / "other/c").st_ino in numbers]
            for path in ("a", "d/a", "b", "d/e/a", "other/c"):
                os.unlink(root / path)
                found.append(os.fstat(first.fileno()).st_nlink)
            first.seek(0)
            found.append(first.read(6))
        return found

    with _sides(area, session) as (ours, kernel):
        assert use(ours.root) == use(kernel.root)
        for side in (ours, kernel):
            assert [name for name in os.listdir(side.work / "index") if not name.startswith("#")] == []


def test_without_index(kernel_overlay: None, area: Path, session: str) -> None:
    """A name that is copied up is a file of its own; the others still are one."""
    if session == normalise.SEPARATE:
        pytest.skip("the library has one number for node and inode, so each name has its own")
    with _sides(area, session, "index=off") as (ours, kernel):
        assert _shown(ours.root) == _shown(kernel.root)
        for path in (b"b", b"d/e/c", b"d/b"):
            for side in (ours, kernel):
                os.utime(os.fsencode(side.root) + b"/" + path, ns=(1, 1), follow_symlinks=False)
            assert _shown(ours.root) == _shown(kernel.root)
        for side in (ours, kernel):
            side.leave()
            side.enter()
        assert _shown(ours.root) == _shown(kernel.root)
        assert not (ours.work / "index").exists()


def test_without_upper(kernel_overlay: None, area: Path, session: str) -> None:
    """All names of a file are one file, also after the kernel has forgotten some."""
    lowers = _build(area)
    kernel_side = kernel_mounted(area, lowers=lowers)
    with mounted(area, lowers=lowers, session=session) as mount, kernel_side as kernel:
        expected = _shown(kernel.mountpoint)
        assert _shown(mount.mountpoint) == expected
        number = os.stat(mount.mountpoint / "a").st_ino
        syscalls.mount("none", mount.mountpoint, "none", syscalls.MS_REMOUNT | syscalls.MS_RDONLY)
        assert os.stat(mount.mountpoint / "other/c").st_ino == number
        assert os.stat(mount.mountpoint / "a").st_ino == number
        assert _shown(mount.mountpoint) == expected


def test_upper_that_was_pushed(kernel_overlay: None, area: Path, session: str) -> None:
    """The index of an upper is not used when it is a lower, as in the kernel."""
    with _sides(area, session) as (ours, kernel):
        for path in (b"b", b"d/low", b"other/b"):
            for side in (ours, kernel):
                os.utime(os.fsencode(side.root) + b"/" + path, ns=(1, 1), follow_symlinks=False)
        for side in (ours, kernel):
            side.push()
        assert _shown(ours.root) == _shown(kernel.root)
        for path in (b"a", b"b", b"d/low"):
            for side in (ours, kernel):
                os.utime(os.fsencode(side.root) + b"/" + path, ns=(1, 1), follow_symlinks=False)
            assert _shown(ours.root) == _shown(kernel.root)


def _renamed_over(path: Path) -> None:
    path.with_name("other").write_text("other")
    os.rename(path.with_name("other"), path)


WRONG = (None, b"", b"U-5", b"L-9", b"U+0 ", b"U+99999999999", b"L+999999999")


@pytest.mark.parametrize("value", WRONG)
def test_a_wrong_count(kernel_overlay: None, area: Path, session: str, value: bytes | None) -> None:
    """With a missing or invalid `nlink` of a copy every name can be examined, listed and removed."""
    lower, upper = area / "lower", area / "upper"
    for path in (lower, upper, area / "work"):
        path.mkdir()
    (lower / "a").write_text("a")
    for name in ("b", "c"):
        os.link(lower / "a", lower / name)
    at = {"lowers": [lower], "upper": upper, "work": area / "work"}
    with mounted(area, session=session, options=("index=on",), **at) as mount:
        (mount.mountpoint / "a").write_text("changed")
    (entry,) = (area / "work/index").iterdir()
    os.link(entry, upper / "more")
    if value is None:
        os.removexattr(entry, "trusted.overlay.nlink")
    else:
        os.setxattr(entry, "trusted.overlay.nlink", value)
    with mounted(area, session=session, options=("index=on",), **at) as mount:
        for name in ("c", "b", "a", "more"):
            assert name in os.listdir(mount.mountpoint)
            assert all(path.stat().st_nlink >= 1 for path in mount.mountpoint.iterdir())
            (mount.mountpoint / name).unlink()
        assert os.listdir(mount.mountpoint) == []


@pytest.mark.parametrize("first", ["a", "more", "b"])
@pytest.mark.parametrize("change", [os.unlink, _renamed_over], ids=["unlink", "rename"])
def test_a_count_against_the_original(
    kernel_overlay: None, area: Path, session: str, first: str, change: Callable[[Path], object]
) -> None:
    """A daemon, or the kernel, that ends while it makes a name of a copy leaves its `nlink` so."""
    layers = []
    for side in ("ours", "kernel"):
        home = area / side
        at = {"lowers": [home / "lower"], "upper": home / "upper", "work": home / "work"}
        for path in (home / "lower", home / "upper", home / "work"):
            path.mkdir(parents=True)
        (home / "lower/a").write_text("old")
        for name in ("b", "c"):
            os.link(home / "lower/a", home / "lower" / name)
        with kernel_mounted(home, options=("index=on",), **at) as mount:
            (mount.mountpoint / "a").write_text("new")
            os.link(mount.mountpoint / "a", mount.mountpoint / "more")
        (entry,) = (home / "work/index").iterdir()
        assert os.stat(entry).st_nlink == 3
        os.setxattr(entry, "trusted.overlay.nlink", b"L+1")
        layers.append((home, at))

    def steps(root: Path) -> list[object]:
        found: list[object] = [os.stat(root / first).st_nlink]
        change(root / first)
        found.append(_shown(root))
        os.link(root / "c", root / "another")
        found.append(_shown(root))
        for name in ("a", "b", "more"):
            (root / name).unlink(missing_ok=True)
        found.append(_shown(root))
        (root / "c").unlink()
        return [*found, _shown(root)]

    (ours, at), (kernel, at_kernel) = layers
    with mounted(ours, session=session, options=("index=on",), **at) as mount:
        found = steps(mount.mountpoint)
    with kernel_mounted(kernel, options=("index=on",), **at_kernel) as mount:
        assert found == steps(mount.mountpoint)
    with mounted(ours, session=session, options=("index=on",), **at) as mount:
        assert _shown(mount.mountpoint) == found[-1]
    with kernel_mounted(ours, options=("index=on",), **at) as mount:
        assert _shown(mount.mountpoint) == found[-1]


@pytest.mark.parametrize("known", [True, False], ids=["known names", "one name"])
def test_pushed_names_that_were_changed(
    kernel_overlay: None, area: Path, session: str, known: bool
) -> None:
    """A name by which a file was changed shows the change when the upper is a lower, like the kernel's; names
    that were known then, too."""
    changed = (b"d/a", b"d/low", b"other/c")
    with _sides(area, session) as (ours, kernel):
        for side in (ours, kernel):
            with snapshot.held(side.root) if known else nullcontext():
                for path in changed:
                    _write(side.root, path)
                    assert (side.root / "b").read_bytes()[-4:] == b"more"
                os.utime(side.root / "other/b", ns=(1, 1), follow_symlinks=False)
        shown = _shown(ours.root)
        for side in (ours, kernel):
            side.push()
        now, expected = _shown(ours.root), _shown(kernel.root)
        for path in changed:
            assert now[path][2] == expected[path][2] == shown[path][2], path
        assert os.stat(ours.root / "other/b", follow_symlinks=False).st_mtime_ns == 1
        if known:
            assert {path: found[2:] for path, found in now.items()} == {
                path: found[2:] for path, found in shown.items()
            }


def test_metadata_of_a_pushed_copy(kernel_overlay: None, area: Path, session: str) -> None:
    """The kernel reads a copy of a copy: with an index it refuses a metacopy file whose origin is not the
    object below it (namei.c, ovl_lookup)."""
    with _sides(area, session, "index=on", "metacopy=on", "redirect_dir=on") as (ours, kernel):
        number = os.stat(ours.root / "single").st_ino
        for change in (lambda path: _write(path, b"single"), lambda path: os.chmod(path / "single", 0o600)):
            for side in (ours, kernel):
                change(side.root)
                side.push()
        os.chown(ours.root / "single", 1000, 1000)
        os.chown(kernel.root / "single", 1000, 1000)
        assert os.stat(ours.root / "single").st_ino == number
        for side, other in ((ours, "kernel"), (kernel, session)):
            shown = _shown(side.root)
            side.leave()
            with side.mounted(other) as mount:
                assert _shown(mount.mountpoint) == shown


def test_metadata_before_data(kernel_overlay: None, area: Path, session: str) -> None:
    """A metacopy file with several names gets its data by another name; then the layers are mounted again."""
    options = ("index=on", "metacopy=on", "redirect_dir=on")
    with _sides(area, session, *options) as (ours, kernel):
        for side in (ours, kernel):
            os.chmod(side.root / "b", 0o640)
            os.rename(side.root / "d/a", side.root / "renamed")
        assert _shown(ours.root) == _shown(kernel.root)
        for side in (ours, kernel):
            _write(side.root, b"d/e/a")
        assert _shown(ours.root) == _shown(kernel.root)
        for side in (ours, kernel):
            side.leave()
            side.enter()
        assert _shown(ours.root) == _shown(kernel.root)
