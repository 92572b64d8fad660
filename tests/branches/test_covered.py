"""What a branch does not cover: the store in the base, and what is mounted there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.branches.branching import Branching, differing, tree
from tests.branches.test_users import User, someone
from tests.mount.cli_calls import refused
from unionfs.branches.surroundings import Surroundings
from unionfs.errors import UserError
from unionfs.sys.fds import Owned

__all__ = ["someone"]


@pytest.fixture
def around(branching: Branching) -> Branching:
    """The base holds the store."""
    branching.root = branching.base / "deep/storage"
    branching.root.parent.mkdir()
    os.utime(branching.root.parent, (1, 1))
    (branching.base / "a").write_text("a\n")
    os.utime(branching.base, (2, 2))
    branching.store = type(branching.store)(str(branching.root))
    return branching


def test_the_store_in_the_base_is_hidden(around: Branching) -> None:
    done = around.tries("ls deep/storage; cat a; echo more >> a; echo > deep/new; echo > deep/storage/lost")
    times = [os.stat(path).st_mtime for path in (around.base, around.root.parent)]
    assert done.stdout == "a\n"
    assert around.says("branch", "diff", "br").splitlines() == ["C a  (content)", "A deep/new"]
    refused(around.unionfs("branch", "create", "--base", around.root, "other"), "is in the storage root")
    around.says("branch", "commit", "br")
    assert (around.base / "a").read_text() == "a\nmore\n"
    assert sorted(os.listdir(around.root)) == ["branches", "commits"]
    around.says("branch", "undo")
    assert [os.stat(path).st_mtime for path in (around.base, around.root.parent)] == times
    around.says("branch", "discard", "br")
    assert around.unionfs("try", "--", "cat", "a").stdout == "a\n"
    assert around.stored() == []


def test_the_store_in_the_base_is_not_taken_away(around: Branching) -> None:
    place = Path(around.says("branch", "create", "--base", around.base, "br").strip())
    (place / "deep").rename(place / "other")
    refused(around.unionfs("branch", "commit", "br"), "cannot be replaced or removed", "is the storage root")
    assert (around.base / "deep/storage/branches").is_dir()


def test_the_store_in_the_base_of_a_nested_branch(around: Branching) -> None:
    around.tries("echo 1 > one", "first")
    around.tries("ls deep/storage; mv one two; rm a", "second", "--from", "first")
    assert around.says("branch", "diff", "second").splitlines() == ["D a", "R one -> two"]
    around.says("branch", "commit", "second")
    around.says("branch", "commit", "first")
    assert sorted(os.listdir(around.base)) == ["deep", "two"]


def test_an_ordinary_user_s_home(someone: User) -> None:
    """The store is in the home, where it is by default, and the home is the base."""
    root = someone.base / ".local/share/unionfs"
    someone.shell("mkdir -p .local/share")
    someone.root = root
    script = "echo more >> d/f1; ls -A .local/share/*"
    done = someone.unionfs("try", "--keep", "-n", "br", "--", "sh", "-ec", script)
    assert done.stdout == ""
    assert someone.unionfs("branch", "diff", "br").stdout.splitlines() == ["C d/f1  (content)"]
    before = tree(someone.base / "gone")
    someone.unionfs("branch", "commit", "br")
    assert (someone.base / "d/f1").read_text() == "1\nmore\n"
    assert differing(before, tree(someone.base / "gone")) == {}
    someone.unionfs("branch", "undo")
    assert (someone.base / "d/f1").read_text() == "1\n"


def test_an_ordinary_user_tries_the_whole_system(someone: User) -> None:
    hosts = Path("/etc/hosts").read_bytes()
    script = "id -u; ! touch /proc/x /sys/x 2>/dev/null; touch /tmp/x; pwd; stat -c %u /etc /etc/hosts"
    done = someone.unionfs("try", "-n", "sys", "-D", "/", "--", "sh", "-ec", script)
    assert done.stdout.split() == ["0", "/", "0", "0"]
    assert someone.unionfs("branch", "ls").stdout == ""
    script = "install -D -o root -m 0750 /bin/true /usr/local/lib/x/true; rm -r /etc/apt; echo >> /etc/hosts"
    done = someone.unionfs("try", "--keep", "-n", "sys", "-D", "/", "--", "sh", "-ec", script)
    lines = someone.unionfs("branch", "diff", "sys").stdout.splitlines()
    assert {"A usr/local/lib/x/", "A usr/local/lib/x/true  (mode 0750)", "D etc/apt/"} <= {*lines}, lines
    done = someone.host.run(
        "env", f"UNIONFS_ROOT={someone.root}", *someone.host.command, "branch", "commit", "sys"
    )
    assert done.returncode == 1
    assert "everything was put back" in done.stderr or "nothing was changed" in done.stderr
    assert Path("/etc/hosts").read_bytes() == hosts
    assert Path("/etc/apt").is_dir()
    assert not Path("/usr/local/lib/x").exists()


def test_a_symlink_where_the_command_s_own_trees_belong(area: Path) -> None:
    """A former command may have put it there; bubblewrap would make directories where it leads."""
    for name in ("proc", "sys", "dev", "run"):
        (area / "tree" / name).mkdir(parents=True)
    (area / "tree/tmp").symlink_to("/etc")
    around = Surroundings("/", str(area / "storage"), (), ())
    with Owned(os.open(area / "tree", os.O_PATH)) as root, pytest.raises(UserError, match="/tmp is a mount"):
        around.check({"/": root} | {one.path: root for one in around.covered})


def test_a_mountpoint_is_not_taken_away(branching: Branching, filesystem: Callable[..., Path]) -> None:
    (branching.base / "d/mnt").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", branching.base / "d/mnt"], check=True)
    try:
        (branching.base / "d/mnt/kept").write_text("kept\n")
        done = branching.tries("ls d/mnt; echo x > d/x; mv d e")
        assert done.stdout == "kept\n"
        refused(branching.unionfs("branch", "commit", "br"), "is mounted there")
        assert (branching.base / "d/mnt/kept").read_text() == "kept\n"
    finally:
        subprocess.run(["umount", branching.base / "d/mnt"], check=True)
