"""What a kept container has and ends with: anonymous volumes, its mount, a lower that holds the storage."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import refused
from tests.mount.run_calls import Containers


def test_an_anonymous_volume_is_found_again(box: Containers) -> None:
    volumes = box.root / "volumes"
    box.say("--name", "kept", "-v", "/data", "-v", "/more", "--", "touch", "/data/x", "/more/y")
    names = sorted(os.listdir(volumes))
    assert box.say("--name", "kept", "-v", "/data", "--", "ls", "/data", lower=False) == "seed\nx\n"
    assert box.say("--name", "kept", "-v", "/more", "--", "ls", "/more", lower=False) == "y\n"
    assert box.say("--name", "kept", "-v", "/third", "--", "ls", "/third", lower=False) == ""
    box.say("--name", "other", "-v", "/data", "--", "touch", "/data/z")
    assert len(os.listdir(volumes)) == 4
    assert set(names) < set(os.listdir(volumes))
    assert cli_calls.unionfs("rm", "-v", "kept", env=box.environment()).stdout == "kept\n"
    assert len(os.listdir(volumes)) == 1
    assert cli_calls.unionfs("rm", "other", env=box.environment()).stdout == "other\n"
    assert len(os.listdir(volumes)) == 1


def test_w_is_the_working_directory_as_in_docker(box: Containers) -> None:
    assert box.say("--rm", "-w", "/tmp", "--", "sh", "-c", "pwd") == "/tmp\n"
    refused(box.run("--rm", "--work", "/tmp", "--", "true"), "--work /tmp", "-w DIR")
    upper = box.area / "upper"
    upper.mkdir()
    done = box.run("--rm", "-u", upper, "-w", "/tmp", "--", "true")
    refused(done, "without a work directory", "--work DIR")
    assert box.kept() == []


def test_a_copied_mount_namespace_does_not_keep_the_container(box: Containers) -> None:
    """One that starts while the container runs has a copy of its mount, as a service's of systemd."""
    container = box.start("--name", "held", "--", "sh", "-c", "echo up; sleep 1")
    assert container.stdout is not None
    assert container.stdout.readline() == "up\n"
    copy = subprocess.Popen(["unshare", "-m", "sh", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE)
    try:
        assert copy.stdout is not None
        copy.stdout.readline()
        assert str(box.root) in Path(f"/proc/{copy.pid}/mountinfo").read_text()
        assert container.communicate(timeout=cli_calls.SECONDS) == ("", "")
        assert container.returncode == 0
        assert box.is_over()
        assert box.say("--name", "held", "--", "echo", "again", lower=False) == "again\n"
    finally:
        copy.kill()
        copy.communicate()


@pytest.mark.parametrize("depth", ["", "var", "var/lib/deep"])
def test_a_lower_may_hold_the_storage_root(box: Containers, depth: str) -> None:
    """As `-l /` does; the union then sees an empty directory in its place."""
    box.root = box.base / depth / "store"
    box.root.parent.mkdir(parents=True, exist_ok=True)
    box.root.parent.chmod(0o751)
    inside = f"/{box.root.relative_to(box.base)}"
    words = ("--name", "kept", "--", "sh", "-c")
    assert box.say(*words, f"ls -A {inside}; echo x > {inside}/new; ls {inside}") == "new\n"
    assert (box.root.parent.stat().st_mode & 0o7777) == 0o751
    assert not (box.root / "new").exists()
    upper = box.root / "containers/kept/upper"
    assert (upper / inside[1:] / "new").read_text() == "x\n"
    # Whatever becomes of that directory, the lower's is not reached.
    parent = os.path.dirname(inside)
    assert "store" not in box.say(*words, f"rm -r {inside} && ls {parent}", lower=False).split()
    assert box.say(*words, f"mkdir {inside} && ls -A {inside}", lower=False) == ""
    if depth:
        top = depth.split("/")[0]
        rest = inside[len(f"/{top}") :]
        assert box.say(*words, f"mv /{top} /moved && ls -A /moved{rest}", lower=False) == ""
    assert (box.root / "containers/kept/container.json").exists()
    assert cli_calls.unionfs("rm", "kept", env=box.environment()).returncode == 0
