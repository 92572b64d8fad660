"""docker's fuse-overlayfs driver runs this mount program when it is `fuse-overlayfs` in PATH."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import layertars
from tests.clients.engines import OURS, THEIRS, Docker, busybox_tar, mount_program
from tests.clients.rooms import room
from tests.mount.cli_calls import wait_for

pytestmark = [
    pytest.mark.usefixtures("kernel_overlay"), pytest.mark.clients, pytest.mark.timeout(600),
    pytest.mark.watchdog(550),
]  # fmt: skip

STEPS = """\
FROM busybox
RUN ["/bin/sh", "-c", "mkdir /d /d/sub && echo one > /d/one && echo two > /d/sub/two && echo gone > /gone"]
RUN ["/bin/sh", "-c", "rm /gone && rm -r /d/sub && mkdir /d/sub && echo new > /d/sub/new"]
RUN ["/bin/sh", "-c", "mv /d /e && ln /e/one /e/linked && chmod 4755 /etc/passwd && chown 5:6 /etc/issue"]
RUN ["/bin/sh", "-c", "rm -r /root && echo file > /root"]
"""
SHOW = (
    "cd /; find e d gone root etc/passwd etc/issue -exec stat -c '%n %a %u %h %F' {} + 2>/dev/null;"
    " cat /e/linked /e/sub/*"
)


@pytest.fixture
def dockers(area: Path) -> Iterator[dict[str, Docker]]:
    """A daemon on kernel overlayfs, and one whose driver mounts with this program."""
    program = mount_program(OURS)
    assert program is not None
    first = area / "path"
    first.mkdir()
    (first / THEIRS).symlink_to(program)
    with room(area / "home") as one:
        made = {
            "overlay2": Docker(one, area / "overlay2", "overlay2"),
            THEIRS: Docker(one, area / "ours", THEIRS, first_in_path=first),
        }
        yield made
        for docker in made.values():
            docker.close()


def test_build_run_save_and_load(dockers: dict[str, Docker], area: Path) -> None:
    views, layers = {}, {}
    context = area / "context"
    context.mkdir()
    (context / "Dockerfile").write_text(STEPS)
    start = time.time()
    for name, docker in dockers.items():
        assert docker.run("info", "--format", "{{.Driver}}").strip() == name
        docker.run("import", "-", "busybox", data=busybox_tar())
        docker.run("build", "--network", "none", "-t", "image", context)
        change = "echo c > /e/c; rm /e/one"
        docker.run("run", "--network", "none", "--name", "cc", "image", "/bin/sh", "-c", change)
        run = ("run", "--rm", "--network", "none")
        views[name] = [
            sorted(docker.run(*run, "image", "/bin/sh", "-c", SHOW).splitlines()),
            sorted(docker.run("diff", "cc").splitlines()),
        ]
        docker.run("commit", "cc", "committed")
        docker.run("save", "-o", area / f"{name}.tar", "committed")
        layers[name] = layertars.read(area / f"{name}.tar", start)
        docker.run("rm", "cc")
        docker.run("rmi", "-f", "committed", "image")
        docker.run("load", "-i", area / f"{name}.tar")
        views[name].append(sorted(docker.run(*run, "committed", "/bin/sh", "-c", SHOW).splitlines()))
    assert views[THEIRS] == views["overlay2"]
    before: layertars.Tree = {}
    for mine, other in zip(layers[THEIRS], layers["overlay2"], strict=True):
        assert layertars.differences(mine, other, before) == {}
        before = layertars.apply(before, other)


def mounted(docker: Docker) -> list[str]:
    """The unions below the daemon's root."""
    lines = docker.room.mounts().splitlines()
    return [line for line in lines if "fuse.unionfs" in line and f"{docker.root}/" in line]


def test_the_mounts_are_ours(dockers: dict[str, Docker]) -> None:
    docker = dockers[THEIRS]
    docker.run("import", "-", "busybox", data=busybox_tar())
    docker.run("run", "-d", "--network", "none", "--name", "cc", "busybox", "/bin/sleep", "600")
    assert mounted(docker)
    docker.run("exec", "cc", "/bin/sh", "-c", "echo kept > /etc/kept")
    docker.run("restart", "-t", "0", "cc")
    assert docker.run("exec", "cc", "/bin/cat", "/etc/kept") == "kept\n"
    docker.run("rm", "-f", "cc")
    assert wait_for(lambda: not mounted(docker), 20)
