"""The main job: a whole Debian as the lower, and apt at work in a chroot on the merged mount."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.clients import debian
from tests.clients.support import union_over
from tests.support import mounting
from unionfs.union.diff import diff

pytestmark = [pytest.mark.usefixtures("root"), pytest.mark.timeout(1150), pytest.mark.watchdog(1100)]

#: cron makes a group and a setgid program; ca-certificates asks debconf, makes hundreds of symlinks and has
#: triggers; less comes with alternatives.
PACKAGES = ("cron", "ca-certificates", "less")
APT = "apt-get -qq -y -o Dpkg::Use-Pty=0 --no-install-recommends"


@pytest.fixture(scope="module")
def root_tree() -> Path:
    try:
        return debian.tree()
    except debian.Unavailable as reason:
        pytest.skip(str(reason))


def installed(root: Path) -> set[str]:
    return set(debian.chroot(root, "dpkg-query -W -f '${Package} ${Status}\\n'").splitlines())


@pytest.mark.slow
def test_packages_are_installed_verified_and_removed(root_tree: Path, area: Path, session: str) -> None:
    with union_over(root_tree, area, session) as merged:
        before = installed(merged)
        assert debian.chroot(merged, "dpkg -V") == ""
        debian.install_host_settings(merged)
        debian.chroot(merged, "apt-get -qq update")
        debian.chroot(merged, f"{APT} install {' '.join(PACKAGES)}")

        with_packages = installed(merged)
        names = {line.split()[0] for line in with_packages - before}
        assert names >= set(PACKAGES)
        assert all(line.endswith(" install ok installed") for line in with_packages)
        assert debian.chroot(merged, "dpkg -V; dpkg --audit; apt-get check -qq") == ""
        crontab = (merged / "usr/bin/crontab").stat()
        assert stat.S_IMODE(crontab.st_mode) == 0o2755
        assert crontab.st_gid == int(debian.chroot(merged, "getent group crontab").split(":")[2])
        assert debian.chroot(merged, "readlink -f /usr/bin/pager") == "/usr/bin/less\n"
        hashes = [path for path in (merged / "etc/ssl/certs").iterdir() if path.is_symlink()]
        assert len(hashes) > 100
        assert all(path.exists() or os.readlink(path).startswith("/usr/share") for path in hashes)

        # a package of the lower itself: its files are replaced by ones of the same name
        debian.chroot(merged, f"{APT} install --reinstall base-files sed")
        debian.chroot(merged, "useradd -m somebody && su somebody -c 'echo mine > ~/file'")
        owner = (merged / "home/somebody/file").stat()
        assert f":{owner.st_uid}:" in (merged / "etc/passwd").read_text()

        debian.chroot(merged, f"{APT} purge {' '.join(sorted(names))} && apt-get clean")
        assert debian.chroot(merged, "dpkg -V; dpkg --audit") == ""
        assert installed(merged) == before
        assert not (merged / "usr/bin/crontab").exists()
        visible = sorted(os.listdir(merged / "usr/bin"))

    found = diff(str(area / "upper"), [str(root_tree)], b"trusted.overlay.")
    changes = {path: kind for kind, path in found}
    assert changes[b"/etc/apt/sources.list"] in "AC"
    assert changes[b"/home/somebody/file"] == "A"
    assert b"/usr/bin/crontab" not in changes

    if (reason := mounting.overlay_reason()) is None:
        with mounting.kernel_mounted(
            area, lowers=[root_tree], upper=area / "upper", work=area / "work"
        ) as kernel:
            assert sorted(os.listdir(kernel.mountpoint / "usr/bin")) == visible
            assert debian.chroot(kernel.mountpoint, "dpkg -V; dpkg --audit") == ""
            assert installed(kernel.mountpoint) == before
    else:
        print("not compared with kernel overlayfs:", reason)
