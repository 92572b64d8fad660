"""What the base has changed meanwhile is not overwritten in silence; hostile bases reach nothing."""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path

import pytest

from tests.branches.branching import Branching, differing, tree
from unionfs.branches import apply
from unionfs.branches.commit import OURS
from unionfs.branches.undo import undo
from unionfs.errors import UserError, quoted

FILL = """
mkdir -p d/sub keep; for n in 1 2 3 4 5 6; do echo $n > d/f$n; done
echo s > d/sub/s; echo k > keep/k; ln -s f1 d/l
"""


@pytest.fixture
def filled(branching: Branching) -> Branching:
    assert os.system(f"cd {branching.base} && sh -ec '{FILL}'") == 0
    return branching


CHANGES = {
    "content": ("echo branch >> d/f1", lambda base: (base / "d/f1").write_text("b\n"), "changed", b"/d/f1"),
    "mode": ("echo branch >> d/f1", lambda base: (base / "d/f1").chmod(0o600), "changed", b"/d/f1"),
    "removed": ("echo branch >> d/f2", lambda base: (base / "d/f2").unlink(), "removed", b"/d/f2"),
    "added": ("echo branch > d/new", lambda base: (base / "d/new").write_text("base\n"), None, b"/d/new"),
    "removed-changed": ("rm d/f3", lambda base: (base / "d/f3").write_text("b\n"), "changed", b"/d/f3"),
    "removed-added": ("rm -r d", lambda base: (base / "d/sub/new").write_text("b"), "added", b"/d/sub/new"),
    "replaced": ("rm -r d; mkdir d", lambda base: (base / "d/f4").write_text("b"), "changed", b"/d/f4"),
    "another-file": ("echo branch >> d/f5", lambda base: (base / "keep/k").rename(base / "d/f5"), "changed",
                     b"/d/f5"),
    "directory": ("chmod 0700 d", lambda base: (base / "d").chmod(0o711), "changed", b"/d"),
    "to-symlink": ("echo x > d/sub/t", lambda base: _to_symlink(base / "d/sub", base / "keep"), None,
                   b"/d/sub"),
}  # fmt: skip


