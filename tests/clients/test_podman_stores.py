"""Settings of podman's storage that change how layers are stored: force_mask, squashed owners, volatile."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from tests.clients import layertars
from tests.clients.engines import KERNEL, OURS, THEIRS, Store, need
from tests.clients.rooms import room
from tests.clients.test_podman_ids import SCRIPT

pytestmark = [
    pytest.mark.usefixtures("root"), pytest.mark.clients, pytest.mark.timeout(600), pytest.mark.watchdog(550),
]  # fmt: skip

XATTR = "user.containers.override_stat"
BUILT = """\
FROM busybox
RUN mkdir -m 750 /d && echo one > /d/one && chown 5:6 /d/one && chmod 711 /d/one && ln /d/one /d/two
RUN rm /etc/issue && mv /d /e && chmod 600 /e/one && chown -h 7:8 /etc/passwd && ln -s x /e/link
"""


def committed(store: Store, container: str) -> layertars.Layer:
    """The topmost layer of an image of a container."""
    store.podman("commit", "-q", container, "committed")
    archive = store.root / "committed.tar"
    archive.unlink(missing_ok=True)
    store.podman("save", "-q", "--format", "docker-archive", "-o", archive, "committed")
    return layertars.read(archive, 0)[-1]


def owners(layer: layertars.Layer) -> dict[str, tuple[int, int, int, bytes]]:
    """Owners and modes of what a layer has, but for whiteouts."""
    return {
        path: (entry.uid, entry.gid, entry.mode, entry.kind)
        for path, entry in layer.items()
        if layertars.WHITEOUT not in path
    }


@pytest.mark.parametrize("user", ["root", "rootless", "keep-id"])
def test_force_mask(area: Path, kernel_overlay: None, user: str) -> None:
    """Owners and modes are in an xattr; containers and images see them as on overlayfs."""
    arguments = ("--userns=keep-id", "--user", "0") if user == "keep-id" else ()
    with room(area / "home", rootless=user != "root") as one:
        seen, layers, built = {}, {}, {}
        for name in (KERNEL, OURS):
            options = ['force_mask = "0700"'] if name == OURS else []
            store = Store(one, area / "home" / name, name, options=options)
            store.import_busybox()
            done = store.call("podman", "run", "--name", "c", *arguments, "busybox", "sh", "-c", SCRIPT)
            seen[name] = (done.returncode, done.stdout, done.stderr)
            layers[name] = owners(committed(store, "c"))
            store.build("built", BUILT)
            look = "stat -c '%u:%g %a %h %F %n' /e /e/* /etc/passwd; ls /etc"
            built[name] = store.podman("run", "--rm", "built", "sh", "-c", look)
            if name == OURS:
                for path in (store.graph / "overlay").glob("*/diff/etc/*"):
                    if path.is_file() and not path.is_symlink():
                        assert path.stat().st_uid == one.uid
                        assert XATTR in os.listxattr(path)
                # podman does not store the sticky and set-id bits of what it unpacks.
                stored = {os.getxattr(path, XATTR) for path in (store.graph / "overlay").glob("*/diff/tmp")}
                assert b"0:0:0777" in stored
        code, out, errors = seen[KERNEL]
        assert seen[OURS] == (code, out.replace("0:0 1777 /tmp", "0:0 777 /tmp"), errors)
        layers[KERNEL]["tmp"] = (0, 0, 0o777, tarfile.DIRTYPE)
        assert layers[OURS] == layers[KERNEL]
        assert built[OURS] == built[KERNEL]


@pytest.mark.parametrize("rootless", [False, True], ids=["root", "rootless"])
@pytest.mark.parametrize("options", ["squash_to_root", "squash_to_uid=5,squash_to_gid=6"])
def test_squashed_owners(area: Path, rootless: bool, options: str) -> None:
    """All files belong to one user, as with fuse-overlayfs."""
    need(THEIRS)
    script = (
        "stat -c '%u:%g %a %n' / /bin/sh /etc/passwd /root; echo x >> /etc/passwd; echo new > /tmp/new;"
        "mkdir /tmp/d; stat -c '%u:%g %a %n' /etc/passwd /tmp/new /tmp/d; cat /etc/passwd /tmp/new"
    )
    with room(area / "home", rootless=rootless) as one:
        seen = {}
        for name in (THEIRS, OURS):
            store = Store(one, area / "home" / name, name, options=[f'mountopt = "{options}"'])
            store.import_busybox()
            store.build("image", "FROM busybox\nRUN chown 3:4 /etc/passwd && chmod 640 /etc/passwd\n")
            done = store.call("podman", "run", "--name", "c", "image", "sh", "-c", script)
            seen[name] = (done.returncode, done.stdout, done.stderr)
        assert seen[OURS] == seen[THEIRS]


@pytest.mark.parametrize("rootless", [False, True], ids=["root", "rootless"])
def test_what_podman_asks_for(area: Path, rootless: bool) -> None:
    """`run --rm` mounts with `volatile`, which marks the work directory meanwhile; another run does not.

    An image mount passes a lowerdir that ends in an empty directory.
    """
    with room(area / "home", rootless=rootless) as one:
        store = Store(one, area / "home/store", OURS, extra=("-o", "index=off"))
        calls = store.root / "calls"
        program = store.root / OURS
        program.write_text(program.read_text().replace("exec", f'echo "$2" >> {calls}\nexec'))
        store.import_busybox()
        store.podman("run", "--rm", "busybox", "sh", "-c", "echo x > /etc/new; cat /etc/new")
        assert "volatile" in calls.read_text().splitlines()[-1].split(",")
        calls.unlink()
        store.podman("run", "-d", "--rm", "--name", "c", "busybox", "sleep", "600")
        (volatile,) = (store.graph / "overlay").glob("*/work/work/incompat/volatile")
        store.podman("rm", "-f", "-t", "0", "c")
        assert not volatile.exists()
        calls.unlink()
        store.podman("create", "--name", "kept", "busybox", "sh", "-c", "echo y > /etc/new; cat /etc/new")
        assert store.podman("start", "-a", "kept") == "y\n"
        assert "volatile" not in calls.read_text().splitlines()[-1].split(",")
        calls.unlink()
        script = "m=$(podman image mount busybox) && cat $m/etc/issue && ls -A $m"
        around = ("podman", "unshare") if rootless else ()
        out = store.run(*around, "sh", "-ec", f"{script} && podman image umount busybox > /dev/null")
        assert out.split() == ["busybox", "bin", "etc", "root", "tmp"]
        (options,) = calls.read_text().splitlines()
        assert "upperdir" not in options
        assert options.split(",")[0].endswith("/empty")
        calls.unlink()
        volume = ("--mount", "type=image,source=busybox,destination=/image")
        out = store.podman("run", "--rm", *volume, "busybox", "sh", "-c", "cat /image/etc/issue; ls /image")
        assert out.split() == ["busybox", "bin", "etc", "root", "tmp"]


def test_podman_inside_a_user_namespace(area: Path, kernel_overlay: None) -> None:
    """As root of a user namespace that exists already, beside containers made from outside."""
    with room(area / "home", rootless=True) as one:
        shown = {}
        for name in (KERNEL, OURS):
            store = Store(one, area / "home" / name, name)
            store.import_busybox()
            store.podman("run", "--name", "outside", "busybox", "sh", "-c", "echo out > /etc/who")
            inside = ("podman", "unshare", "podman")
            script = "echo in > /etc/who; chown 5:6 /etc/who; rm -r /root; cat /etc/who; ls /"
            shown[name] = [
                store.run(*inside, "run", "--name", "inside", "busybox", "sh", "-c", script),
                store.run(*inside, "start", "-a", "outside"),
                store.run(*inside, "diff", "outside"),
                store.podman("diff", "inside"),
                store.podman("start", "-a", "inside"),
            ]
        assert shown[OURS] == shown[KERNEL]


@pytest.mark.parametrize("rootless", [False, True], ids=["root", "rootless"])
def test_buildah(area: Path, kernel_overlay: None, rootless: bool) -> None:
    """A container of buildah's: run, copy, mounted and changed by a program of the host, committed."""
    with room(area / "home", rootless=rootless) as one:
        layers, trees = {}, {}
        for name in (KERNEL, OURS):
            store = Store(one, area / "home" / name, name)
            store.import_busybox()
            (store.root / "tmp/copied").write_text("copied\n")
            os.utime(store.root / "tmp/copied", (1000, 1000))
            script = (
                "cd $0; buildah from --pull-never --name w busybox\n"
                "buildah run w -- sh -c 'mkdir /d; echo 1 > /d/f; chown 5:6 /d/f; chmod 4711 /d/f'\n"
                "buildah run w -- rm /etc/issue\n"
                "buildah copy --chown 7:8 w copied /d/copied\n"
                f"{'buildah unshare ' if rootless else ''}sh -ec 'm=$(buildah mount w); rm -r $m/root;"
                " mkdir $m/root; echo x > $m/root/x; buildah umount w'\n"
                "buildah run w -- sh -c 'mv /d /e && ln /e/f /e/g && touch -d @5 /e/f'\n"
                "buildah commit -q w committed\n"
            )
            store.run("sh", "-ec", script, store.root / "tmp")
            archive = store.root / "committed.tar"
            store.podman("save", "-q", "--format", "docker-archive", "-o", archive, "committed")
            layers[name] = layertars.read(archive, 0)[-1]
            look = "stat -c '%u:%g %a %F %n' /e /e/* /etc /root; stat -c %h /e/f; ls /etc /root; cat /e/*"
            trees[name] = store.podman("run", "--rm", "committed", "sh", "-c", look)
        assert trees[OURS] == trees[KERNEL]
        assert owners(layers[OURS]) == owners(layers[KERNEL])
