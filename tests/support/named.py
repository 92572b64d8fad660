"""Layers with whiteouts by name, and the same layers in overlayfs's own form."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path


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
