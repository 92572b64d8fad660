"""A Debian package of the tests' own, and a Debian image that installs it without network."""

from __future__ import annotations

import os
from pathlib import Path

from tests.clients import debian
from tests.clients.engines import Store
from tests.clients.support import run

_CONTROL = """\
Package: unionfs-probe
Version: {version}
Architecture: all
Maintainer: Nobody <nobody@example.org>
Description: files of all kinds
"""


def build_package(where: Path, version: str) -> Path:
    """Build the package with a configuration file, a setuid program, links, and scripts; returns the .deb."""
    root = where / f"package-{version}"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(_CONTROL.format(version=version))
    (root / "DEBIAN/conffiles").write_text("/etc/probe.conf\n")
    (root / "DEBIAN/postinst").write_text("#!/bin/sh\nset -e\necho configured > /var/lib/probe/state\n")
    (root / "DEBIAN/postrm").write_text("#!/bin/sh\nset -e\n[ $1 != purge ] || rm -rf /var/lib/probe\n")
    for name in ("postinst", "postrm"):
        (root / "DEBIAN" / name).chmod(0o755)
    for name in ("etc", "usr/bin", "usr/share/probe/deep", "var/lib/probe"):
        (root / name).mkdir(parents=True)
    (root / "etc/probe.conf").write_text(f"version {version}\n")
    (root / "usr/bin/probe").write_text(f"#!/bin/sh\necho {version}\n")
    (root / "usr/bin/probe").chmod(0o4755)
    (root / "usr/bin/probe-link").symlink_to("probe")
    (root / "usr/share/probe/deep" / f"only-{version}").write_text(version * 1000)
    (root / "usr/share/probe/one").write_text(version)
    (root / "usr/share/probe/two").hardlink_to(root / "usr/share/probe/one")
    # engines compare sizes and times: versions made in the same second would look the same to them
    when = 1_600_000_000 + int(float(version) * 1000)
    for path in root.rglob("*"):
        os.utime(path, (when, when), follow_symlinks=False)
    package = where / f"unionfs-probe_{version}_all.deb"
    run("dpkg-deb", "--root-owner-group", "-Zgzip", "-b", root, package)
    return package


def import_debian(store: Store, name: str = "debian") -> None:
    """Make a small Debian image: without documentation, translations and caches."""
    tree = debian.tree()
    tar = store.root / f"{name}.tar"
    run(
        "tar", "--sort=name", "--numeric-owner", "--xattrs", "-cf", tar, "-C", tree,
        "--exclude=./usr/share/doc/*", "--exclude=./usr/share/locale/*", "--exclude=./usr/share/man/*",
        "--exclude=./var/cache/apt/*.bin", "--exclude=./var/lib/apt/lists/*", "--exclude=./dev/*", ".",
    )  # fmt: skip
    store.podman("import", tar, name)
    tar.unlink()