def _to_symlink(path: Path, target: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(target)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before a commit", "after a look"])
def test_all_conflicts_are_found(filled: Branching, area: Path, when: str) -> None:
    check_conflicts(filled, area, when, [*CHANGES])


def test_conflicts_are_found(filled: Branching, area: Path) -> None:
    check_conflicts(filled, area, "before a commit", ["content", "removed", "removed-added"])


def check_conflicts(filled: Branching, area: Path, when: str, names: list[str]) -> None:
    """With the first commit, or when the branch was looked at before."""
    shutil.copytree(filled.base, area / "copy", symlinks=True)
    for name in names:
        script, change, what, path = CHANGES[name]
        filled.tries(script, "br")
        if when == "after a look":
            assert filled.commit(dry_run=True).conflicts == [], name
        change(filled.base)
        before = tree(filled.base)
        result = filled.commit()
        assert not result.done, name
        assert path in [found for _, found in result.conflicts], (name, result.conflicts)
        if what is not None:
            assert (what, path) in result.conflicts, (name, result.conflicts)
        assert differing(before, tree(filled.base)) == {}, name
        done = filled.unionfs("branch", "commit", "br")
        assert done.returncode == 3, done
        assert f"conflict: {os.fsdecode(path[1:])} (" in done.stdout
        filled.says("branch", "discard", "br")
        # As before, in the same directory.
        for child in filled.base.iterdir():
            child.unlink() if child.is_symlink() or child.is_file() else shutil.rmtree(child)
        shutil.copytree(area / "copy", filled.base, symlinks=True, dirs_exist_ok=True)


def test_no_conflict_where_the_base_changed_something_else(filled: Branching) -> None:
    filled.tries("echo branch >> d/f1; rm d/f2; echo n > d/n")
    (filled.base / "d/f6").write_text("base\n")
    (filled.base / "d/other").write_text("base\n")
    assert filled.commit().done
    assert (filled.base / "d/f1").read_text() == "1\nbranch\n"
    assert (filled.base / "d/f6").read_text() == (filled.base / "d/other").read_text() == "base\n"


def test_a_change_between_two_tries_of_what_only_the_second_touches(filled: Branching) -> None:
    filled.tries("echo one >> d/f1")
    (filled.base / "d/f2").write_text("base\n")
    filled.tries("echo two >> d/f2")
    assert filled.commit().conflicts == []
    assert (filled.base / "d/f2").read_text() == "base\ntwo\n"


def test_a_change_between_two_tries_of_what_the_first_touched(filled: Branching) -> None:
    filled.tries("echo one >> d/f1")
    (filled.base / "d/f1").write_text("base\n")
    filled.tries("echo two >> d/f2")
    assert filled.commit().conflicts == [("changed", b"/d/f1")]


def test_ours_and_theirs(filled: Branching) -> None:
    filled.tries("echo branch >> d/f1; echo branch >> d/f2; echo new > new")
    (filled.base / "d/f1").write_text("base\n")
    old = tree(filled.base)
    result = filled.commit(conflicts="theirs")
    assert (result.done, result.skipped) == (True, [b"/d/f1"])
    assert (filled.base / "d/f1").read_text() == "base\n"
    assert (filled.base / "d/f2").read_text() == "2\nbranch\n"
    # The branch stays with what was kept.
    assert filled.stored()[0] == "branches/br"
    assert filled.says("branch", "diff", "br").splitlines() == ["C d/f1  (content)"]
    undo(filled.store)
    assert differing(old, tree(filled.base)) == {}
    result = filled.commit(conflicts="ours")
    assert result.done
    assert (filled.base / "d/f1").read_text() == "1\nbranch\n"


def test_merged_texts(filled: Branching) -> None:
    """What git merge-file can merge is merged; the rest stays a conflict."""
    lines = [f"{number}\n" for number in range(20)]
    for name in ("d/f1", "d/f2", "d/f3"):
        (filled.base / name).write_text("".join(lines))
    filled.tries("sed -i 's/^3$/three/' d/f1 d/f2; chmod 0640 d/f1")
    (filled.base / "d/f1").write_text("".join([*lines[:15], "fifteen\n", *lines[16:]]))
    (filled.base / "d/f2").write_text("".join([*lines[:3], "drei\n", *lines[4:]]))
    before = tree(filled.base)
    result = filled.commit(conflicts="merge")
    assert (result.done, result.merged, result.conflicts) == (False, [b"/d/f1"], [("changed", b"/d/f2")])
    assert differing(before, tree(filled.base)) == {}
    assert filled.commit(conflicts="merge", leave=["f2"]).merged == [b"/d/f1"]
    text = (filled.base / "d/f1").read_text()
    assert text == "".join([*lines[:3], "three\n", *lines[4:15], "fifteen\n", *lines[16:]])
    assert (filled.base / "d/f1").stat().st_mode & 0o777 == 0o640
    assert differing(before, tree(filled.base)).keys() <= {b"d", b"d/f1"}


def test_a_part_without_changes(filled: Branching) -> None:
    """It is not said to be committed."""
    filled.tries("echo x >> d/f1")
    before = tree(filled.base)
    with pytest.raises(UserError, match="has no changes in keep, nosuch"):
        filled.commit(only=["keep", "nosuch"])
    assert differing(before, tree(filled.base)) == {}
    filled.commit(only=["d"])
    assert (filled.base / "d/f1").read_text() == "1\nx\n"


def test_a_part(filled: Branching) -> None:
    filled.tries("echo x >> d/f1; echo x >> keep/k; rm d/f2; rm -r d/sub")
    filled.tries("mkdir -p n/a n/b; echo > n/a/f; echo > n/b/f")
    filled.commit(only=["d", "n/a"], leave=["f2"])
    base = filled.base
    assert (base / "d/f1").read_text() == "1\nx\n"
    assert (base / "d/f2").exists()
    assert not (base / "d/sub").exists()
    assert (base / "keep/k").read_text() == "k\n"
    assert sorted(str(path.relative_to(base)) for path in (base / "n").rglob("*")) == ["n/a", "n/a/f"]
    assert filled.commit().conflicts == []
    assert not (base / "d/f2").exists()
    assert (base / "n/b/f").exists()
    assert (base / "keep/k").read_text() == "k\nx\n"


def test_one_decision_about_conflicts(filled: Branching) -> None:
    filled.tries("echo x >> d/f1")
    done = filled.unionfs("branch", "commit", "--ours", "--theirs", "br")
    assert done.returncode != 0
    assert "--ours and --theirs exclude each other" in done.stderr
    assert filled.stored() == ["branches/br"]


def test_files_that_are_open_for_writing_are_a_hazard(filled: Branching) -> None:
    """Their writers go on with the former file."""
    filled.tries("echo x >> d/f1; rm d/f2; echo x >> d/f3; rm -r d/sub")
    with (
        (filled.base / "d/f1").open("a"), (filled.base / "d/sub/s").open("a"), (filled.base / "d/f3").open(),
        (filled.base / "d/f2").open("r+b") as mapped,
    ):  # fmt: skip
        with mmap.mmap(mapped.fileno(), 0):
            mapped.close()
            found = filled.commit(dry_run=True).hazards
        mine = f"by {quoted(Path('/proc/self/comm').read_text().strip())} (process {os.getpid()})"
        assert [sentence.split(";")[0] for sentence in found] == [
            f"{path} is open for writing {mine}" for path in ("d/f1", "d/f2", "d/sub/s")
        ]
    assert filled.commit().hazards == []


# -- hostile --------------------------------------------------------------------------------------------


def test_a_file_replaced_below_and_then_removed(filled: Branching) -> None:
    filled.tries("echo branch >> d/f1")
    (filled.base / "d/other").write_text("base\n")
    (filled.base / "d/other").rename(filled.base / "d/f1")
    assert filled.commit(dry_run=True).conflicts == [("changed", b"/d/f1")]
    (filled.base / "d/f1").unlink()
    assert filled.commit().conflicts == [("removed", b"/d/f1")]
    assert not (filled.base / "d/f1").exists()


def test_a_name_added_where_the_branch_has_replaced_a_directory(filled: Branching) -> None:
    filled.tries("rm -r d; mkdir d; mv keep kept")
    for name in ("d/new", "keep/new"):
        (filled.base / name).write_text("base\n")
    (filled.base / "d/f1").write_text("base\n")
    assert filled.commit().conflicts == [
        ("changed", b"/d/f1"), ("added", b"/d/new"), ("added", b"/keep/new"),
    ]  # fmt: skip


def test_a_base_that_is_replaced(filled: Branching, area: Path) -> None:
    filled.tries("echo branch >> d/f1; rm d/f2")
    outside = area / "outside"
    shutil.copytree(filled.base, outside, symlinks=True)
    before = tree(outside)
    filled.base.rename(area / "moved")
    filled.base.symlink_to(outside)
    for conflicts in ("stop", "ours"):
        with pytest.raises(UserError, match="not a symlink"):
            filled.commit(conflicts=conflicts)
    filled.base.unlink()
    shutil.copytree(outside, filled.base, symlinks=True)
    with pytest.raises(UserError, match="another directory"):
        filled.commit(conflicts="ours")
    assert differing(before, tree(outside)) == {}


@pytest.mark.parametrize("step", ["move /d/f1", "move /d/sub/new", "set /d"])
def test_symlinks_planted_while_it_is_applied(filled: Branching, area: Path, step: str) -> None:
    """Directories on the way become symlinks between two steps; nothing outside is touched."""
    filled.tries("echo branch >> d/f1; echo n > d/sub/new; echo z > zz")
    outside = area / "outside"
    shutil.copytree(filled.base / "d", outside, symlinks=True)
    before = tree(outside)

    def plant(seen: str) -> None:
        if seen == step:
            (filled.base / "d").rename(area / "d")
            (filled.base / "d").symlink_to(outside)

    apply.set_hook(plant)
    with pytest.raises(UserError):
        filled.commit()
    apply.set_hook(None)
    assert differing(before, tree(outside)) == {}
    # When the directory is back, the next commit goes on to take it back, and then commits.
    (filled.base / "d").unlink()
    (area / "d").rename(filled.base / "d")
    result = filled.commit()
    assert result.done, result
    assert (filled.base / "d/f1").read_text() == "1\nbranch\n"


def test_a_file_changed_while_it_is_applied(filled: Branching) -> None:
    filled.tries("echo branch >> d/f1; echo branch >> d/f2; echo n > a")
    old = tree(filled.base)

    def change(seen: str) -> None:
        if seen == "move /d/f2":
            (filled.base / "d/f2").unlink()
            (filled.base / "d/f2").write_text("meanwhile\n")

    apply.set_hook(change)
    with pytest.raises(UserError, match="changed in the base while"):
        filled.commit()
    apply.set_hook(None)
    assert (filled.base / "d/f2").read_text() == "meanwhile\n"
    assert {*differing(old, tree(filled.base))} <= {b"d", b"d/f2"}


def test_symlinks_of_a_branch_are_not_followed(filled: Branching, area: Path) -> None:
    outside = area / "outside"
    outside.mkdir()
    (outside / "f1").write_text("outside\n")
    filled.tries(f"rm -r d; ln -s {outside} d; ln -s /etc/passwd keep/p; ln -sf {outside}/f1 keep/k")
    shown = filled.shown()
    filled.commit()
    assert differing(shown, tree(filled.base, links=False)) == {}
    assert [path.name for path in outside.iterdir()] == ["f1"]
    assert (outside / "f1").read_text() == "outside\n"


def test_an_undo_after_a_later_change(filled: Branching) -> None:
    filled.tries("echo branch >> d/f1; mkdir new; echo > new/f")
    filled.commit()
    (filled.base / "new/later").write_text("x")
    before = tree(filled.base)
    with pytest.raises(UserError, match=r"'/new/later'|new/later was changed"):
        undo(filled.store)
    assert differing(before, tree(filled.base)) == {}
    (filled.base / "new/later").unlink()
    undo(filled.store)
    assert not (filled.base / "new").exists()


def test_no_space(root: None, branching: Branching, filesystem: object) -> None:
    """A base without space for what is new: found before anything is changed."""
    assert callable(filesystem)
    base = filesystem("tmpfs", 4 << 20)
    branching.base = base / "base"
    branching.base.mkdir()
    (branching.base / "a").write_text("a")
    branching.tries("rm a; head -c 9000000 /dev/urandom > big; echo x > x")
    before = tree(branching.base)
    with pytest.raises(UserError, match=r"big: no space left on device; nothing was changed. Free space\."):
        branching.commit()
    assert differing(before, tree(branching.base)) == {}
    assert branching.stored() == ["branches/br"]


@pytest.mark.parametrize("only", ["a", "n", "d", "t", "s", "."])
def test_none_after_a_part_was_committed_and_undone(branching: Branching, only: str) -> None:
    base = branching.base
    (base / "s").mkdir()
    for name in ("a", "d", "s/z"):
        (base / name).write_text("old\n")
    branching.tries(
        "echo b >> a; echo n > n; rm d; mkdir t; echo t > t/t; rm -r s; mkdir s; echo y > s/y; chmod 0700 ."
    )
    before = tree(base, times=False)
    branching.says("branch", "commit", "--only", only, "br")
    branching.says("branch", "undo")
    assert differing(before, tree(base, times=False)) == {}
    assert branching.commit(dry_run=True).conflicts == []
    # What others change is one, as before.
    (base / "a").write_text("other\n")
    assert branching.commit(dry_run=True).conflicts == [("changed", b"/a")]
    branching.commit(conflicts=OURS)
    assert (base / "a").read_text() == "old\nb\n"
    assert sorted(path.name for path in base.iterdir()) == ["a", "n", "s", "t"]
