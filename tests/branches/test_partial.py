"""After a commit of a part the branch is as if it had been made on the new base, with the other changes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from tests.branches.branching import Branching, Tree, differing, killed_before, tree
from tests.branches.test_below import SCRIPT as BELOW_SCRIPT
from tests.branches.test_below import Below, below, stack
from tests.branches.test_interrupted import killed_at, steps_of
from tests.branches.test_users import User, someone
from unionfs.branches import apply
from unionfs.branches.plan import Chosen
from unionfs.branches.undo import undo
from unionfs.branches.view import viewed
from unionfs.errors import UserError

__all__ = ["below", "someone", "stack"]

FILL = """
mkdir -p d/e/deep gone/deep repl ren/deep links
for n in 1 2 3; do echo $n > d/f$n; echo $n > gone/deep/g$n; done
echo e > d/e/deep/x; echo r > repl/r; echo a > ren/deep/a; echo b > ren/b; echo t > top
echo l > links/a; ln links/a links/c; echo m > links/m; ln links/m links/n; ln links/m links/o
"""
SCRIPT = """
echo more >> d/f1; rm d/f2; mkdir -p new/er new/other; echo n > new/er/n; echo o > new/other/o; ln -s x new/l
echo x >> d/e/deep/x; rm -r gone; rm -r repl; mkdir repl; echo s > repl/s; mv ren d/moved; echo y >> d/moved/b
echo t >> top; chmod 0711 d; echo 2 > links/a; echo 2 > links/m; rm links/o; setfattr -n user.x -v 1 d/e
"""


@pytest.fixture
def tried(branching: Branching) -> Branching:
    assert os.system(f"cd {branching.base} && sh -ec '{FILL}'") == 0
    branching.tries(SCRIPT)
    return branching


def listed(branching: Branching, name: str = "br") -> dict[str, str]:
    found = json.loads(branching.says("branch", "diff", "--json", "--all", name))
    return {item["path"]: item["change"] for item in found}


def restored(tried: Branching, old: Tree) -> bool:
    """Whether the base is as before, but for the times of directories that were not committed themselves."""
    now = tree(tried.base)
    return {path for path, _ in differing(without_times(old), without_times(now)).items()} == set() and all(
        values[6] == now[path][6] for path, values in old.items() if values[0] & 0o170000 != 0o040000
    )


def without_times(found: Tree) -> Tree:
    return {path: (*values[:6], *values[7:]) for path, values in found.items()}


PARTS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "a file": (["d/f1"], []),
    "a removed file": (["d/f2"], []),
    "a directory": (["d"], []),
    "all but a file": ([], ["d/f1"]),
    "of a directory": (["d"], ["d/f2", "d/moved"]),
    "of a new one": (["new/er"], []),
    "a name in a new one": (["new/l"], []),
    "an empty one": (["new"], ["new/*"]),
    "a removed directory": (["gone"], []),
    "of a removed one": (["gone/deep/g1"], []),
    "a replaced directory": (["repl"], []),
    "a renamed directory": (["ren", "d/moved"], []),
    "its new name": (["d/moved"], []),
    "deep": (["d/e/deep"], []),
    "links": (["links/a", "links/c"], []),
    "links and a removed one": (["links/m", "links/n", "links/o"], []),
    "all": (["/"], []),
}
QUICK = ("of a directory", "of a new one", "links")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PARTS]
)
def test_what_stays(tried: Branching, name: str) -> None:
    only, leave = PARTS[name]
    words = [word for one in only for word in ("--only", one)]
    words += [word for one in leave for word in ("--except", one)]
    old, shown, all_changes = tree(tried.base), tried.shown(), listed(tried)
    committed = {path for _, path in tried.commit(only=only, leave=leave, dry_run=True).changes}
    result = tried.commit(only=only, leave=leave)
    assert (result.done, result.conflicts) == (True, [])
    assert differing(without_times(shown), without_times(tried.shown())) == {}
    # What is above what was committed, and what it left.
    assert {os.fsdecode(path[1:]) for path in committed} & {*listed(tried)} <= {*leave}
    assert {*listed(tried)} <= {*all_changes, "ren"}
    done = tried.unionfs("branch", "commit", *words, "br")
    assert (done.returncode, "has no changes" in done.stderr) == (1, True), done
    assert tried.commit(dry_run=True).conflicts == []
    tried.says("branch", "undo")
    assert restored(tried, old)
    assert differing(shown, tried.shown()) == {}
    assert listed(tried) == all_changes
    tried.commit(only=only, leave=leave)
    if listed(tried):
        assert tried.commit().conflicts == []
        assert differing(without_times(shown), without_times(tree(tried.base, links=False))) == {}
        assert [item[:8] for item in tried.stored()] == ["commits/"]


@pytest.mark.parametrize(
    ("only", "sentence"),
    [
        (["links/a"], "links/a and links/c are names of one file"),
        (["links/o"], "links/o and links/m are names of one file"),
        (["ren"], "d/moved was renamed in the branch from a directory that a commit of ren"),
        (["d/moved/b"], "d/moved was renamed in the branch, so a part of it cannot be chosen"),
    ],
)
def test_what_belongs_together(tried: Branching, only: Sequence[str], sentence: str) -> None:
    old, shown = tree(tried.base), tried.shown()
    with pytest.raises(UserError, match=sentence):
        tried.commit(only=only)
    with pytest.raises(UserError, match=sentence):
        tried.commit(only=only, dry_run=True)
    assert restored(tried, old)
    assert differing(shown, tried.shown()) == {}
    assert tried.stored() == ["branches/br"]


def test_links_of_the_branch_belong_together(branching: Branching) -> None:
    branching.tries("echo x > n1; ln n1 n2; echo y > y")
    with pytest.raises(UserError, match="n1 and n2 are names of one file"):
        branching.commit(only=["n1"])
    branching.commit(only=["y"])
    branching.commit(only=["n1", "n2"])
    assert (branching.base / "n1").samefile(branching.base / "n2")
    assert listed(branching) == {}


def test_a_link_that_only_the_index_shows(branching: Branching) -> None:
    """The other name, through which it was changed, was removed: without that it would be lost."""
    (branching.base / "a").write_text("1\n")
    os.link(branching.base / "a", branching.base / "c")
    branching.tries("echo 2 > a; rm a")
    with pytest.raises(UserError, match="are names of one file"):
        branching.commit(only=["a"])
    branching.commit(only=["a", "c"])
    assert [path.name for path in branching.base.iterdir()] == ["c"]
    assert (branching.base / "c").read_text() == "2\n"


def test_other_commits_in_between_lose_no_link(branching: Branching) -> None:
    """What an undo needs holds links of the base, which end with the next commit."""
    for name in ("a", "o"):
        (branching.base / name).write_text("1\n")
    os.link(branching.base / "a", branching.base / "c")
    branching.tries("echo 2 > a; echo 2 > o; echo 3 > o2")
    branching.commit(only=["o"])
    branching.commit(only=["o2"])
    assert {*listed(branching)} == {"a", "c"}
    branching.commit()
    assert (branching.base / "c").read_text() == "2\n"
    assert (branching.base / "c").samefile(branching.base / "a")


def test_a_later_change_of_what_was_committed(tried: Branching) -> None:
    """It is one of the base's, which the branch shows, and no conflict."""
    tried.commit(only=["d", "new/er", "repl"])
    base = tried.base
    (base / "d/f1").write_text("hand\n")
    (base / "d/f2").write_text("hand\n")
    (base / "new/er/n").unlink()
    (base / "new/er/hand").write_text("hand\n")
    (base / "repl/hand").write_text("hand\n")
    (base / "d").chmod(0o755)
    expected = tree(base, times=False, links=False)
    changes = listed(tried)
    assert not {path for path in changes if path.startswith(("d", "new/er", "repl"))}
    shown = tried.shown()
    for path in (b"d/f1", b"d/f2", b"new/er/hand", b"repl/hand", b"d"):
        assert shown[path][:4] == expected[path][:4], path
        assert shown[path][7] == expected[path][7], path
    assert b"new/er/n" not in shown
    assert tried.commit().conflicts == []
    assert (base / "d/f1").read_text() == "hand\n"
    assert (base / "new/other/o").read_text() == "o\n"


