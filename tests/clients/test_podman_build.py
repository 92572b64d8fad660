"""Images built with a layer a step have the same layers on this mount program and on kernel overlayfs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.clients import debian, engines, layertars, packages
from tests.clients.engines import KERNEL, OURS, Store
from tests.clients.rooms import room
from tests.support import snapshot

pytestmark = [
    pytest.mark.usefixtures("kernel_overlay"), pytest.mark.clients, pytest.mark.timeout(900),
    pytest.mark.watchdog(850),
]  # fmt: skip

STEPS = r"""\
FROM debian
ENV DEBIAN_FRONTEND=noninteractive
COPY *.deb /tmp/debs/
RUN mkdir /data /data/removed && echo one > /data/one && echo gone > /data/removed/gone
RUN echo n > /data/nested && echo o > /data/other
RUN dpkg -i /tmp/debs/unionfs-probe_1.0_all.deb
RUN apt-get install -y /tmp/debs/unionfs-probe_2.0_all.deb && rm -rf /tmp/debs
RUN rm /data/one && rm -r /data/removed && rm -rf /usr/share/perl5/Debconf /etc/skel/.bashrc
RUN rm -r /etc/apt/apt.conf.d && echo "// file" > /etc/apt/apt.conf.d
RUN rm /etc/apt/apt.conf.d && mkdir /etc/apt/apt.conf.d && echo "// new" > /etc/apt/apt.conf.d/new
RUN rm -r /usr/share/debconf && mkdir /usr/share/debconf && echo again > /usr/share/debconf/again
RUN mkdir /links && echo x > /links/a && ln /links/a /links/b
RUN ln /etc/issue /etc/issue.link && ln /usr/bin/perl /links/perl
RUN chmod -R o-rx /usr/share/base-files && chown -R 12:34 /usr/share/bash-completion /etc/default
RUN chmod 2775 /srv && chmod 4755 /bin/cat
RUN mv /usr/share/tabset /usr/share/tabset.moved && mv /usr/lib/apt /opt/apt
RUN mv /etc/profile /etc/profile.old
RUN ln -s /nowhere /links/dangling && ln -sfn /opt/apt /usr/share/tabset && ln -sf dash /bin/sh.link
RUN mkfifo /links/fifo
RUN cp -a /etc/pam.d /data/pam.d && find /etc/pam.d -type f -exec touch -d 2001-02-03T04:05:06 {} +
RUN truncate -s 0 /etc/motd && echo more >> /etc/profile.old
RUN perl -e '($f, $n, $v) = ("/data/other", "security.capability", pack("V5", 0x02000001, 1 << 10));' \
    -e 'syscall(188, $f, $n, $v, 20, 0) == 0 or die $!; ($n, $v) = ("user.note", "text");' \
    -e 'syscall(188, $f, $n, $v, 4, 0) == 0 or die $!'
RUN apt-get purge -y unionfs-probe && apt-get check
RUN dd if=/dev/zero of=/data/sparse bs=1 count=1 seek=1M && chmod 0 /data/nested && chmod 700 /etc/default
"""

#: Files that differ between two builds on the same filesystem: logs, and caches with times in them.
OF_EACH_BUILD = ("var/log/", "var/cache/ldconfig/", "var/cache/apt/", "var/cache/debconf/")

#: New hard links of files below, which no comparison of two trees sees as such: podman's layers lose the
#: link, and kernel overlayfs, without an index, the one to a third name. See `layertars.differences`.
LINKED_BELOW = (b"etc/issue", b"etc/issue.link", b"usr/bin/perl", b"usr/bin/perl5.36.0", b"links/perl")


@pytest.fixture(scope="module", autouse=True)
def _programs() -> None:
    engines.need("podman", "buildah", "debootstrap", "dpkg-deb")
    try:
        debian.tree()
    except debian.Unavailable as reason:
        pytest.skip(str(reason))


def built(store: Store, context: Path) -> list[layertars.Layer]:
    """Build the image; its layers."""
    packages.import_debian(store)
    start = time.time()
    store.build("built", STEPS, context=context)
    archive = store.root / "built.tar"
    store.podman("save", "--format", "docker-archive", "-o", archive, "built")
    return layertars.read(archive, start)


def tree(store: Store, image: str) -> dict[bytes, object]:
    """What an image shows, without times and inode numbers; hard links by the names of a group."""
    with store.mounted_image(image) as path:
        found = snapshot.take(path)
    groups: dict[tuple[int, int], list[bytes]] = {}
    for name, entry in found.items():
        groups.setdefault((entry.dev, entry.ino), []).append(name)
    return {
        name: (oct(entry.mode), entry.uid, entry.gid, entry.rdev, entry.content, entry.xattrs, entry.names,
               () if name in LINKED_BELOW else tuple(sorted(groups[entry.dev, entry.ino])))
        for name, entry in found.items()
        if not name.decode(errors="replace").startswith(OF_EACH_BUILD)
    }  # fmt: skip


def test_the_layers_of_a_debian(area: Path) -> None:
    context = area / "context"
    context.mkdir()
    for version in ("1.0", "2.0"):
        packages.build_package(context, version)
    with room(area / "home") as one:
        stores = {name: Store(one, area / name, name) for name in (KERNEL, OURS)}
        layers = {name: built(store, context) for name, store in stores.items()}
        assert len(layers[OURS]) == len(layers[KERNEL])
        assert layers[OURS][0] == layers[KERNEL][0]
        before: layertars.Tree = layertars.apply({}, layers[KERNEL][0])
        for number, (mine, other) in enumerate(zip(layers[OURS], layers[KERNEL], strict=True)):
            if number == 0:
                continue
            wrong = {
                path: text for path, text in layertars.differences(mine, other, before).items()
                if not path.startswith(OF_EACH_BUILD)
            }  # fmt: skip
            assert not wrong, f"layer {number}: {wrong}"
            before = layertars.apply(before, other)
        expected = tree(stores[KERNEL], "built")
        assert tree(stores[OURS], "built") == expected
