"""Lowers that are changed from outside, and what a mount that is made after the change shows."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.mounting import Mount, kernel_mounted, mounted
from tests.support.patience import patient

Shown = dict[str, tuple[object, ...]]

SECONDS = 10.0
"""When a reported change shows at the latest; `benchmarks/live_lowers.py` measures how soon it does."""
NOT_THERE = ("not-there", "d/not-there", "e/not-there", "e/new", "new", "d/f30", "d/sub/new/x")


def shown(root: Path, below: str = "") -> Shown:
    """All of a tree: types, modes, owners, times, sizes, xattrs, link targets and data."""
    found: Shown = {}
    with os.scandir(root / below) as entries:
        for entry in entries:
            path = os.path.join(below, entry.name)
            try:
                st = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # a whiteout that hides nothing; overlayfs lists it
            what: object = None
            if stat.S_ISREG(st.st_mode):
                what = st.st_size, (root / path).read_bytes()
            elif stat.S_ISLNK(st.st_mode):
                what = os.readlink(root / path)
            xattrs = None
            if not stat.S_ISLNK(st.st_mode):
                names = [name for name in os.listxattr(root / path) if name.startswith("user.")]
                xattrs = {name: os.getxattr(root / path, name) for name in names}
            found[path] = oct(st.st_mode), st.st_uid, st.st_gid, st.st_mtime_ns, xattrs, what
            if stat.S_ISDIR(st.st_mode):
                found |= shown(root, path)
    return found


def fill(lower: Path, text: str) -> None:
    """Put files into a lower, with names that the other lower has, too."""
    for name in ("d/sub/deep", "e", "vanishes/below"):
        (lower / name).mkdir(parents=True)
    for number in range(20):
        (lower / f"d/f{number}").write_text(f"{text} {number}\n")
        (lower / f"d/sub/deep/g{number}").write_text(f"{text} {number}\n" * 3000)
    (lower / "vanishes/below/x").write_text(text)
    (lower / "link").symlink_to(f"d/{text}")
    (lower / "changes-kind").write_text(text)
    (lower / f"only-{text}").write_text(text)


class World:
    """Two lowers, an upper with some changes, and the union; ``fresh`` is what a new mount shows."""

    def __init__(self, area: Path, mount: Mount) -> None:
        self.area = area
        self.mount = mount
        self.top, self.bottom = mount.lowers
        self.union = mount.mountpoint

    def fresh(self) -> Shown:
        """What kernel overlayfs shows of the layers as they are now."""
        with ExitStack() as stack:
            copies = self.area / "copies"
            copies.mkdir()
            stack.callback(shutil.rmtree, copies)
            assert self.mount.upper is not None
            for layer in (*self.mount.lowers, self.mount.upper):
                subprocess.run(["cp", "-a", str(layer), str(copies)], check=True)
            (copies / "work").mkdir()
            mount = stack.enter_context(
                kernel_mounted(
                    self.area, lowers=[copies / "top", copies / "bottom"], upper=copies / "upper",
                    work=copies / "work",
                )
            )  # fmt: skip
            return shown(mount.mountpoint)

    def seen(self) -> Shown | None:
        """What the union shows; None if it changes meanwhile."""
        try:
            return shown(self.union)
        except OSError:
            return None

    def wait(self) -> None:
        """Wait until the union shows what a new mount would."""
        expected = self.fresh()
        deadline = time.monotonic() + patient(SECONDS)
        while (seen := self.seen()) != expected and time.monotonic() < deadline:
            time.sleep(0.005)
        assert seen == expected
        for name in ("not-there", "d/not-there", "e/not-there"):
            assert not (self.union / name).exists()


@contextmanager
def world(
    area: Path, session: str, options: Sequence[str] = (), *, links: bool = False
) -> Iterator[World]:
    """A union all of whose names the kernel has cached, missing ones included; with ``links``, a lower's file
    has four names in two directories."""
    for name in ("top", "bottom", "upper", "work"):
        (area / name).mkdir()
    fill(area / "top", "top")
    fill(area / "bottom", "bottom")
    for number in range(3 if links else 0):
        os.link(area / "top/d/f10", area / f"top/e/link{number}")
    lowers = [area / "top", area / "bottom"]
    with mounted(
        area, lowers=lowers, upper=area / "upper", work=area / "work", session=session, options=options
    ) as mount:
        (mount.mountpoint / "d/f1").write_text("of the upper\n")
        (mount.mountpoint / "d/f2").unlink()
        (mount.mountpoint / "d/own").write_text("own\n")
        found = World(area, mount)
        shown(mount.mountpoint)
        for name in NOT_THERE:
            assert not (mount.mountpoint / name).exists()
        yield found
