"""Random changes of a small tree, for properties that hold whatever was changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hypothesis import strategies as st

NAMES = ("d", "e", "f", "s", "big", "n", "d/y", "d/sub", "d/sub/x", "e/z", "e/same-as-f", "n/m", "d/n", "e/d")
PATHS = st.sampled_from(NAMES)
OPERATIONS = st.one_of(
    st.tuples(st.just("write"), PATHS, st.binary(max_size=20)),
    st.tuples(st.just("append"), PATHS),
    st.tuples(st.just("remove"), PATHS),
    st.tuples(st.just("mkdir"), PATHS),
    st.tuples(st.just("rename"), PATHS, PATHS),
    st.tuples(st.just("link"), PATHS, PATHS),
    st.tuples(st.just("symlink"), PATHS, PATHS),
    st.tuples(st.just("chmod"), PATHS, st.sampled_from((0o600, 0o4755, 0o1777))),
    st.tuples(st.just("chown"), PATHS, st.sampled_from((0, 1000, 70000))),
    st.tuples(st.just("xattr"), PATHS, st.sampled_from(("user.k", "trusted.overlay.mine", "trusted.t"))),
    st.tuples(st.just("utime"), PATHS, st.integers(0, 2**40)),
)


def apply(root: Path, operation: tuple[object, ...]) -> None:
    """One change; what the filesystem refuses is no change."""
    kind, path = operation[0], root / str(operation[1])
    try:
        match kind, operation[2:]:
            case "write", (content,):
                path.write_bytes(content)  # type: ignore[arg-type]
            case "append", ():
                with path.open("ab") as out:
                    out.write(b"more")
            case "remove", ():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            case "mkdir", ():
                path.mkdir()
            case "rename", (target,):
                path.rename(root / str(target))
            case "link", (target,):
                os.link(path, root / str(target), follow_symlinks=False)
            case "symlink", (target,):
                path.symlink_to(str(target))
            case "chmod", (mode,):
                path.chmod(mode)  # type: ignore[arg-type]
            case "chown", (uid,):
                os.chown(path, uid, uid, follow_symlinks=False)  # type: ignore[arg-type]
            case "xattr", (name,):
                os.setxattr(path, str(name), b"v", follow_symlinks=False)
            case "utime", (nanoseconds,):
                os.utime(path, ns=(0, nanoseconds), follow_symlinks=False)  # type: ignore[arg-type]
    except OSError:
        pass


def build(lower: Path) -> None:
    """A lower of directories, files, a hard link and a symlink."""
    for name in ("d/sub/x", "d/y", "e/z", "f", "big"):
        path = lower / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 500)
    os.link(lower / "f", lower / "e" / "same-as-f")
    (lower / "s").symlink_to("d/y")
    os.setxattr(lower / "e", "user.k", b"v")
