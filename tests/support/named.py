"""Layers with whiteouts by name, the same layers in overlayfs's own form, and what layers show."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support import areas
from tests.support.mounting import is_mounted, layer_options
from tests.support.patience import patient
from unionfs.union.resting import resting


def translate(layer: Path, target: Path, prefix: str = "trusted.overlay.") -> Path:
    """A copy of the layer in which char 0/0 and the xattr ``opaque`` replace `.wh.` names."""
    shutil.copytree(layer, target, symlinks=True)
    for top, directories, files in os.walk(target, topdown=False):
        for name in [*directories, *files]:
            path = Path(top) / name
            if not name.startswith(".wh."):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            hidden = Path(top) / name[len(".wh.") :]
            if name == ".wh..wh..opq":
                os.setxattr(top, prefix + "opaque", b"y")
            elif name.startswith(".wh..wh.") or name == ".wh.":
                continue
            elif hidden.is_dir():
                os.setxattr(hidden, prefix + "opaque", b"y")
            elif not os.path.lexists(hidden):
                os.mknod(hidden, stat.S_IFCHR, 0)
    return target


def build(area: Path) -> list[Path]:
    """Two lowers with every form of whiteouts by name above names of the second, topmost first."""
    top, bottom = area / "top", area / "bottom"
    for name in ("one", "both", "d/x", "d/y", "o/old", "o/sub/x", "cut/x", "reborn/x", "file/x", "stays/x"):
        path = bottom / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"bottom {name}")
    for name in ("d", "o/sub", "cut", "reborn", "stays"):
        (top / name).mkdir(parents=True)
    for name in (
        ".wh.one", "both", ".wh.both", "d/.wh.x", "o/.wh..wh..opq", "o/new", ".wh.cut", "cut/new", ".wh.file",
        ".wh.absent", "stays/.wh..wh.plnk", "stays/.wh.", "stays/new", "reborn/new",
    ):  # fmt: skip
        (top / name).write_text("" if ".wh." in name else f"top {name}")
    (top / ".wh.reborn").mkdir()
    (top / ".wh.reborn/inside").touch()
    return [top, bottom]


def contents(root: Path) -> dict[str, str | None]:
    """The text of every file by its path, None for a directory."""
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_text()
        for path in sorted(root.rglob("*"))
    }


def shown(upper: Path, lowers: Sequence[Path], *, userxattr: bool = False) -> dict[bytes, str]:
    """The paths that a union of these layers shows, each with its kind or its error."""
    found: dict[bytes, str] = {}
    paths = [str(lower) for lower in lowers]
    with resting(str(upper), paths, userxattr=userxattr, writable=False) as layers:
        merge = layers.merge
        todo = [(merge.roots, b"")]
        while todo:
            parts, path = todo.pop()
            for name in merge.listing(parts).names():
                here = path + b"/" + name
                try:
                    there = merge.search(parts, name)
                except OSError as error:
                    found[here] = str(error)
                    continue
                if there is None:
                    found[here] = "a bare whiteout"
                elif stat.S_ISDIR(there[0].st_mode):
                    found[here] = "directory"
                    todo.append((there[1], here))
                else:
                    found[here] = f"file of {there[1][0].layer.path}"
    return found


@contextlib.contextmanager
def fuse_overlayfs(area: Path, lowers: list[Path], *, by_name: bool = True) -> Iterator[Path]:
    """fuse-overlayfs itself, with `upper` and `work`; ``by_name``: as where it may not make devices."""
    program = shutil.which("fuse-overlayfs")
    if program is None:
        pytest.skip("fuse-overlayfs is not installed")
    where = area / "theirs"
    where.mkdir(exist_ok=True)
    environment = {**os.environ, **({"FUSE_OVERLAYFS_DISABLE_OVL_WHITEOUT": "1"} if by_name else {})}
    data = layer_options(lowers, area / "upper", area / "work")
    with subprocess.Popen([program, "-f", "-o", data, where], env=environment) as process:
        try:
            deadline = time.monotonic() + patient(10)
            while not is_mounted(where):
                assert time.monotonic() < deadline, "fuse-overlayfs does not mount"
                time.sleep(0.01)
            yield where
        finally:
            areas.detach(where)
            process.wait(patient(10))