def test_an_opaque_store_stays_hidden(branching: Branching) -> None:
    """The directory that hides a store in the base is no change, and stays when others around it go."""
    branching.root = branching.base / "in" / "storage"
    branching.root.parent.mkdir()
    branching.store = type(branching.store)(str(branching.root))
    branching.tries("echo x > in/x; echo y > y; ls in/storage")
    branching.commit(only=["in"])
    assert branching.tries("ls in/storage").stdout == ""
    assert {*listed(branching)} == {"y"}
    branching.says("branch", "undo")
    assert branching.tries("ls in/storage").stdout == ""


@pytest.mark.parametrize("kept", [["d"], ["d/f1"]])
def test_theirs_keeps_the_change(tried: Branching, kept: list[str]) -> None:
    (tried.base / kept[0]).chmod(0o700)
    result = tried.commit(conflicts="theirs")
    assert [os.fsdecode(path[1:]) for path in result.skipped] == kept
    assert {*listed(tried)} - {"d"} == {*kept} - {"d"}
    assert ("changed", os.fsencode(f"/{kept[0]}")) in tried.commit(dry_run=True).conflicts
    tried.commit(conflicts="ours")
    assert (tried.base / "d/f1").read_text() == "1\nmore\n"
    assert (tried.base / "d").stat().st_mode & 0o777 == 0o711


