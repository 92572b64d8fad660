"""The life of containers on this mount program: many of them, killed daemons, stores of fuse-overlayfs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from tests.clients.engines import KERNEL, OURS, THEIRS, Store, need
from tests.clients.rooms import Room, room
from tests.mount.cli_calls import wait_for

pytestmark = [
    pytest.mark.usefixtures("root"), pytest.mark.clients, pytest.mark.timeout(600), pytest.mark.watchdog(550),
]  # fmt: skip


@pytest.fixture(params=["root", "rootless"])
def store(request: pytest.FixtureRequest, area: Path) -> Iterator[Store]:
    """An empty store with the image of busybox, as root and rootless."""
    with room(area / "home", rootless=request.param == "rootless") as one:
        made = Store(one, area / "home/store")
        made.import_busybox()
        yield made


def merged_mounts(store: Store) -> list[str]:
    """The mountpoints of containers in all mount namespaces of the room."""
    text = store.room.as_root("sh", "-c", "cat /proc/[0-9]*/mountinfo 2>/dev/null || true")
    return [line for line in text.splitlines() if f"{store.graph}/overlay/" in line and "/merged " in line]


def daemons(one: Room) -> list[dict[str, object]]:
    """What `unionfs ls` shows of the root's mounts in the room."""
    done = one.call(sys.executable, "-m", "unionfs", "ls", "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, object]] = json.loads(done.stdout)
    return found


def test_fifty_in_a_row(store: Store) -> None:
    for number in range(50):
        script = f"echo {number} > /tmp/x; cat /tmp/x; ls /tmp"
        out = store.podman("run", "--rm", "busybox", "sh", "-c", script)
        assert out == f"{number}\nx\n"
    assert wait_for(lambda: merged_mounts(store) == [], 20)


def test_ten_at_once(store: Store) -> None:
    script = "echo $0 > /etc/who; sleep 1; cat /etc/who; rm -r /root; ls /"

    def run(number: int) -> str:
        return store.podman("run", "--rm", "busybox", "sh", "-c", script, str(number))

    with ThreadPoolExecutor(10) as pool:
        results = list(pool.map(run, range(10)))
    assert [text.split()[0] for text in results] == [str(number) for number in range(10)]
    assert all("root" not in text.split() for text in results)
    assert wait_for(lambda: merged_mounts(store) == [], 20)


def test_the_daemon_is_killed_under_a_container(area: Path) -> None:
    with room(area / "home") as one:
        store = Store(one, area / "store")
        store.import_busybox()
        script = "echo kept > /etc/kept; exec sleep 600"
        store.podman("run", "-d", "--name", "c", "busybox", "sh", "-c", script)
        assert wait_for(lambda: store.call("podman", "exec", "c", "cat", "/etc/kept").stdout == "kept\n", 20)
        (daemon,) = daemons(one)
        one.as_root("kill", "-KILL", str(daemon["pid"]))
        assert wait_for(lambda: store.call("podman", "exec", "c", "cat", "/etc/kept").returncode != 0, 20)
        assert store.podman("run", "--rm", "busybox", "echo", "another") == "another\n"
        store.call("podman", "kill", "c")
        assert store.call("podman", "stop", "-t", "1", "c").returncode == 0
        store.podman("start", "c")
        assert wait_for(lambda: store.call("podman", "exec", "c", "cat", "/etc/kept").stdout == "kept\n", 20)
        store.podman("rm", "-f", "-t", "0", "c")
        assert merged_mounts(store) == []


def test_a_restart_beside_a_foreign_mount_namespace(area: Path) -> None:
    """A process with a copy of the mount table keeps the first daemon alive when the container restarts."""
    with room(area / "home") as one:
        store = Store(one, area / "store")
        store.import_busybox()
        store.podman("run", "-d", "--name", "c", "busybox", "sleep", "600")
        store.podman("exec", "c", "sh", "-c", "echo first > /etc/kept")
        script = "touch there; exec sleep 600"
        beside = one.command("unshare", "-m", "--propagation", "private", "sh", "-c", script)
        with subprocess.Popen(beside, stdin=subprocess.DEVNULL):  # it ends with the room
            try:
                assert wait_for((one.home / "there").exists, 20)
                store.podman("stop", "-t", "0", "c")
                changed = {"C /etc", "A /etc/kept"}
                assert changed <= set(store.podman("diff", "c").splitlines())
                store.podman("commit", "-q", "c", "committed")
                assert store.podman("run", "--rm", "committed", "cat", "/etc/kept") == "first\n"
                store.podman("start", "c")
                assert store.podman("exec", "c", "cat", "/etc/kept") == "first\n"
                store.podman("exec", "c", "sh", "-c", "echo second > /etc/kept")
                assert store.podman("exec", "c", "cat", "/etc/kept") == "second\n"
                store.podman("rm", "-f", "-t", "0", "c")
            finally:
                one.close()


DELETES = """\
FROM busybox
RUN mkdir /d /d/sub && echo one > /d/one && echo two > /d/sub/two && echo gone > /gone
RUN rm /gone && rm -r /d/sub && mkdir /d/sub && echo new > /d/sub/new
RUN mv /d /e && ln /e/one /e/linked && chmod 4755 /etc/issue
"""
SHOW = (
    "cd /; find e d gone etc/issue made -exec stat -c '%n %a %u %F' {} + 2>/dev/null;"
    " find e -type f -exec stat -c '%n %h' {} + 2>/dev/null;"
    " cat /e/linked /e/sub/* 2>/dev/null; true"
)


@pytest.mark.parametrize("rootless", [False, True], ids=["root", "rootless"])
def test_stores_of_fuse_overlayfs(area: Path, rootless: bool) -> None:
    """Images and containers of one are used and changed by the other, there and back."""
    need(THEIRS)
    with room(area / "home", rootless=rootless) as one:
        store = Store(one, area / "home/store", THEIRS)
        store.import_busybox()
        store.build("image", DELETES)
        store.podman("create", "--name", "c", "image", "sh", "-c", f"sh /script; {SHOW}")
        shown = []
        # Each step is made with one program and looked at with the other.
        steps = (
            (THEIRS, "rm -r /e/sub; mkdir /e/sub; echo again > /e/sub/again; rm /e/one; mv /bin/dd /bin/ee"),
            (OURS, "echo x >> /e/linked; rm -r /e/sub; echo file > /e/sub; mkdir /made; touch /made/a"),
            (THEIRS, "rm /e/sub /made/a; mkdir -m 700 /e/sub; echo third > /e/sub/third; mv /made /e/moved"),
            (OURS, "rm -r /e/moved; mkdir /e/moved; echo last > /e/linked"),
        )
        for program, script in steps:
            store.use(program)
            store.run("podman", "cp", "-", "c:/", data=_script(script))
            store.podman("start", "-a", "c")
            views = {}
            for reader in (OURS, THEIRS):
                store.use(reader)
                store.run("podman", "cp", "-", "c:/", data=_script("true"))
                views[reader] = sorted(store.podman("start", "-a", "c").splitlines())
            assert views[OURS] == views[THEIRS], program
            shown.append(views[OURS])
        assert all(one != other for one, other in pairwise(shown))
        assert "last" in shown[-1]


def seen(store: Store, image: str, script: str) -> list[str]:
    """The output of a script in a new container, sorted: the order of names is the filesystem's."""
    return sorted(store.podman("run", "--rm", image, "sh", "-c", script).splitlines())


def _script(text: str) -> bytes:
    """A tar with the file `script`."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo("script")
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


def test_copy_from_keeps_hard_links(area: Path, kernel_overlay: None) -> None:
    """`COPY --from` of a directory with hard-linked names of a lower: one file in the new layer."""
    with room(area / "home") as one:
        sizes = {}
        for program in (KERNEL, OURS):
            store = Store(one, area / program, program)
            store.import_busybox()
            store.build("copy", "FROM busybox AS base\nFROM scratch\nCOPY --from=base /bin /bin\n")
            links = store.podman("run", "--rm", "copy", "/bin/stat", "-c", "%h %i", "/bin/busybox", "/bin/ls")
            first, second = links.splitlines()
            assert first == second
            sizes[program] = (
                int(store.podman("inspect", "--format", "{{.Size}}", "copy")), first.split()[0]
            )  # fmt: skip
        (ours, names), (kernels, expected) = sizes[OURS], sizes[KERNEL]
        assert names == expected
        # With the configuration, whose times end in other digits.
        assert abs(ours - kernels) < 100


def test_steps_that_delete(area: Path, kernel_overlay: None) -> None:
    """Deleted files do not come back: in the image, saved and loaded, and moved with their directory."""
    with room(area / "home") as one:
        views = {}
        for program in (KERNEL, OURS):
            store = Store(one, area / program, program)
            store.import_busybox()
            store.build("image", DELETES)
            views[program] = [seen(store, "image", SHOW)]
            archive = store.root / "image.tar"
            store.podman("save", "-q", "-o", archive, "image")
            store.podman("rmi", "-f", "image")
            store.podman("load", "-q", "-i", archive)
            views[program].append(seen(store, "image", SHOW))
            store.build("above", "FROM image\nRUN mv /e /f && cp -a /f /g && rm -r /f/sub\n")
            script = SHOW.replace("find e", "find f g e").replace("/e/linked /e/sub", "/f/linked /g/sub")
            views[program].append(seen(store, "above", script))
            assert ".wh." not in str(views[program])
        assert views[OURS] == views[KERNEL]
