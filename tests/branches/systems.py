"""This host as a system of its own, in which a whole system is tried: under kernel overlayfs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.mount.cli_calls import REPOSITORY, Done
from tests.support.patience import patient

KERNELS = ("proc", "dev", "sys")
VOLATILE = ("var/log/", "var/cache/", "var/lib/unionfs", "var/lib/apt/", "run/", "tmp/", "srv/")
"""What has times in it, or is not part of a branch."""
CONTROL = "Package: probe\nVersion: 1\nArchitecture: all\nMaintainer: n <n@example.org>\nDescription: probe\n"
POSTINST = """#!/bin/sh
set -e
mkdir -p /var/lib/probe; echo made > /var/lib/probe/state; chown daemon:daemon /var/lib/probe/state
ln -sf probe /usr/bin/probe-link; echo '# probe' >> /etc/services
"""


class System:
    """This host under kernel overlayfs, entered by chroot: what is changed there stays in a layer."""

    def __init__(self, area: Path) -> None:
        self.root, self.upper = area / "root", area / "upper"
        for path in (self.root, self.upper, area / "work"):
            path.mkdir(parents=True)
        self._mount("-t", "overlay", "-o", f"lowerdir=/,upperdir={self.upper},workdir={area / 'work'}",
                    "overlay", self.root)  # fmt: skip
        for name in KERNELS:
            self._mount("--rbind", f"/{name}", self.root / name)
        for path in (str(REPOSITORY), sys.prefix, os.path.realpath(sys.base_prefix)):
            if not (self.root / path[1:]).is_dir():
                (self.root / path[1:]).mkdir(parents=True)
                self._mount("--bind", path, self.root / path[1:])
        for name, options in (("foreign", "rw"), ("fixed", "ro")):
            (self.root / "srv" / name).mkdir(parents=True)
            self._mount("-t", "tmpfs", "-o", options, "tmpfs", self.root / "srv" / name)
        for name in ("hidden", "rw"):
            (self.root / "srv" / name).mkdir()
            (self.root / "srv" / name / "file").write_text("secret\n")
        shutil.rmtree(self.root / "var/lib/unionfs", ignore_errors=True)

    def _mount(self, *words: str | Path) -> None:
        subprocess.run(["mount", *map(str, words)], check=True)

    def call(self, *words: str, **extra: Any) -> Done:
        environment = {
            "PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "HOME": "/root", "TMPDIR": "/tmp",
            "UNIONFS_RESIDENT_SECONDS": "0", "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",  # beside this package, in the tree that is compared
        }  # fmt: skip
        return subprocess.run(
            ["chroot", str(self.root), *words], capture_output=True, text=True, env=environment, cwd="/",
            stdin=subprocess.DEVNULL, timeout=patient(240), **extra,
        )  # fmt: skip

    def unionfs(self, *words: str) -> str:
        done = self.call(sys.executable, "-m", "unionfs", *words)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def changed(self) -> set[str]:
        """The paths in the layer, without directories and without what is volatile."""
        found = {
            os.path.relpath(os.path.join(above, name), self.upper)
            for above, _, names in os.walk(self.upper) for name in names
        }  # fmt: skip
        return {path for path in found if not path.startswith(VOLATILE)}


@contextmanager
def system(area: Path) -> Iterator[System]:
    area.mkdir()
    with ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", "-R", "-l", str(area / "root")], check=False)
        yield System(area)


def look(root: Path, path: str) -> tuple[Any, ...] | None:
    """All of an object but its times."""
    where = root / path
    try:
        st = where.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    content = b""
    if where.is_symlink():
        content = os.fsencode(os.readlink(where))
    elif where.is_file():
        content = where.read_bytes()
    xattrs = {name: os.getxattr(where, name, follow_symlinks=False)
              for name in os.listxattr(where, follow_symlinks=False)}  # fmt: skip
    return st.st_mode, st.st_uid, st.st_gid, st.st_rdev, content, xattrs


def make_package(area: Path) -> Path:
    tree = area / "probe"
    for name, text, mode in (
        ("DEBIAN/control", CONTROL, 0o644), ("DEBIAN/postinst", POSTINST, 0o755),
        ("usr/bin/probe", "#!/bin/sh\necho works\n", 0o4755), ("etc/probe.conf", "a=1\n", 0o640),
        ("usr/share/probe/data", "x" * 100_000, 0o644),
    ):  # fmt: skip
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
        (tree / name).chmod(mode)
    for directory in tree.rglob("*"):
        if directory.is_dir():
            directory.chmod(0o755)
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", str(tree), str(area / "probe.deb")],
                   check=True, capture_output=True)  # fmt: skip
    return area / "probe.deb"
