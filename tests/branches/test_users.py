"""Branches of an ordinary user: in a user namespace, with markers in `user.*` xattrs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.branches.branching import differing, tree
from tests.mount.cli_calls import Done, place, wait_for
from tests.mount.user_calls import UID, Host, ordinary_user

FILL = """
mkdir -p d/ro gone/deep; echo 1 > d/f1; echo 2 > d/f2; echo 3 > d/ro/f; echo 4 > gone/deep/g; ln d/f1 d/other
printf secret > d/none; chmod 0200 d/none; chmod 0555 d/ro
"""
SCRIPT = """
echo more >> d/f1; rm d/f2; rm -r gone; mkdir -p new/ro; echo n > new/ro/n; chmod 0555 new/ro; chmod u+w d/ro
echo in > d/ro/in; chmod 0500 d/ro; mkdir moved; mv d/f1 moved; ln -s x l; setfattr -n user.x -v 1 moved
chmod 0700 d
"""


class User:
    """An ordinary user with a base and a store."""

    def __init__(self, host: Host, area: Path) -> None:
        self.host = host
        self.base, self.root = area / "base", area / "storage"
        self.base.mkdir()
        self.root.mkdir(0o700)
        for path in (area, self.base, self.root):
            os.chown(path, UID, UID)
        self.shell(FILL)

    def shell(self, script: str) -> None:
        done = self.host.run("sh", "-ec", script, cwd=self.base)
        assert done.returncode == 0, done

    def unionfs(self, *words: str | Path) -> Done:
        """A command of the user's, which must succeed."""
        done = self.host.run("env", f"UNIONFS_ROOT={self.root}", *self.host.command, *words, cwd=self.base)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done


@pytest.fixture
def someone(root: None, area: Path) -> Iterator[User]:
    with place(area) as found, ordinary_user(found) as host:
        yield User(host, area)


def test_try_commit_and_undo(someone: User, area: Path) -> None:
    before = tree(someone.base)
    script = f"id -u; touch /etc/x || :; {SCRIPT}"
    done = someone.unionfs("try", "--keep", "-n", "br", "--", "sh", "-ec", script)
    assert done.stdout == f"{UID}\n"
    assert "Permission denied" in done.stderr or "Read-only" in done.stderr
    assert differing(before, tree(someone.base)) == {}
    (values,) = json.loads(someone.unionfs("branch", "ls", "--json").stdout)
    assert (values["uid"], values["exit_code"]) == (UID, 0)
    # Directly, on a copy.
    assert os.system(f"cp -a {someone.base} {area}/direct") == 0
    assert someone.host.run("sh", "-ec", SCRIPT, cwd=area / "direct").returncode == 0
    someone.unionfs("branch", "commit", "br")
    direct, now = tree(area / "direct", times=False), tree(someone.base, times=False)
    assert differing(direct, now) == {}
    someone.unionfs("branch", "undo")
    assert differing(before, tree(someone.base)) == {}
    someone.unionfs("branch", "diff", "--content", "br")
    someone.unionfs("branch", "discard", "br")


def test_a_branch_of_a_branch(someone: User) -> None:
    someone.unionfs("try", "--keep", "-n", "one", "--", "sh", "-ec", "rm -r gone; echo 1 > one")
    someone.unionfs("try", "--keep", "-n", "two", "--from", "one", "--", "sh", "-ec", "cat one; mv one two")
    someone.unionfs("branch", "commit", "two")
    someone.unionfs("branch", "commit", "one")
    assert not (someone.base / "gone").exists()
    assert (someone.base / "two").read_text() == "1\n"
    assert not (someone.base / "one").exists()


def test_files_of_others_are_named(someone: User) -> None:
    """What a user may replace though it is another's: a file in a directory of the user's."""
    (someone.base / "d/roots").write_text("root\n")
    someone.unionfs("try", "--keep", "-n", "br", "--", "rm", "-f", "d/roots")
    assert "d/roots belongs to uid 0, not to you" in someone.unionfs("branch", "commit", "br").stderr


def test_the_daemon_of_a_mounted_branch_is_killed(someone: User) -> None:
    """Its layer can be read: the diff needs no mount."""
    someone.unionfs("try", "-q", "--keep", "-n", "br", "--", "sh", "-ec", "echo new > n")
    # Nobody has opened its root, so the kernel would ask the daemon.
    merged = someone.unionfs("branch", "mount", "br").stdout.strip()
    (mount,) = json.loads(someone.unionfs("ls", "--json").stdout)
    os.kill(mount["pid"], signal.SIGKILL)
    assert wait_for(lambda: someone.host.run("ls", merged).returncode != 0)
    assert someone.unionfs("branch", "diff", "br").stdout == "A n\n"
    someone.unionfs("branch", "commit", "br")
    assert (someone.base / "n").read_text() == "new\n"
