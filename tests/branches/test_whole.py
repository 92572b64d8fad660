"""`try -D /`: a whole system on a branch, committed: the same as if the command had run in it directly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.mount.cli_calls import REPOSITORY, Done
from tests.support import areas
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
        (self.root / "srv/foreign").mkdir(parents=True)
        self._mount("-t", "tmpfs", "tmpfs", self.root / "srv/foreign")
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


SCRIPT = """
apt-get -q -y install /srv/probe.deb; rm -r /usr/share/probe; touch /var/lib/probe/new; rm /etc/hostname
"""
CHECKS = """
! touch /proc/x 2>/dev/null; ! touch /sys/x 2>/dev/null; touch /dev/x /tmp/x /run/x /var/tmp/x
! cat /srv/hidden/file 2>/dev/null; ! touch /srv/foreign/x 2>/dev/null; ls /var/lib/unionfs
echo written > /srv/rw/file
"""
OPTIONS = ("--hide", "/srv/hidden", "--rw", "/srv/rw")


@pytest.mark.slow
def test_a_package_is_installed(root: None, area: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("apt-get or dpkg-deb is not installed")
    package = make_package(area)
    with system(area / "one") as direct, system(area / "two") as tried:
        for one in (direct, tried):
            shutil.copy(package, one.root / "srv")
            (one.root / "etc/hostname").write_text("host\n")
        before = tried.changed()
        done = direct.call("sh", "-ec", SCRIPT)
        assert done.returncode == 0, (done.stdout, done.stderr)

        words = ["try", "--keep", "-n", "sys", "-D", "/", *OPTIONS, "--", "sh", "-ec", SCRIPT + CHECKS]
        done = tried.call(sys.executable, "-m", "unionfs", *words)
        assert done.returncode == 0, (done.stdout, done.stderr)
        assert "/srv/foreign is another filesystem below the base; it is read-only here" in done.stderr
        assert tried.changed() == before
        assert (tried.root / "srv/rw/file").read_text() == "written\n"
        # The next one goes on.
        words = ["try", "-q", "--keep", "-n", "sys", "-D", "/", "--", "probe"]
        assert tried.unionfs(*words) == "works\n"
        lines = tried.unionfs("branch", "diff", "sys").splitlines()
        assert "A usr/bin/probe" in lines
        outside = ("proc", "sys", "dev", "run", "tmp", "srv", "var/lib/unionfs")
        assert [line for line in lines if line[2:].startswith(outside)] == []
        tried.unionfs("branch", "commit", "sys")
        paths = direct.changed() | tried.changed()
        assert {"usr/bin/probe", "var/lib/probe/new", "etc/services", "var/lib/dpkg/status"} <= paths
        wrong = {path for path in paths if look(direct.root, path) != look(tried.root, path)}
        assert wrong == set()
        assert not (tried.root / "srv/foreign/x").exists()
        assert areas.mounts_below(tried.root / "var/lib/unionfs") == []
        tried.unionfs("branch", "undo")
        # What it was before: the layer of overlayfs has copies of what came back.
        wrong = {path for path in tried.changed() if look(tried.root, path) != look(Path("/"), path)}
        assert wrong <= {"etc/hostname"}
