"""Filesystems that are mounted below the base: parts of the branch, or read-only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.branches.branching import Branching, Tree, differing, tree
from tests.branches.test_interrupted import failing, killed_at, steps_of
from tests.branches.test_users import User, someone
from tests.mount.cli_calls import refused
from tests.mount.user_calls import UID
from tests.support import areas
from unionfs.branches import apply
from unionfs.branches.undo import undo
from unionfs.errors import UserError

__all__ = ["someone"]

FILL = """
mkdir -p d ren/deep gone; echo 1 > d/f; echo r > ren/deep/r; echo g > gone/g; touch -d 2001-01-01 d/f d
"""
FILL_PART = """
mkdir -p d/e gone ren/deep; for n in 1 2 3; do echo $n > d/f$n; done; echo g > gone/g; echo r > ren/deep/r
touch -d 2001-01-01 d/f1 d; ln d/f3 d/other
"""
SCRIPT = """
echo more >> d/f; mv ren d/ren; rm -r gone; echo x > x
cd m; echo more >> d/f1; rm d/f2; rm -r gone; mv ren d/moved; echo x >> d/moved/deep/r; chmod 0750 d/e
rm d/f3; mkdir d/f3; echo y > d/f3/y; mkdir new; echo n > new/n; chmod 0711 .
cd in; echo more >> d/f1; rm d/other; ln -s /etc/passwd l; mkfifo p; mv d/e e
"""


class Below:
    """A base with a filesystem at m, and another one in that, at m/in."""

    def __init__(self, branching: Branching, stack: ExitStack, kind: str) -> None:
        self.branching, self.stack = branching, stack
        self.base, self.places = branching.base, ["m", "m/in"]
        stack.callback(areas.detach, self.base)
        self.shell(FILL)
        self.home = self.mount(kind, "m")
        (self.base / "m/in").mkdir()
        self.mount("tmpfs", "m/in")
        for place in self.places:
            self.shell(FILL_PART, place)

    def shell(self, script: str, place: str = ".") -> None:
        subprocess.run(["sh", "-ec", script], cwd=self.base / place, check=True)

    def mount(self, kind: str, place: str) -> Path:
        """Mount a new filesystem there, and return where else it is mounted."""
        found = self.stack.enter_context(areas.filesystem(kind, 64 << 20))
        (self.base / place).mkdir(exist_ok=True)
        subprocess.run(["mount", "--bind", found, self.base / place], check=True)
        return found

    def tree(self) -> Tree:
        """The base with all below it, without what is kept for an undo. Link counts differ by that."""
        found = tree(self.base, links=False)
        return {path: entry for path, entry in found.items() if b"/.unionfs-" not in b"/" + path}

    def kept(self) -> list[str]:
        """The directories on the filesystems below for an undo."""
        return [str(path.relative_to(self.base)) for path in self.base.glob("**/.unionfs-*")]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as found:
        yield found


@pytest.fixture
def below(branching: Branching, stack: ExitStack) -> Below:
    return make(branching, stack, "tmpfs")


def make(branching: Branching, stack: ExitStack, kind: str) -> Below:
    try:
        return Below(branching, stack, kind)
    except areas.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("kind", areas.FILESYSTEMS)
def test_a_command_s_changes_are_committed_and_undone(
    branching: Branching, stack: ExitStack, kind: str, area: Path
) -> None:
    below = make(branching, stack, kind)
    # What it does without a branch, on a copy.
    assert os.system(f"cp -a {below.base} {area}/direct") == 0
    subprocess.run(["sh", "-ec", SCRIPT], cwd=area / "direct", check=True)
    old = below.tree()
    done = branching.tries(SCRIPT)
    assert f"{below.base}/m, {below.base}/m/in below the base are covered by the branch, too" in done.stderr
    assert differing(old, below.tree()) == {}
    lines = branching.says("branch", "diff", "br").splitlines()
    assert {
        "C m/  (mode 0755 -> 0711, times)", "D m/d/f2", "R m/ren -> m/d/moved/", "A m/in/p  (fifo)",
    } <= {*lines}  # fmt: skip
    content = branching.says("branch", "diff", "--content", "--only", "m/d/f1", "br")
    assert "--- a/m/d/f1\n+++ b/m/d/f1\n" in content
    # The next command goes on.
    assert branching.tries("cat m/d/f1 m/in/d/f1; ls m/d/f2 2>/dev/null || :").stdout == "1\nmore\n1\nmore\n"
    assert branching.says("branch", "commit", "br") == f"committed br to {below.base}\n"
    direct = tree(area / "direct", times=False, links=False)
    now = {path: (*entry[:6], 0, *entry[7:]) for path, entry in below.tree().items()}
    assert differing(direct, now) == {}
    assert branching.says("branch", "undo") == f"undid the commit of br to {below.base}\n"
    assert differing(old, below.tree()) == {}
    assert below.kept() == []
    assert "D m/d/f2" in branching.says("branch", "diff", "br").splitlines()
    branching.says("branch", "discard", "br")
    assert branching.stored() == []
    assert differing(old, below.tree()) == {}


def test_without_changes_nothing_is_left(below: Below) -> None:
    branching = below.branching
    assert branching.unionfs("try", "--", "cat", "m/d/f1", "m/in/d/f1").stdout == "1\n1\n"
    assert branching.stored() == []
    branching.tries("echo > x")
    assert not (branching.root / "branches/br/below").exists()
    branching.tries("echo > m/x")
    assert os.listdir(branching.root / "branches/br/below") == ["0"]
    refused(branching.unionfs("branch", "rm", "br"), "has changes")
    branching.tries("rm m/x")
    assert branching.says("branch", "diff", "br") == "A x\n"


def test_killed_at_every_step(below: Below) -> None:
    branching, old = below.branching, below.tree()
    branching.tries(SCRIPT)
    steps = steps_of(branching.commit)
    new = below.tree()
    assert len(below.kept()) == 2
    undo(branching.store)
    assert differing(old, below.tree()) == {}
    for index, step in enumerate(steps):
        killed_at(index, branching.commit)
        assert branching.commit().done, step
        assert differing(new, below.tree()) == {}, step
        assert [name[:8] for name in branching.stored()] == ["commits/"], step
        undo(branching.store)
        assert differing(old, below.tree()) == {}, step
        assert (branching.stored(), below.kept()) == (["branches/br"], []), step


def test_an_undo_killed_at_every_step(below: Below) -> None:
    branching, old = below.branching, below.tree()
    branching.tries(SCRIPT)
    branching.commit()
    steps = steps_of(lambda: undo(branching.store))
    for index, step in enumerate(steps):
        branching.commit()
        killed_at(index, lambda: undo(branching.store))
        assert undo(branching.store).branch == "br", step
        assert differing(old, below.tree()) == {}, step
        assert (branching.stored(), below.kept()) == (["branches/br"], []), step


def test_an_error_at_every_step_takes_all_back(below: Below) -> None:
    branching, old = below.branching, below.tree()
    branching.tries(SCRIPT)
    steps = steps_of(branching.commit)
    undo(branching.store)
    for index in range(steps.index("applied")):
        failing(index)
        with pytest.raises(UserError, match=r"nothing was changed|everything was put back"):
            branching.commit()
        apply.set_hook(None)
        assert differing(old, below.tree()) == {}, steps[index]
        assert (branching.stored(), below.kept()) == (["branches/br"], []), steps[index]
    assert branching.commit().conflicts == []


def test_a_full_filesystem_below_changes_nothing(branching: Branching, stack: ExitStack) -> None:
    below = make(branching, stack, "tmpfs")
    old = below.tree()
    branching.tries("echo > x; echo > m/in/y; head -c 100000000 /dev/zero | tr '\\0' x > m/big")
    done = branching.unionfs("branch", "commit", "br")
    refused(done, "no space left", "nothing was changed")
    assert differing(old, below.tree()) == {}
    assert (branching.stored(), below.kept()) == (["branches/br"], [])


def test_one_filesystem_after_the_other(below: Below) -> None:
    branching, old = below.branching, below.tree()
    branching.tries("echo > x; echo > m/x; echo > m/in/x")
    branching.says("branch", "commit", "--only", "m/in", "br")
    assert {*below.tree()} - {*old} == {b"m/in/x"}
    assert branching.says("branch", "diff", "br").splitlines() == ["A m/x", "A x"]
    branching.says("branch", "undo")
    assert differing(old, below.tree()) == {}
    branching.says("branch", "commit", "--except", below.base / "m", "br")
    assert {*below.tree()} - {*old} == {b"x"}
    branching.says("branch", "commit", "br")
    assert {*below.tree()} - {*old} == {b"x", b"m/x", b"m/in/x"}
    assert len(below.kept()) == 2


def test_the_next_commit_removes_what_undo_needs(below: Below) -> None:
    branching = below.branching
    for name in ("one", "two"):
        branching.tries(f"echo {name} > m/x")
        branching.commit()
        (kept,) = below.kept()
        assert kept.startswith("m/.unionfs-")
    branching.tries("echo three > x")
    branching.commit()
    assert below.kept() == []


def test_conflicts(below: Below) -> None:
    branching = below.branching
    script = "sed -i s/1/one/ m/d/f1; sed -i s/1/one/ m/in/d/f1; echo > x"
    branching.tries(script)
    (below.base / "m/in/d/f1").write_text("else\n")
    done = branching.unionfs("branch", "commit", "br")
    assert done.returncode == 3
    assert done.stdout == "conflict: m/in/d/f1 (changed below since)\n"
    (_, path), *_ = json.loads(branching.unionfs("branch", "commit", "--json", "br").stdout)["conflicts"]
    assert path == "m/in/d/f1"
    assert (below.base / "m/d/f1").read_text() == "1\n"
    branching.says("branch", "commit", "--theirs", "br")
    assert (below.base / "m/d/f1").read_text() == "one\n"
    assert (below.base / "m/in/d/f1").read_text() == "else\n"
    assert branching.says("branch", "diff", "br") == "C m/in/d/f1  (content)\n"


def test_a_conflict_keeps_the_branch_for_all(below: Below) -> None:
    """What another filesystem has got leaves the layer, too, with a renamed directory."""
    branching = below.branching
    (below.base / "d").mkdir(exist_ok=True)
    (below.base / "d/f").write_text("old\n")
    inside = sorted(path.name for path in (below.base / "m/ren").rglob("*"))
    assert inside
    branching.tries("mv m/ren m/moved; echo o > d/f")
    (below.base / "d/f").write_text("else\n")
    branching.says("branch", "commit", "--theirs", "br")
    assert branching.says("branch", "diff", "br") == "C d/f  (content)\n"
    (below.base / "m/moved/later").write_text("later\n")
    branching.says("branch", "commit", "--ours", "br")
    assert (below.base / "d/f").read_text() == "o\n"
    moved = below.base / "m/moved"
    assert sorted(path.name for path in moved.rglob("*")) == sorted([*inside, "later"])


def test_texts_are_merged(below: Below) -> None:
    path = below.base / "m/text"
    path.write_text("".join(f"{number}\n" for number in range(20)))
    below.branching.tries("sed -i s/^3$/three/ m/text")
    path.write_text(path.read_text().replace("17\n", "seventeen\n"))
    assert below.branching.says("branch", "commit", "--merge", "br").startswith("merged: m/text\n")
    assert "three\n" in path.read_text()
    assert "seventeen\n" in path.read_text()


def test_undo_refuses_what_was_changed_there(below: Below) -> None:
    below.branching.tries("echo > m/in/x; echo > y")
    below.branching.commit()
    (below.base / "m/in/x").write_text("later\n")
    refused(below.branching.unionfs("branch", "undo"), "was changed in")
    assert (below.base / "y").exists()


def test_a_filesystem_that_is_gone(below: Below) -> None:
    branching, old = below.branching, below.tree()
    branching.tries("echo > m/in/x; echo > y")
    subprocess.run(["umount", below.base / "m/in"], check=True)
    for words in (("diff", "br"), ("commit", "br"), ("rm", "br")):
        refused(branching.unionfs("branch", *words), f"{below.base}/m/in is not", "mount", "or discard")
    done = branching.unionfs("try", "-n", "br", "--", "touch", "m/in/y")
    assert done.returncode == 1
    assert f"{below.base}/m/in is not" in done.stderr
    assert not [path for path in branching.root.glob("branches/br/**/y") if path.parent.name == "in"]
    # Another one is not that one, nor is what is mounted there now covered.
    other = below.mount("tmpfs", "m/in")
    refused(branching.unionfs("branch", "commit", "br"), f"{below.base}/m/in is not")
    assert list(other.iterdir()) == []
    assert differing({}, {path: entry for path, entry in below.tree().items() if path not in old}) == {}
    branching.says("branch", "discard", "br")
    assert branching.stored() == []


def test_a_filesystem_that_is_gone_during_a_commit(below: Below) -> None:
    branching, old = below.branching, below.tree()
    branching.tries("echo > m/x; echo > y; echo > m/in/x")
    steps = steps_of(branching.commit)
    new = below.tree()
    undo(branching.store)
    killed_at(steps.index("applied"), branching.commit)
    place = below.base / "m/in"
    aside = branching.area / "aside"
    aside.mkdir()
    below.stack.callback(areas.detach, aside)
    subprocess.run(["mount", "--bind", place, aside], check=True)
    subprocess.run(["umount", place], check=True)
    refused(branching.unionfs("branch", "commit", "br"), f"{place} is not")
    refused(branching.unionfs("try", "-n", "br", "--", "true"), "interrupted")
    subprocess.run(["mount", "--bind", aside, place], check=True)
    assert branching.commit().done
    assert differing(new, below.tree()) == {}
    undo(branching.store)
    assert differing(old, below.tree()) == {}


def test_rw_and_hide(below: Below) -> None:
    branching = below.branching
    options = ("--rw", below.base / "m/in", "--hide", below.base / "m/d")
    done = branching.tries("ls m/d; echo for good > m/in/x; echo tried > m/x", "br", *options)
    assert done.stdout == ""
    assert (below.base / "m/in/x").read_text() == "for good\n"
    assert branching.says("branch", "diff", "br") == "A m/x\n"
    done = branching.tries("ls m; ! touch m/x 2>/dev/null", "other", "--hide", below.base / "m")
    assert done.stdout == ""
    assert "covered" not in done.stderr
    done = branching.tries("cat m/x 2>/dev/null || echo > m/y", "other", "--rw", below.base / "m")
    assert (below.base / "m/y").exists()


def test_what_stays_read_only(below: Below, branching: Branching, stack: ExitStack) -> None:
    base = below.base
    below.mount("tmpfs", "ro")
    (base / "ro/kept").write_text("kept\n")
    subprocess.run(["mount", "-o", "remount,bind,ro", base / "ro"], check=True)
    (base / "same").mkdir()
    subprocess.run(["mount", "--bind", base / "m/d", base / "same"], check=True)
    (base / "file").touch()
    subprocess.run(["mount", "--bind", base / "m/d/f1", base / "file"], check=True)
    (base / "pseudo").mkdir()
    subprocess.run(["mount", "-t", "proc", "proc", base / "pseudo"], check=True)
    (base / "exec").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec", "tmpfs", base / "exec"], check=True)
    shutil.copy("/bin/true", base / "exec/true")
    script = """
    for path in ro same pseudo; do ! touch $path/x 2>/dev/null; done; ! echo x 2>/dev/null > file
    cat ro/kept file; ! exec/true 2>/dev/null; echo > exec/x
    """
    done = branching.tries(script)
    assert done.stdout == "kept\n1\n"
    for sentence in (
        f"{base}/exec, {base}/m, {base}/m/in below the base are covered by the branch, too",
        f"{base}/ro below the base is read-only here: it is mounted read-only",
        f"{base}/same below the base is read-only here: it is the filesystem that {base}/m shows",
        f"{base}/file below the base is read-only here: a file is mounted there",
        f"{base}/pseudo below the base is read-only here: a branch cannot cover proc",
    ):
        assert sentence in done.stderr
    assert branching.says("branch", "diff", "br") == "A exec/x\n"


def test_hostile_symlinks(below: Below, area: Path) -> None:
    """What a command has put where a mount belongs, and what others have put where a commit goes."""
    branching = below.branching
    outside = area / "outside"
    outside.mkdir()
    branching.tries("mkdir m/deep; mv m/d m/deep; echo > m/deep/d/new")
    (below.base / "m/deep").symlink_to(outside)
    assert branching.unionfs("branch", "commit", "br").returncode == 3
    assert list(outside.iterdir()) == []
    (below.base / "m/deep").unlink()
    branching.says("branch", "discard", "br")
    branching.tries("mkdir m/d/x; echo > m/d/x/y; echo > m/d/e/z")
    (below.base / "m/d/e").rmdir()
    (below.base / "m/d/e").symlink_to(outside)
    for words in ((), ("--ours",)):
        assert branching.unionfs("branch", "commit", *words, "br").returncode != 0 or words
        assert list(outside.iterdir()) == []
    below.shell("rm -rf m/d/e; mkdir m/d/mnt")
    below.mount("tmpfs", "m/d/mnt")
    branching.tries(f"mv m/d m/former; ln -s {outside} m/d", "hostile")
    done = branching.unionfs("try", "-n", "hostile", "--", "true")
    assert done.returncode == 1
    assert "m/d/mnt is a mountpoint for the command, but the branch has something else there" in done.stderr
    done = branching.unionfs("branch", "commit", "hostile")
    refused(done, "m/d of the base cannot be replaced or removed")
    assert list(outside.iterdir()) == []


def test_the_working_directory_and_the_program_are_there(below: Below) -> None:
    branching, place = below.branching, below.base / "m/in/d"
    assert branching.unionfs("try", "--", "pwd", cwd=below.base).stdout == f"{below.base}\n"
    script = "pwd; printf '#!/bin/sh\necho made\n' > made; chmod +x made"
    done = branching.tries(script, "br", "-D", below.base, cwd=place)
    assert done.stdout == f"{place}\n"
    assert branching.unionfs("try", "-n", "br", "--", "./made", cwd=place).stdout == "made\n"
    assert branching.unionfs("try", "-n", "br", "--", "./f1", cwd=place).returncode == 126


def test_nested_branches_cover_one_filesystem(below: Below) -> None:
    branching = below.branching
    branching.tries("echo > m/x", "one")
    done = branching.unionfs("try", "-n", "two", "--from", "one", "--", "true")
    refused(done, f"branch one changes {below.base}/m, too")
    branching.tries("rm m/x; echo > x", "one")
    done = branching.tries("cat m/d/f1; ! touch m/x 2>/dev/null; echo > y", "two", "--from", "one")
    assert done.stdout == "1\n"
    assert "a branch over another branch covers one filesystem only" in done.stderr
    branching.says("branch", "commit", "two")
    branching.says("branch", "commit", "one")
    assert (below.base / "y").exists()


def test_the_store_is_on_one_of_them(below: Below, branching: Branching) -> None:
    """Its files are exchanged with those of the branch, and nothing is kept on it."""
    branching.root = below.base / "m/store"
    branching.store = type(branching.store)(str(branching.root))
    old = tree(below.base / "m/in")
    done = branching.tries("ls m/store; echo more >> m/d/f1; echo > m/store/lost; echo > m/in/x; echo > x")
    assert done.stdout == ""
    assert branching.says("branch", "diff", "br").splitlines() == ["C m/d/f1  (content)", "A m/in/x", "A x"]
    inode = os.stat(branching.root / "branches/br/below/0/upper/d/f1").st_ino
    branching.says("branch", "commit", "br")
    assert (below.base / "m/d/f1").stat().st_ino == inode
    assert sorted(path.partition(".unionfs")[0] for path in below.kept()) == ["", "m/in/"]
    branching.says("branch", "undo")
    assert differing(old, tree(below.base / "m/in")) == {}
    assert (below.base / "m/d/f1").read_text() == "1\n"
    branching.says("branch", "discard", "br")
    assert branching.unionfs("try", "--", "true").returncode == 0
    assert branching.stored() == []


def test_an_ordinary_user(someone: User) -> None:
    place = someone.base / "m"
    place.mkdir()
    options = f"uid={UID},gid={UID},size=64m,mode=755"
    someone.host.root("mount", "-t", "tmpfs", "-o", options, "tmpfs", place)
    found = Path(f"/proc/{someone.host.holder.pid}/root{place}")
    someone.shell(f"cd m; {FILL_PART}")
    old = tree(found)
    script = "cd m; echo more >> d/f1; rm d/f2; mv ren d/moved; chmod 0700 d/e; cd ..; echo > x"
    done = someone.unionfs("try", "--keep", "-n", "br", "--", "sh", "-ec", script)
    assert f"{place} below the base is covered by the branch, too" in done.stderr
    assert differing(old, tree(found)) == {}
    lines = someone.unionfs("branch", "diff", "br").stdout.splitlines()
    assert {"D m/d/f2", "R m/ren -> m/d/moved/", "C m/d/e/  (mode 0755 -> 0700)", "A x"} <= {*lines}
    someone.unionfs("branch", "commit", "br")
    assert (found / "d/f1").read_text() == "1\nmore\n"
    assert (found / "d/moved/deep/r").exists()
    someone.unionfs("branch", "undo")
    assert differing(old, tree(found)) == {}
    # In a directory of the user's on a filesystem of root's.
    os.chown(found, 0, 0)
    times = os.stat(found / "d").st_mtime_ns
    someone.unionfs("try", "--keep", "-n", "own", "--", "sh", "-ec", "cd m/d; echo > e/x; mv f1 f4")
    someone.unionfs("branch", "commit", "own")
    assert [path.name[:9] for path in (found / "d").iterdir() if path.name.startswith(".")] == [".unionfs-"]
    someone.unionfs("branch", "undo")
    assert os.stat(found / "d").st_mtime_ns == times
    assert sorted(os.listdir(found / "d")) == ["e", "f1", "f2", "f3", "other"]
    assert "R m/d/f1 -> m/d/f4" in someone.unionfs("branch", "diff", "own").stdout.splitlines()