def test_theirs_keeps_all_names_of_a_file(branching: Branching) -> None:
    (branching.base / "a").write_text("1\n")
    os.link(branching.base / "a", branching.base / "c")
    branching.tries("echo 2 > a; echo x > x")
    (branching.base / "a").unlink()
    (branching.base / "a").write_text("hand\n")
    assert [path for _, path in branching.commit().conflicts] == [b"/a"]
    assert branching.commit(conflicts="theirs").skipped == [b"/a", b"/c"]
    assert [(branching.base / name).read_text() for name in "acx"] == ["hand\n", "1\n", "x\n"]


class TestUndo:
    def test_not_after_a_later_change_of_the_branch(self, tried: Branching) -> None:
        tried.commit(only=["d"])
        tried.tries("echo again >> d/f1")
        shown = tried.shown()
        with pytest.raises(UserError, match="d and 1 more was changed in branch br since"):
            undo(tried.store)
        assert differing(shown, tried.shown()) == {}

    def test_with_another_later_change(self, tried: Branching) -> None:
        tried.commit(only=["new/er"])
        tried.tries("echo again >> top")
        shown = tried.shown()
        undo(tried.store)
        assert differing(shown, tried.shown()) == {}
        assert not (tried.base / "new").exists()

    def test_not_while_the_branch_is_mounted_by_others(self, tried: Branching) -> None:
        tried.commit(only=["d"])
        place = tried.says("branch", "mount", "br").strip()
        with open(f"{place}/top"), pytest.raises(UserError, match="busy"):
            undo(tried.store)
        undo(tried.store)
        assert listed(tried)["d/f1"] == "C"

    def test_not_while_others_lie_over_it(self, tried: Branching) -> None:
        tried.commit(only=["d"])
        tried.tries("echo x > x", "child", "--from", "br")
        with pytest.raises(UserError, match="others lie over it"):
            undo(tried.store)
        tried.says("branch", "discard", "child")
        undo(tried.store)

    def test_under_another_name(self, tried: Branching) -> None:
        tried.commit(only=["d"])
        shown = tried.shown()
        tried.says("branch", "rename", "br", "other")
        undo(tried.store)
        assert differing(shown, tried.shown("other")) == {}
        assert listed(tried, "other")["d/f1"] == "C"

    def test_of_a_discarded_branch(self, tried: Branching) -> None:
        old = tree(tried.base)
        tried.commit(only=["d"])
        tried.says("branch", "discard", "br")
        undo(tried.store)
        assert restored(tried, old)


ONLY = ["d", "new/er", "links/a", "links/c", "repl"]


