"""`branch undo` undoes the last commit of the storage root, once, and never an earlier one instead."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.branches.branching import Branching, killed_before
from tests.branches.test_interrupted import killed_at, steps_of
from unionfs.branches.undo import undo
from unionfs.errors import UserError


@pytest.fixture
def other(branching: Branching) -> Path:
    """A second base, with a commit to the first one."""
    path = branching.area / "other"
    path.mkdir()
    for base in (branching.base, path):
        (base / "a").write_text("1\n")
    branching.tries("echo 2 > a", "first")
    branching.commit("first")
    return path


def test_only_once(branching: Branching, other: Path) -> None:
    branching.tries("echo 2 > a", "second", "-D", other)
    branching.commit("second")
    assert undo(branching.store).branch == "second"
    with pytest.raises(UserError, match=r"the last commit, of branch second to .*/other, was undone already"):
        undo(branching.store)
    assert [(base / "a").read_text() for base in (branching.base, other)] == ["2\n", "1\n"]
    branching.commit("second")
    assert undo(branching.store).branch == "second"


def test_not_an_earlier_one_after_a_kill(branching: Branching, other: Path) -> None:
    """Whether or not the killed undo had ended, the next one reverts nothing else."""
    branching.tries("echo 2 > a", "second", "-D", other)
    branching.commit("second")
    steps = steps_of(lambda: undo(branching.store))
    for index, step in enumerate(steps):
        branching.commit("second")
        killed_at(index, lambda: undo(branching.store))
        with suppress(UserError):
            assert undo(branching.store).branch == "second", step
        with pytest.raises(UserError, match="was undone already"):
            undo(branching.store)
        assert [(base / "a").read_text() for base in (branching.base, other)] == ["2\n", "1\n"], step


def test_not_one_before_a_commit_that_cannot_be_undone(
    branching: Branching, other: Path, filesystem: Callable[..., Path]
) -> None:
    base = filesystem("tmpfs", 16 << 20) / "base"
    base.mkdir()
    branching.tries("echo 2 > a", "third", "-D", base)
    done = branching.unionfs("branch", "commit", "third")
    assert done.stdout == (
        f"committed third to {base}; it cannot be undone: the store is on another filesystem\n"
    )
    for _ in range(2):
        with pytest.raises(UserError, match=r"branch third to .* cannot be undone, since"):
            undo(branching.store)
    assert (branching.base / "a").read_text() == "2\n"


def test_one_that_went_on_after_a_later_one(branching: Branching, other: Path) -> None:
    """The last is the one that ended last, though it began before."""
    branching.tries("echo 3 > a", "second", "-D", other)
    branching.tries("echo x > x", "third")
    killed_before("applied", lambda: branching.commit("second"))
    other.rename(branching.area / "away")
    branching.commit("third")
    (branching.area / "away").rename(other)
    assert branching.commit("second").went_on
    assert undo(branching.store).branch == "second"
    assert (other / "a").read_text() == "1\n"
    with pytest.raises(UserError, match=r"of branch second to .* was undone already"):
        undo(branching.store)
    assert (branching.base / "x").exists()
    assert branching.stored() == ["branches/second"]


def test_a_directory_that_others_have_changed_since(branching: Branching, other: Path) -> None:
    """The commit has set its times, and an undo would set its mode, too."""
    (other / "d").mkdir()
    branching.tries("touch d/x; rm d/x; echo 2 > a; touch -d 2001-01-01 d", "second", "-D", other)
    branching.commit("second")
    (other / "d").chmod(0o700)
    with pytest.raises(UserError, match="d was changed in"):
        undo(branching.store)
    (other / "d").chmod(0o755)
    undo(branching.store)


def test_branches_are_discarded_with_those_over_them(branching: Branching) -> None:
    for name, parent in (("d1", []), ("d2", ["--from", "d1"]), ("d3", ["--from", "d2"])):
        branching.tries("echo >> x", name, *parent)
    assert branching.says("branch", "discard", "d1", "d3", "d2") == "d3\nd2\nd1\n"
    assert branching.stored() == []


def test_names_are_quoted(branching: Branching) -> None:
    base = branching.area / "odd\n\x1b[1mname"
    base.mkdir()
    branching.tries("echo > a", "br", "-D", base)
    for words in (["commit", "br"], ["undo"]):
        out = branching.says("branch", *words)
        assert out.count("\n") == 1, out
        assert repr(str(base)) in out, out


class TestOtherNames:
    """A branch is known by when it was made: it may have another name now, and another one its name."""

    def test_of_a_part_to_a_parent(self, branching: Branching) -> None:
        branching.tries("echo 1 > one", "parent")
        branching.tries("echo 2 > two; echo 3 > three", "child", "--from", "parent")
        branching.commit("child", only=["two"])
        branching.says("branch", "rename", "child", "renamed")
        undo(branching.store)
        assert branching.says("branch", "diff", "renamed").splitlines() == ["A three", "A two"]
        assert branching.says("branch", "diff", "parent") == "A one\n"

    def test_over_the_parent(self, branching: Branching) -> None:
        branching.tries("echo 1 > one", "parent")
        for content in ("two", "three"):
            branching.tries(f"echo > {content}", "fix", "--from", "parent")
            if content == "two":
                branching.commit("fix")
        with pytest.raises(UserError, match=r"cannot be changed by a commit of fix, since others lie over"):
            undo(branching.store)

    def test_of_a_killed_undo(self, branching: Branching) -> None:
        branching.tries("echo 2 > a; echo 2 > b", "br")
        branching.commit("br", only=["a"])
        branching.says("branch", "rename", "br", "renamed")
        killed_before("given back", lambda: undo(branching.store))
        branch = branching.store.branch("renamed")
        with pytest.raises(UserError, match="was interrupted"), branch.claimed("mounted"):
            pass
        undo(branching.store)
        assert branching.says("branch", "diff", "renamed").splitlines()[0] == "A a"


def test_a_killed_one_whose_base_is_gone(branching: Branching, other: Path) -> None:
    branching.tries("echo 2 > a", "second", "-D", other)
    branching.commit("second")
    killed_before("given back", lambda: undo(branching.store))
    other.rename(branching.area / "away")
    with pytest.raises(UserError, match=str(other)):
        undo(branching.store)
    (branching.area / "away").rename(other)
    assert undo(branching.store).branch == "second"
    assert (other / "a").read_text() == "1\n"
