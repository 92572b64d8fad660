"""An ordinary user with a home on NFS mounts with all layers there, as rootless podman calls the program."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.cli_calls import FUSE_UNIONFS, Done, Place, refused, succeed
from tests.mount.user_calls import UID, Host, ordinary_user
from tests.support import snapshot
from tests.support.mounting import kernel_mounted
from tests.vm.nfs import Export, Server

CHANGES = """
cd "$1"
echo more >> base
rm deep
mkdir new; echo one > new/f; ln new/f new/g; touch -d @1000 new/f
rm -r dir; mkdir dir; echo again > dir/y
rm -r gone; echo file > gone
mv moved renamed; echo in > renamed/in
chmod 640 written; truncate -s 3 written
setfattr -n user.key -v value written
ln -s target link; mkfifo pipe
mv over target; cp target copy; mv copy target
"""


def build(lower: Path) -> None:
    """What CHANGES begins with; all of it is the user's."""
    for name in ("dir/x", "gone/x", "moved/sub/x", "written", "over", "target", "base", "deep"):
        (lower / name).parent.mkdir(parents=True, exist_ok=True)
        (lower / name).write_text(f"{name}\n" * 100)
    for path in (lower, *lower.rglob("*")):
        os.chown(path, UID, UID)


def tree(root: Path) -> dict[bytes, object]:
    """Kinds, modes, owners, contents, links and xattrs below a directory."""
    return {
        path: (oct(entry.mode), entry.uid, entry.gid, entry.content, entry.xattrs)
        for path, entry in snapshot.take(root).items()
        if path != b"."
    }


@contextmanager
def at_home(server: Server, options: str, *, squash: bool = False) -> Iterator[tuple[Place, Host, Export]]:
    """Layers in a home, and the user; with `squash` root is nobody there from then on."""
    with server.export(options) as export:
        (export.there / "home").mkdir()
        place = Place(export.here / "home")
        with ordinary_user(place) as host:
            os.chown(place.root, UID, UID)
            if squash:
                server.export_root(squash=True)
            try:
                yield place, host, export
            finally:
                server.export_root()


def call(host: Host, *words: str | Path, inside: bool = False) -> Done:
    """Run the mount program in the home, as podman does, perhaps in a user namespace."""
    program = (host.command[0], *FUSE_UNIONFS[1:])
    return host.run(*(("unshare", "-Urm") if inside else ()), *program, *words, cwd=host.place.root)


@pytest.mark.parametrize("squash", [False, True], ids=["no_root_squash", "root_squash"])
def test_mounted_from_outside_a_user_namespace(server: Server, area: Path, squash: bool) -> None:
    build(area / "plain")
    with at_home(server, "vers=4.2", squash=squash) as (place, host, export):
        build(export.there / "home/lower")
        succeed(host.run("sh", "-ec", "mkdir l && ln -s ../lower l/A", cwd=place.root))
        options = "lowerdir=l/A,upperdir=upper,workdir=work,volatile"
        for volatile in (options, options.removesuffix(",volatile")):
            assert succeed(call(host, "-o", volatile, place.merged)) == ""
            if volatile == options:
                for top in (area / "plain", place.merged):
                    succeed(host.run("sh", "-ec", CHANGES, "sh", top))
            seen = host.run("sh", "-c", f"cd {place.merged} && find . | sort && cat base renamed/in dir/y")
            wanted = host.run("sh", "-c", f"cd {area}/plain && find . | sort && cat base renamed/in dir/y")
            assert seen.stdout == wanted.stdout
            succeed(host.run("fusermount3", "-u", place.merged))
        # On the server the kernel reads what was written.
        home = export.there / "home"
        with kernel_mounted(
            area, lowers=[home / "lower"], upper=home / "upper", work=home / "work", options=["userxattr"]
        ) as kernel:
            # Redirects in user.* xattrs are followed by the user's own mounts alone.
            seen_by_kernel = tree(kernel.mountpoint)
            assert seen_by_kernel == {
                path: entry for path, entry in tree(area / "plain").items()
                if not path.startswith(b"renamed")
            }  # fmt: skip


def test_mounted_inside_a_user_namespace(server: Server, area: Path) -> None:
    build(area / "plain")
    with at_home(server, "vers=4.2") as (place, host, export):
        build(export.there / "home/lower")
        program = shlex.join([host.command[0], *FUSE_UNIONFS[1:]])
        mount = f"{program} -o lowerdir=lower,upperdir=upper,workdir=work merged"
        script = f"cd $0; {mount}; ({CHANGES}); umount merged; {mount}; ls -A merged; umount merged"
        done = host.run("unshare", "-Urm", "sh", "-ec", script, place.root, "merged")
        succeed(host.run("sh", "-ec", CHANGES, "sh", area / "plain"))
        assert succeed(done).split() == sorted(os.listdir(area / "plain"))


def test_a_version_without_xattrs(server: Server) -> None:
    """An upper there cannot be: one sentence, nothing made. A lower can."""
    with at_home(server, "vers=4.1") as (place, host, export):
        words = ("-o", "lowerdir=lower,upperdir=upper,workdir=work,volatile", place.merged)
        for inside in (False, True):
            done = call(host, *words, inside=inside)
            refused(done, "without user.* xattrs", program="fuse-unionfs")
        assert os.listdir(export.there / "home/upper") == os.listdir(export.there / "home/work") == []
        local = Path("/var/tmp/unionfs-home")
        try:
            for name in ("upper", "work"):
                (local / name).mkdir(parents=True)
                os.chown(local / name, UID, UID)
            options = f"lowerdir=lower:lower2,upperdir={local}/upper,workdir={local}/work"
            succeed(call(host, "-o", options, place.merged))
            done = host.run("sh", "-c", "cd $0; echo x >> base; cat base", place.merged)
            assert done.stdout == "base\nx\n"
            succeed(host.run("fusermount3", "-u", place.merged))
        finally:
            subprocess.run(["rm", "-rf", local], check=True)