def layer(branching: Branching) -> Tree:
    return tree(branching.root / "branches" / "br" / "upper")


def test_killed_at_every_step(tried: Branching) -> None:
    old, before = tree(tried.base), layer(tried)
    steps = steps_of(lambda: tried.commit(only=ONLY))
    assert {"move /upper/new/er", "set /upper/new", "ended"} <= {*steps}
    new, left = tree(tried.base), layer(tried)
    assert len(differing(before, left)) > 10
    undo(tried.store)
    assert differing(before, layer(tried)) == {}
    for index, step in enumerate(steps):
        killed_at(index, lambda: tried.commit(only=ONLY))
        # The same again; only after all has ended there is nothing more to do.
        with pytest.raises(UserError, match="has no changes") if step == "ended" else nullcontext():
            assert tried.commit(only=ONLY).done
        assert restored(tried, new), step
        assert differing(left, layer(tried)) == {}, step
        undo(tried.store)
        assert restored(tried, old), step
        assert differing(before, layer(tried)) == {}, step
    assert tried.commit().conflicts == []


def test_an_undo_killed_at_every_step(tried: Branching) -> None:
    old, before = tree(tried.base), layer(tried)
    tried.commit(only=ONLY)
    steps = steps_of(lambda: undo(tried.store))
    assert {"unmove /upper/new/er", "unset /upper/new"} <= {*steps}
    for index, step in enumerate(steps):
        tried.commit(only=ONLY)
        killed_at(index, lambda: undo(tried.store))
        assert undo(tried.store).branch == "br", step
        assert restored(tried, old), step
        assert differing(before, layer(tried)) == {}, step
    assert tried.commit().conflicts == []


def test_to_a_parent(tried: Branching) -> None:
    """The layers of both are changed; what is not committed of the nested branch shows the same."""
    script = "echo c >> d/f1; rm d/moved/deep/a; mkdir new/er/c; echo c > new/er/c/c; mv new/other o"
    tried.tries(script, "child", "--from", "br")
    shown, changes = tried.shown("child"), listed(tried, "child")
    tried.commit("child", only=["d", "new/er"])
    assert differing(without_times(shown), without_times(tried.shown("child"))) == {}
    left = {path: kind for path, kind in changes.items() if not path.startswith(("d", "new/er"))}
    assert listed(tried, "child") == left
    undo(tried.store)
    assert listed(tried, "child") == changes
    tried.commit("child", only=["d", "new/er"])
    tried.tries("echo again >> d/f1", "child")
    with pytest.raises(UserError, match="was changed in branch child since"):
        undo(tried.store)
    tried.tries("sed -i /again/d d/f1", "child")
    assert tried.commit("child").conflicts == []
    assert differing(without_times(shown), without_times(tried.shown("br"))) == {}


def test_path_names_of_the_new_base(branching: Branching, area: Path) -> None:
    """A name that is a directory in the layer alone, of which nothing is chosen, is not touched."""
    branching.tries("mkdir -p n/a m; echo x > n/a/x; echo y > m/y")
    branching.commit(only=["m"])
    assert listed(branching) == {"n": "A", "n/a": "A", "n/a/x": "A"}
    assert os.listdir(area / "storage/branches/br/upper") == ["n"]


BELOW_ONLY = ["d", "m/d/f1", "m/gone", "m/in/e"]


@pytest.mark.slow
def test_filesystems_below_killed_at_every_step(below: Below) -> None:
    """Each has a layer of its own, which loses what is committed there."""
    branching, old = below.branching, without_times(below.tree())
    branching.tries(BELOW_SCRIPT)
    changes = listed(branching)
    steps = steps_of(lambda: branching.commit(only=BELOW_ONLY))
    assert {"move /upper/d", "move /upper/gone", "set /upper"} <= {*steps}
    new, left = without_times(below.tree()), listed(branching)
    assert len(left) < len(changes)
    undo(branching.store)
    assert (listed(branching), without_times(below.tree())) == (changes, old)
    for index, step in enumerate(steps):
        killed_at(index, lambda: branching.commit(only=BELOW_ONLY))
        with pytest.raises(UserError, match="has no changes") if step == "ended" else nullcontext():
            branching.commit(only=BELOW_ONLY)
        assert differing(new, without_times(below.tree())) == {}, step
        undo(branching.store)
        assert differing(old, without_times(below.tree())) == {}, step
    assert listed(branching) == changes
    branching.commit(only=BELOW_ONLY)
    assert listed(branching) == left
    assert branching.commit().conflicts == []
    assert (below.base / "m/d/f1").read_text() == "1\nmore\n"
    assert not (below.base / "m/gone").exists()


