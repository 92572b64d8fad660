"""The processes that use a mount, and the mounts that stay when one is unmounted."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from unionfs.sys.mountinfo import MountEntry, mounted_at, parse_mountinfo
from unionfs.sys.mountspaces import copies, processes_with
from unionfs.sys.mountusers import users_of_device, users_of_mount


@contextmanager
def _tmpfs(path: Path) -> Iterator[MountEntry]:
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], capture_output=True)
    if done.returncode != 0:
        pytest.skip("mounting needs root")
    try:
        found = mounted_at(str(path))
        assert found is not None
        yield found
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_by_the_mount(tmp_path: Path) -> None:
    """Not the directory below it, nor another mount with such a name."""
    (tmp_path / "place").mkdir()
    below = subprocess.Popen(["sleep", "30"], cwd=tmp_path / "place")
    try:
        (tmp_path / "place").rmdir()
        with _tmpfs(tmp_path / "place") as mount:
            assert users_of_mount(mount.mount_id, None) == []
            with subprocess.Popen(["sleep", "30"], cwd=tmp_path / "place") as inside:
                (user,) = users_of_mount(mount.mount_id, None)
                (same,) = users_of_device(mount.device)
                inside.kill()
            assert (user.pid, user.command, user.how) == (inside.pid, "sleep", "cwd")
            assert str(user) == f"sleep (pid {inside.pid}, cwd)"
            assert same == user
    finally:
        below.kill()
        below.wait()


def test_copies_in_this_namespace_and_in_others(tmp_path: Path) -> None:
    with _tmpfs(tmp_path / "place") as mount:
        assert [copy for pid, copy in copies(mount) if not pid] == []
        (tmp_path / "second").mkdir()
        subprocess.run(["mount", "--bind", tmp_path / "place", tmp_path / "second"], check=True)
        here = [copy.mountpoint for pid, copy in copies(mount) if not pid]
        assert here == [str(tmp_path / "second")]
        subprocess.run(["umount", tmp_path / "second"], check=True)
        with subprocess.Popen(["unshare", "-m", "sh", "-c", "echo; exec sleep 30"], stdout=-1) as other:
            assert other.stdout is not None
            other.stdout.readline()
            # Other tests may have namespaces, too.
            assert other.pid in [pid for pid, _ in copies(mount)]
            assert other.pid in processes_with(mount.device)
            other.kill()
        assert os.path.ismount(tmp_path / "place")


def test_peer_groups_are_read() -> None:
    table = (
        b"36 35 98:0 / /mnt rw,noatime shared:7 master:3 propagate_from:2 - ext3 /dev/root rw\n"
        b"37 36 98:1 / /mnt/x rw - ext3 /dev/other rw\n"
    )
    first, second = parse_mountinfo(table)
    assert (first.group, first.master) == ("7", "3")
    assert (second.group, second.master) == ("", "")
