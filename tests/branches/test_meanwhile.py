"""What others do while a commit goes on, or between a kill and the next command."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from tests.branches.branching import Branching, killed_before
from unionfs.branches import apply
from unionfs.branches.undo import undo
from unionfs.errors import UserError


@pytest.fixture
def two(branching: Branching) -> Branching:
    """A branch that changes the files `a` and `c`."""
    for name in ("a", "c"):
        (branching.base / name).write_text("old\n")
    branching.tries("echo branch > a; echo branch > c")
    return branching


def texts(base: Path) -> list[str]:
    return [(base / name).read_text() for name in ("a", "c")]


def test_a_change_while_it_is_committed_is_a_conflict_afterwards(two: Branching) -> None:
    def hook(step: str) -> None:
        if step == "move /c":
            (two.base / "c").write_text("others\n")

    apply.set_hook(hook)
    with pytest.raises(UserError, match="everything was put back"):
        two.commit()
    apply.set_hook(None)
    assert [(item, path) for item, path in two.commit().conflicts] == [("changed", b"/c")]
    assert texts(two.base) == ["old\n", "others\n"]


def test_a_file_that_is_replaced_after_a_kill_stays(two: Branching) -> None:
    killed_before("move /c", two.commit)
    assert texts(two.base) == ["branch\n", "old\n"]
    (two.area / "new").write_text("others\n")
    (two.area / "new").rename(two.base / "a")
    assert two.commit().went_on
    assert texts(two.base) == ["others\n", "branch\n"]
    with pytest.raises(UserError, match=r"cannot be undone: a was changed"):
        undo(two.store)


def test_what_an_open_file_wrote_after_the_commit_is_a_conflict_after_undo(two: Branching) -> None:
    with (two.base / "a").open("a") as file:
        two.commit()
        file.write("late\n")
    undo(two.store)
    assert texts(two.base) == ["old\nlate\n", "old\n"]
    assert two.commit().conflicts == [("changed", b"/a")]


def test_a_file_to_which_a_process_still_writes_is_copied(two: Branching) -> None:
    layer = two.root / "branches" / "br" / "upper"
    with (layer / "a").open("r+") as file:
        two.commit()
        file.write("CHANGE")
        file.flush()
        assert texts(two.base) == ["branch\n", "branch\n"]


def test_a_branch_is_not_used_until_its_commit_has_ended(two: Branching) -> None:
    killed_before("ending", two.commit)
    for words in (["try", "-n", "br", "--", "true"], ["branch", "mount", "br"]):
        done = two.unionfs(*words)
        assert done.returncode == 1
        assert "`unionfs branch commit br` goes on" in str(done.stderr)
    assert two.commit().went_on
    assert texts(two.base) == ["branch\n", "branch\n"]


@pytest.mark.parametrize("step", ["applied", "let go", "ending", "branch moved", "ended"])
def test_a_full_disk_at_the_end_says_what_was_done(two: Branching, step: str) -> None:
    def hook(seen: str) -> None:
        if seen == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    apply.set_hook(hook)
    with pytest.raises(UserError, match="all changes of branch br are in place"):
        two.commit()
    apply.set_hook(None)
    assert texts(two.base) == ["branch\n", "branch\n"]
    again = two.commit()
    assert (again.went_on, again.before > 0) == (step != "ended", step == "ended")


def test_an_interrupt_waits_for_the_end(two: Branching) -> None:
    def hook(step: str) -> None:
        if step == "move /c":
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    # A shell that starts the tests with & lets them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    apply.set_hook(hook)
    try:
        with pytest.raises(KeyboardInterrupt):
            two.commit()
    finally:
        apply.set_hook(None)
        signal.signal(signal.SIGINT, before)
    assert texts(two.base) == ["branch\n", "branch\n"]
    assert [name[:8] for name in two.stored()] == ["commits/"]


def test_theirs_in_a_directory_is_still_a_conflict(branching: Branching) -> None:
    (branching.base / "d").mkdir()
    (branching.base / "d" / "f").write_text("old\n")
    branching.tries("echo branch > d/f; echo n > d/new")
    (branching.base / "d" / "f").write_text("others\n")
    assert branching.commit(conflicts="theirs").skipped == [b"/d/f"]
    assert branching.commit().conflicts == [("changed", b"/d/f")]
    assert (branching.base / "d" / "f").read_text() == "others\n"


def test_a_killed_undo_does_not_undo_another_commit(two: Branching) -> None:
    other = two.area / "other"
    other.mkdir()
    two.commit()
    two.tries("echo x > x", "second", "-D", other)
    two.commit("second")
    killed_before("emptied", lambda: undo(two.store))
    assert undo(two.store).branch == "second"
    assert os.listdir(other) == []
    assert texts(two.base) == ["branch\n", "branch\n"]


def test_acls_of_the_store_stay_there(branching: Branching) -> None:
    branching.root.mkdir(mode=0o700)
    subprocess.run(["setfacl", "-d", "-m", "u:65534:rwx", branching.root], check=True)
    (branching.base / "d").mkdir()
    branching.tries("echo > new; mkdir e; echo > e/y; chmod 0700 d")
    branching.commit()
    for path in [branching.base, *branching.base.rglob("*")]:
        assert [name for name in os.listxattr(path) if "acl" in name] == [], path
