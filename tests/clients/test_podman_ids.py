"""Containers with mapped ids, rootless and as root, see and store what they do on kernel overlayfs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from tests.clients import layertars
from tests.clients.engines import KERNEL, OURS, Store
from tests.clients.rooms import Room, room
from tests.mount.cli_calls import wait_for
from tests.support import areas, snapshot
from tests.support.patience import patient

pytestmark = [pytest.mark.usefixtures("root"), pytest.mark.clients]

#: What a container does with owners. Ids without a range, and what its user may not do, fail on both.
SCRIPT = """
id -u; id -g
stat -c '%u:%g %a %n' /bin /bin/sh /etc /etc/passwd /tmp /root
touch /tmp/new; mkdir /tmp/dir; stat -c '%u:%g %a' /tmp/new /tmp/dir
chown 5:6 /tmp/new && stat -c '%u:%g' /tmp/new
chmod 4711 /tmp/new && stat -c %a /tmp/new
chown 70000 /tmp/new || echo no such id
chown 7 /etc/passwd && stat -c '%u:%g %s' /etc/passwd
echo more >> /etc/group && stat -c '%u:%g' /etc/group
cat /etc/passwd /etc/group
rm -r /root && mkdir /root && stat -c '%u:%g' /root
mv /etc/issue /tmp/issue && ls /etc /bin
ln /tmp/new /tmp/linked && stat -c '%h' /tmp/new
stat -c '%u:%g %a' /etc/group /tmp/new
"""

ROOT_MAPS = {
    "host": (),
    "ranges": ("--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536"),
    "one": ("--uidmap", "0:100000:1", "--gidmap", "0:200000:1"),
}
#: Where root's podman 4.3 commits the ids of the container, not those of the host: with one id for everything
#: on no mount program, and never on kernel overlayfs.
UNMAPPED = {"host": (KERNEL, OURS), "ranges": (OURS,), "one": ()}
ROOTLESS_MAPS = {
    "host": (),
    "keep-id": ("--userns=keep-id",),
    "keep-id as root": ("--userns=keep-id", "--user", "0"),
    "ranges": ("--uidmap", "0:1:1000", "--gidmap", "0:1:1000"),
    "several": ("--uidmap", "0:0:1", "--uidmap", "1:100:5000"),
    "one": ("--uidmap", "0:0:1", "--gidmap", "0:0:1"),
}

OF_ENGINES = (b"etc/mtab", b"run", b"proc", b"dev", b"sys", b"etc/host", b"etc/resolv.conf")


def stored(store: Store, container: str) -> dict[bytes, object]:
    """The upper of a container without what engines put into it, times, and owners.

    With mapped ids owners differ: for the kernel podman copies the image with other owners, while a mount
    program stores those of the image.
    """
    found = snapshot.take(store.upper_of(container))
    return {
        path: (oct(entry.mode), entry.rdev, entry.content)
        for path, entry in found.items()
        if path != b"." and not path.startswith(OF_ENGINES)
    }


def check(
    stores: dict[str, Store], arguments: tuple[str, ...], unmapped: tuple[str, ...] = (KERNEL, OURS)
) -> None:
    """Run the script on both filesystems, look at the uppers, and commit."""
    seen, uppers, layers = {}, {}, {}
    for name, store in stores.items():
        done = store.call("podman", "run", "--name", "c", *arguments, "busybox", "sh", "-c", SCRIPT)
        seen[name] = (done.returncode, done.stdout, done.stderr)
        uppers[name] = stored(store, "c")
        store.podman("commit", "-q", "c", "committed")
        archive = store.root / "committed.tar"
        archive.unlink(missing_ok=True)
        store.podman("save", "-q", "--format", "docker-archive", "-o", archive, "committed")
        layers[name] = layertars.read(archive, 0)[1]
        # An image of a container with mapped ids has the container's own ids, and another one shows the same.
        look = ("stat", "-c", "%u:%g %a", "/etc/group", "/tmp/new")
        again = store.podman("run", "--rm", "committed", *look)
        if name in unmapped:
            assert seen[name][1].endswith(again)
        # The process that cleans up after a container may still be at work. Then podman reports an error, but
        # has forgotten the container.
        assert wait_for(partial(succeeds, store, "podman", "rm", "--ignore", "c"), patient(20))
        store.podman("rmi", "committed")
    assert seen[OURS] == seen[KERNEL]
    assert uppers[OURS] == uppers[KERNEL]
    owners = {
        name: {path: (e.uid, e.gid, e.mode) for path, e in layer.items() if layertars.WHITEOUT not in path}
        for name, layer in layers.items()
    }  # fmt: skip
    if unmapped == (KERNEL, OURS):
        assert owners[OURS] == owners[KERNEL]


def succeeds(store: Store, *command: str) -> bool:
    return store.call(*command).returncode == 0


@pytest.fixture(scope="module")
def root_stores() -> Iterator[tuple[Room, dict[str, Store]]]:
    with areas.area() as area, room(area / "home") as one:
        stores = {name: Store(one, area / name, name) for name in (KERNEL, OURS)}
        for store in stores.values():
            store.import_busybox()
        yield one, stores


@pytest.fixture(scope="module")
def rootless_stores() -> Iterator[tuple[Room, dict[str, Store]]]:
    with areas.area() as area, room(area / "home", rootless=True) as one:
        stores = {name: Store(one, area / "home" / name, name) for name in (KERNEL, OURS)}
        for store in stores.values():
            store.import_busybox()
        yield one, stores


@pytest.mark.parametrize("ids", ROOT_MAPS)
def test_as_root(root_stores: tuple[Room, dict[str, Store]], kernel_overlay: None, ids: str) -> None:
    _, stores = root_stores
    check(stores, ROOT_MAPS[ids], UNMAPPED[ids])


@pytest.mark.parametrize("ids", ROOTLESS_MAPS)
def test_rootless(
    rootless_stores: tuple[Room, dict[str, Store]], kernel_overlay: None, ids: str
) -> None:
    _, stores = rootless_stores
    check(stores, ROOTLESS_MAPS[ids])
