"""Mounts whose daemon was killed, and `unionfs cleanup`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.mount.cli_calls import (
    UNIONFS,
    Place,
    files_of,
    kill,
    listed,
    mounts_at,
    refused,
    session_words,
    stopped,
    succeed,
    unionfs,
)
from tests.mount.user_calls import UID, Host
from tests.support import syscalls


class TestCleanup:
    def test_by_name(self, place: Place, session: str) -> None:
        pid = place.mount(*session_words(session))
        (place.merged / "new").write_text("x")
        kill(pid)
        assert succeed(unionfs("cleanup", "--dry-run", place.merged)) == (
            f"would unmount {place.merged}: its daemon (pid {pid}) has died\n"
        )
        assert mounts_at(place.merged) == ["fuse.unionfs"]
        assert files_of(pid)
        assert succeed(unionfs("cleanup", "merged", cwd=place.root)) == (
            f"unmounted {place.merged}: its daemon (pid {pid}) has died\n"
        )
        assert mounts_at(place.merged) == []
        assert not files_of(pid)
        assert (place.upper / "new").read_text() == "x"

    def test_without_a_registry_entry(self, place: Place) -> None:
        pid = place.mount()
        kill(pid)
        place.entry().remove()
        done = listed(unionfs("cleanup", "--json", place.merged))
        assert done == {
            "dry_run": False,
            "unmounted": [{"mountpoint": str(place.merged), "pid": None, "uid": None}],
            "forgotten": [],
        }
        assert mounts_at(place.merged) == []

    def test_in_use(self, place: Place) -> None:
        pid = place.mount()
        with (place.merged / "base").open() as held:
            kill(pid)
            succeed(unionfs("cleanup", place.merged))
            assert mounts_at(place.merged) == []
            assert os.fstat(held.fileno()).st_size == 5

    def test_two_at_one_place(self, place: Place) -> None:
        """The upper one is cleaned first; then the other one can be seen."""
        first = place.mount()
        (place.root / "under").mkdir()
        subprocess.run(["mount", "--bind", place.merged, place.root / "under"], check=True)
        kill(first)
        for _ in range(2):
            where = place.merged if mounts_at(place.merged) else place.root / "under"
            succeed(unionfs("cleanup", where))
            assert mounts_at(where) == []

    @pytest.mark.parametrize("registered", [True, False])
    def test_a_live_mount_stays(self, place: Place, session: str, registered: bool) -> None:
        place.mount(*session_words(session))
        entry = place.entry()
        if not registered:
            entry.remove()
        try:
            refused(unionfs("cleanup", place.merged), "is not dead", f"unionfs umount {place.merged}")
            assert (place.merged / "base").read_text() == "base\n"
        finally:
            entry.save()

    @pytest.mark.slow
    @pytest.mark.parametrize("registered", [True, False])
    def test_a_mount_that_hangs_stays(self, place: Place, session: str, registered: bool) -> None:
        pid = place.mount(*session_words(session))
        entry = place.entry()
        if not registered:
            entry.remove()
        try:
            with stopped(pid):
                found = listed(unionfs("cleanup", "--json", "--dry-run"))["unmounted"]
                assert str(place.merged) not in [one["mountpoint"] for one in found]
                refused(unionfs("cleanup", place.merged), "is not dead")
                refused(unionfs("mount", "-l", place.lower, place.merged), "is busy")
            assert (place.merged / "base").read_text() == "base\n"
        finally:
            entry.save()

    def test_what_is_no_mount_of_unionfs(self, place: Place) -> None:
        refused(unionfs("cleanup", place.merged), "is not a unionfs mount")
        refused(unionfs("cleanup", "/proc"), "is not a unionfs mount")

    def test_one_of_two_names(self, place: Place) -> None:
        pid = place.mount()
        kill(pid)
        done = unionfs("cleanup", place.lower, place.merged)
        assert done.returncode == 1
        assert done.stdout == f"unmounted {place.merged}: its daemon (pid {pid}) has died\n"
        assert done.stderr.startswith(f"unionfs: {place.lower} is not a unionfs mount")

    def test_a_covered_one_stays(self, place: Place) -> None:
        """The mount on top is another's."""
        pid = place.mount()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place.merged], check=True)
        kill(pid)
        try:
            refused(unionfs("cleanup", place.merged), "is not a unionfs mount")
            assert sorted(mounts_at(place.merged)) == ["fuse.unionfs", "tmpfs"]
        finally:
            syscalls.umount(place.merged)

    def test_one_with_another_mount_inside(self, place: Place) -> None:
        pid = place.mount()
        (place.merged / "sub").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place.merged / "sub"], check=True)
        kill(pid)
        for command in (("cleanup", place.merged), ("mount", *place.layers, place.merged)):
            refused(unionfs(*command), f"{place.merged}/sub is mounted inside the dead mount {place.merged}")
        assert mounts_at(place.merged / "sub") == ["tmpfs"]
        succeed(unionfs("umount", place.merged))
        assert mounts_at(place.merged / "sub") == mounts_at(place.merged) == []

    def test_one_inside_another(self, place: Place) -> None:
        outer = place.mount()
        (place.merged / "sub").mkdir()
        succeed(unionfs("mount", "-l", place.lower2, place.merged / "sub"))
        (inner,) = (
            one["pid"] for one in listed(unionfs("ls", "--json")) if one["mountpoint"].endswith("/sub")
        )
        kill(outer)
        kill(inner)
        succeed(unionfs("cleanup", place.merged))
        assert mounts_at(place.merged) == mounts_at(place.merged / "sub") == []

    def test_a_live_union_inside_a_dead_one_stays(self, place: Place) -> None:
        outer = place.mount()
        (place.merged / "sub").mkdir()
        succeed(unionfs("mount", "-l", place.lower2, place.merged / "sub"))
        kill(outer)
        refused(unionfs("cleanup", place.merged), f"{place.merged}/sub is mounted inside")
        assert mounts_at(place.merged / "sub") == ["fuse.unionfs"]
        succeed(unionfs("umount", "--lazy", place.merged))


