"""`try -D /`: a whole system on a branch, committed: the same as if the command had run in it directly."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.branches.systems import look, make_package, system
from tests.support import areas

SCRIPT = """
apt-get -q -y install /srv/probe.deb; rm -r /usr/share/probe; touch /var/lib/probe/new; rm /etc/hostname
"""
CHECKS = """
! touch /proc/x 2>/dev/null; ! touch /sys/x 2>/dev/null; touch /dev/x /tmp/x /run/x /var/tmp/x
! cat /srv/hidden/file 2>/dev/null; echo below > /srv/foreign/x; ! touch /srv/fixed/x 2>/dev/null
ls /var/lib/unionfs
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
        covered = [line for line in done.stderr.splitlines() if line.endswith("covered by the branch, too.")]
        assert any("/srv/foreign" in line for line in covered), done.stderr
        assert "/srv/fixed below the base is read-only here: it is mounted read-only" in done.stderr
        assert not (tried.root / "srv/foreign/x").exists()
        assert tried.changed() == before
        assert (tried.root / "srv/rw/file").read_text() == "written\n"
        # The next one goes on.
        words = ["try", "-q", "--keep", "-n", "sys", "-D", "/", "--", "probe"]
        assert tried.unionfs(*words) == "works\n"
        lines = tried.unionfs("branch", "diff", "sys").splitlines()
        assert "A usr/bin/probe  (mode 4755, owner 0:0)" in lines
        outside = ("proc", "sys", "dev", "run", "tmp", "srv", "var/lib/unionfs")
        assert [line for line in lines if line[2:].startswith(outside)] == ["A srv/foreign/x"]
        tried.unionfs("branch", "commit", "sys")
        paths = direct.changed() | tried.changed()
        assert {"usr/bin/probe", "var/lib/probe/new", "etc/services", "var/lib/dpkg/status"} <= paths
        wrong = {path for path in paths if look(direct.root, path) != look(tried.root, path)}
        assert wrong == set()
        assert (tried.root / "srv/foreign/x").read_text() == "below\n"
        assert areas.mounts_below(tried.root / "var/lib/unionfs") == []
        tried.unionfs("branch", "undo")
        assert list((tried.root / "srv/foreign").iterdir()) == []
        # What it was before: the layer of overlayfs has copies of what came back.
        wrong = {path for path in tried.changed() if look(tried.root, path) != look(Path("/"), path)}
        assert wrong <= {"etc/hostname"}