def test_of_an_ordinary_user(someone: User) -> None:
    """With markers in `user.*` xattrs, and directories that the user may not write."""
    old = tree(someone.base)
    script = """
    chmod u+w d/ro; echo in > d/ro/in; rm d/ro/f; chmod 0500 d/ro; rm -r gone; echo x >> d/f2
    mkdir -p n/a n/b; echo a > n/a/a; echo b > n/b/b; chmod 0555 n/a n/b n
    """
    someone.unionfs("try", "--keep", "-n", "br", "--", "sh", "-ec", script)
    someone.unionfs("branch", "commit", "--only", "d/ro", "--only", "n/a", "br")
    diff = someone.unionfs("branch", "diff", "br").stdout.splitlines()
    assert [line.split("  ")[0] for line in diff] == ["C d/f2", "D gone/", "A n/b/", "A n/b/b"]
    assert (someone.base / "d/ro/in").read_text() == "in\n"
    someone.unionfs("branch", "undo")
    assert differing(without_times(old), without_times(tree(someone.base))) == {}
    someone.unionfs("branch", "commit", "--only", "d/ro", "--only", "n/a", "br")
    someone.unionfs("branch", "commit", "br")
    assert sorted(str(path.relative_to(someone.base / "n")) for path in (someone.base / "n").rglob("*")) == [
        "a", "a/a", "b", "b/b",
    ]  # fmt: skip
    assert not (someone.base / "gone").exists()


def test_on_another_filesystem(branching: Branching, filesystem: Callable[..., Path]) -> None:
    """What leaves the layer is not kept, since the commit cannot be undone."""
    base = filesystem("tmpfs", 16 << 20) / "base"
    base.mkdir()
    assert os.system(f"cd {base} && sh -ec '{FILL}'") == 0
    branching.tries(SCRIPT, "br", "-D", base)
    shown = branching.shown()
    seen: list[str] = []
    apply.set_hook(seen.append)
    branching.commit(only=["d/f1"])
    apply.set_hook(None)
    steps = [step for step in seen if step not in ("begun", "ended")]
    for name, step in zip(["d", "new/er", "gone", "repl", "top"], ["applied", *steps[-4:]], strict=True):
        killed_before(step, lambda name=name: branching.commit(only=[name]))
        with suppress(UserError):
            branching.commit(only=[name])
        assert not [path for path in listed(branching) if path.startswith(name)], (name, step)
        assert branching.stored() == ["branches/br"], step
        assert differing(without_times(shown), without_times(branching.shown())) == {}, step
    assert branching.commit().conflicts == []
    assert differing(without_times(shown), without_times(tree(base, links=False))) == {}


def test_what_is_chosen_below_new_directories_is_found_in_one_walk(branching: Branching) -> None:
    depth, asked = 40, 0
    deepest = b"".join(b"/d%d" % level for level in range(depth))
    branching.tries(f"mkdir -p .{deepest.decode()} && touch .{deepest.decode()}/x && mkdir d0/other")

    def has(path: bytes) -> bool:
        nonlocal asked
        asked += 1
        return path == deepest + b"/x"

    with viewed(branching.store.branch("br")) as view:
        chosen, path, found = Chosen(view, has), b"", view.root.new
        for level in range(depth):
            assert found is not None
            path, found = path + b"/d%d" % level, view.child(found, b"d%d" % level)
            assert found is not None
            assert chosen.reaches(path, found)
            if level == 0:
                other = view.child(found, b"other")
                assert other is not None
                assert not chosen.reaches(b"/d0/other", other)
    assert asked <= 3 * depth