class TestAll:
    """In a mount namespace with a registry of its own: other dead mounts of this host are none of ours."""

    @pytest.fixture(autouse=True)
    def registry(self, host: Host) -> None:
        host.root("umount", "-l", "-a", "-t", "fuse.unionfs")
        host.root("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run/unionfs")

    @staticmethod
    def words() -> list[str | Path]:
        environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": os.environ["PATH"]}
        return ["env", *(f"{name}={value}" for name, value in environment.items()), *UNIONFS]

    def as_root(self, host: Host, *arguments: str | Path, code: int = 0) -> str:
        done = host.root(*self.words(), *arguments, check=False)
        assert done.returncode == code, done.stderr
        assert done.stderr == ""
        return done.stdout

    def roots(self, host: Host, place: Place, name: str) -> tuple[Path, int]:
        """A mount of root's there; returns the mountpoint and the daemon's pid."""
        where = place.root / name
        where.mkdir()
        self.as_root(host, "mount", "-l", place.lower, where)
        names = host.root("ls", "/run/unionfs").stdout.split()
        pids = {int(name.partition("-")[0]) for name in names if name.endswith(".json")}
        return where, next(pid for pid in pids if self.mountpoint_of(host, pid) == str(where))

    @staticmethod
    def mountpoint_of(host: Host, pid: int) -> str:
        text = host.root("sh", "-c", f"cat /run/unionfs/{pid}-*.json").stdout
        found: str = json.loads(text)["settings"]["mountpoint"]
        return found

    def mounted(self, host: Host, path: Path) -> bool:
        return f" {path} fuse.unionfs" in host.root("cat", "/proc/mounts").stdout

    def test_of_a_user(self, host: Host, place: Place) -> None:
        where, pid = self.roots(host, place, "roots")
        own = host.mount()
        for number in (pid, own):
            kill(number)
        (mine,) = listed(host.unionfs("ls", "--json"))
        assert (mine["mountpoint"], mine["state"]) == (str(place.merged), "dead")
        refused(host.unionfs("cleanup", where), "belongs to uid 0")
        assert succeed(host.unionfs("cleanup", "--dry-run")).startswith("would unmount")
        assert self.mounted(host, place.merged)
        assert succeed(host.unionfs("cleanup")) == (
            f"unmounted {place.merged}: its daemon (pid {own}) has died\n"
        )
        assert not self.mounted(host, place.merged)
        assert self.mounted(host, where)
        assert [name for name in os.listdir(host.runtime / "unionfs") if name != "unionfs.log"] == []
        host.mount()
        succeed(host.unionfs("umount", place.merged))

    def test_of_root(self, host: Host, place: Place) -> None:
        """Also of other users; live and hanging ones stay."""
        where, dead = self.roots(host, place, "dead")
        alive, _ = self.roots(host, place, "alive")
        hanging, hung = self.roots(host, place, "hanging")
        own = host.mount()
        for number in (dead, own):
            kill(number)
        with stopped(hung):
            shown = self.as_root(host, "ls").splitlines()
            assert {line.split()[0] for line in shown if " dead " in line} == {str(where), str(place.merged)}
            done = self.as_root(host, "cleanup").splitlines()
        assert sorted(done) == sorted(
            [
                f"unmounted {place.merged} of uid {UID}: its daemon has died",
                f"unmounted {where}: its daemon (pid {dead}) has died",
            ]
        )
        assert not self.mounted(host, place.merged)
        assert not self.mounted(host, where)
        assert self.mounted(host, alive)
        assert self.mounted(host, hanging)
        for path in (alive, hanging):
            self.as_root(host, "umount", path)

    def test_a_users_mount_that_hangs(self, host: Host, place: Place) -> None:
        own = host.mount()
        with stopped(own):
            assert " dead " not in self.as_root(host, "ls")
            assert self.as_root(host, "cleanup") == ""
        assert self.mounted(host, place.merged)
        assert host.run("cat", place.merged / "base").stdout == "base\n"

    def test_stale_files(self, host: Host, place: Place) -> None:
        """Of daemons whose mount is gone, too, as after `umount -l`."""
        _, pid = self.roots(host, place, "once")
        with stopped(pid):
            host.root("umount", "-l", place.root / "once")
            kill(pid)
        assert self.as_root(host, "cleanup", "--dry-run") == (
            f"would remove the registry entry of {place.root}/once: its daemon (pid {pid}) has died\n"
        )
        assert self.as_root(host, "cleanup") == (
            f"removed the registry entry of {place.root}/once: its daemon (pid {pid}) has died\n"
        )
        assert host.root("ls", "/run/unionfs").stdout.split() in ([], ["unionfs.log"])

    def test_daemons_of_other_pid_namespaces(self, host: Host, place: Place) -> None:
        """They share the registry: no command takes daemons for dead that it cannot see."""
        where, _ = self.roots(host, place, "here")
        before = self.entries(host)
        there = ("unshare", "-p", "-f", "--mount-proc", *self.words())
        assert host.root(*there, "ls").stdout == ""
        assert self.entries(host) == before
        assert str(where) in self.as_root(host, "ls")

        other = place.root / "other"
        other.mkdir()
        script = '"$0" "$@" && ls /run/unionfs'  # the daemon is killed with the namespace
        words = [*there[:4], "sh", "-c", script, *self.words(), "mount", "-l", place.lower, other]
        assert len(host.root(*words).stdout.split()) > len(before)
        assert str(other) not in self.as_root(host, "ls")
        assert self.entries(host) == before
        self.as_root(host, "umount", where)

    def test_a_registry_that_others_may_write(self, host: Host, place: Place) -> None:
        """Another one is not taken instead: what the first one knows would be lost."""
        where, _ = self.roots(host, place, "here")
        host.root("chmod", "1777", "/run/unionfs")
        for words in (["ls"], ["umount", where], ["cleanup"], ["mount", "-l", place.lower, place.merged]):
            done = host.root(*self.words(), *words, check=False)
            refused(done, "/run/unionfs cannot be used for runtime files", "chmod 700 /run/unionfs")
        host.root("chmod", "700", "/run/unionfs")
        assert str(where) in self.as_root(host, "ls")
        self.as_root(host, "umount", where)

    @staticmethod
    def entries(host: Host) -> list[str]:
        return sorted(name for name in host.root("ls", "/run/unionfs").stdout.split() if ".json" in name)
