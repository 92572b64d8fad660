"""A commit or undo that is killed at any step ends by the same command in the new, or the old, tree."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.branches.branching import Branching, differing, killed_when, tree
from unionfs.branches import apply
from unionfs.branches.undo import undo
from unionfs.errors import UserError
from unionfs.storage import jsonfiles

FILL = """ mkdir -p d/e gone/deep repl; for n in 1 2 3; do echo $n > d/f$n; echo $n > gone/deep/g$n; done;
echo r > repl/r; chmod 0555 d/e; touch -d 2001-01-01 d/f1 d gone; mkdir -p ren/deep; echo a > ren/deep/a
echo b > ren/deep/b; touch -d 2001-01-01 ren ren/deep
"""
SCRIPT = """
echo more >> d/f1; rm d/f2; mkdir -p new/er; echo n > new/er/n; echo x > x; rm -r gone; rm -r repl; mkdir repl
mv ren d/moved; echo x >> d/moved/deep/a; rm d/moved/deep/b; chmod 0750 d/moved/deep; echo y > d/moved/y
echo s > repl/s; chmod 0711 d; rm d/f3; mkdir d/f3; chmod u+w d/e; echo e > d/e/e; chmod 0500 d/e
"""


class Killed(Exception):
    pass


@pytest.fixture
def prepared(branching: Branching) -> Branching:
    assert os.system(f"cd {branching.base} && sh -ec '{FILL}'") == 0
    branching.tries(SCRIPT)
    return branching


def steps_of(action: Callable[[], object]) -> list[str]:
    """The steps that an action shows."""
    seen: list[str] = []
    apply.set_hook(seen.append)
    action()
    apply.set_hook(None)
    return seen


def killed_at(index: int, action: Callable[[], object]) -> None:
    """Do it in a process that is killed before its step number `index`."""
    steps = itertools.count()
    killed_when(lambda _: next(steps) == index, action, index)


def test_killed_at_every_step(prepared: Branching) -> None:
    old = tree(prepared.base)
    steps = steps_of(prepared.commit)
    new = tree(prepared.base)
    assert len(differing(old, new)) > 10
    undo(prepared.store)
    assert differing(old, tree(prepared.base)) == {}
    assert {"begun", "prepared", "applied", "branch moved"} <= {*steps}
    for index, step in enumerate(steps):
        killed_at(index, prepared.commit)
        assert prepared.commit().done, step
        assert differing(new, tree(prepared.base)) == {}, step
        assert [name[:8] for name in prepared.stored()] == ["commits/"], step
        undo(prepared.store)
        assert differing(old, tree(prepared.base)) == {}, step
        assert prepared.stored() == ["branches/br"], step


def test_an_undo_killed_at_every_step(prepared: Branching) -> None:
    old = tree(prepared.base)
    prepared.commit()
    new = tree(prepared.base)
    steps = steps_of(lambda: undo(prepared.store))
    for index, step in enumerate(steps):
        prepared.commit()
        assert differing(new, tree(prepared.base)) == {}, step
        killed_at(index, lambda: undo(prepared.store))
        assert undo(prepared.store).branch == "br"
        assert differing(old, tree(prepared.base)) == {}, step
        assert prepared.stored() == ["branches/br"], step


def test_an_error_at_every_step_takes_all_back(prepared: Branching) -> None:
    old = tree(prepared.base)
    steps = steps_of(prepared.commit)
    undo(prepared.store)
    last = steps.index("applied")
    for index in range(last):
        failing(index)
        with pytest.raises(UserError, match=r"nothing was changed|everything was put back"):
            prepared.commit()
        apply.set_hook(None)
        assert differing(old, tree(prepared.base)) == {}, steps[index]
        assert prepared.stored() == ["branches/br"], steps[index]
    assert prepared.commit().conflicts == []


def failing(index: int) -> None:
    """Let the step number `index` fail for want of space."""
    count = 0

    def hook(step: str) -> None:
        nonlocal count
        count += 1
        if count == index + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    apply.set_hook(hook)


class TestOnAnotherFilesystem:
    """The store and the base are on different filesystems, so all is prepared in the base."""

    @pytest.fixture
    def apart(self, root: None, filesystem: Callable[..., Path], branching: Branching) -> Branching:
        base = filesystem("tmpfs", 64 << 20)
        branching.base.rmdir()
        branching.base = base / "base"
        branching.base.mkdir()
        assert os.system(f"cd {branching.base} && sh -ec '{FILL}'") == 0
        branching.tries(SCRIPT)
        return branching

    def test_killed_at_every_step(self, apart: Branching, area: Path) -> None:
        base, copy = apart.base, apart.base.parent / "copy"
        shutil.copytree(base, copy, symlinks=True)
        kept = area / "kept"
        assert os.system(f"cp -a {apart.root}/branches/br {kept}") == 0
        steps = steps_of(apart.commit)
        new = tree(base)
        assert apart.stored() == []
        assert "branch removed" in steps
        for index, step in enumerate(steps):
            self._again(apart, copy, kept)
            killed_at(index, apart.commit)
            if (apart.root / "branches/br").exists() or apart.stored():
                assert apart.commit().done, step
            assert differing(new, tree(base)) == {}, step
            assert apart.stored() == [], step
        with pytest.raises(UserError, match="cannot be undone, since its base"):
            undo(apart.store)

    def _again(self, apart: Branching, copy: Path, kept: Path) -> None:
        """Base and branch as before; the base is a new directory."""
        shutil.rmtree(apart.base)
        assert os.system(f"cp -a {copy} {apart.base}; cp -a {kept} {apart.root}/branches/br") == 0
        branch = apart.store.branch("br")
        values = jsonfiles.read(f"{branch.path}/branch.json")
        values |= {"base_inode": os.stat(apart.base).st_ino, "session": 2**62}
        jsonfiles.write(f"{branch.path}/branch.json", values)
        if os.path.exists(f"{branch.path}/seen.json"):
            os.unlink(f"{branch.path}/seen.json")


class TestToAParent:
    """A commit to another branch, which is mounted meanwhile."""

    @pytest.fixture
    def nested(self, branching: Branching) -> Branching:
        assert os.system(f"cd {branching.base} && sh -ec '{FILL}'") == 0
        branching.tries("echo parent >> d/f1; echo p > p; mv d/f3 d/f4; ln d/f4 d/f5", "parent")
        branching.tries("echo child >> d/f1; rm p d/f5; mv d e; rm -r gone; echo n > repl/n; chmod 0711 repl",
                        "child", "--from", "parent")  # fmt: skip
        return branching

    def test_is_undone(self, nested: Branching) -> None:
        shown = nested.shown("child")
        assert nested.says("branch", "commit", "child") == "committed child to branch parent\n"
        assert differing(shown, nested.shown("parent")) == {}
        assert nested.says("branch", "undo") == "undid the commit of child to branch parent\n"
        assert nested.stored() == ["branches/child", "branches/parent"]
        assert differing(shown, nested.shown("child")) == {}
        nested.commit("child")
        nested.tries("echo later >> repl/n", "parent")
        with pytest.raises(UserError, match="repl/n was changed in branch parent since"):
            undo(nested.store)
        assert nested.shown("parent")[b"repl/n"] != shown[b"repl/n"]
        assert not [path for path in nested.shown("parent") if b".unionfs" in path]
        nested.says("branch", "discard", "parent")
        with pytest.raises(UserError, match="is gone or has another name"):
            undo(nested.store)
        nested.tries("echo x > x", "other")
        nested.commit("other")
        assert len(nested.stored()) == 1

    def test_a_ctime_is_no_change(self, nested: Branching) -> None:
        """The kernel and the layer may have different ones; what sets it otherwise is seen."""
        nested.commit("child")
        file = Path(nested.store.branch("parent").upper, "repl/n")
        file.chmod(file.stat().st_mode)
        assert undo(nested.store).branch == "child"
        nested.commit("child")
        nested.tries("setfattr -n user.late -v x repl/n", "parent")
        with pytest.raises(UserError, match="repl/n was changed in branch parent since"):
            undo(nested.store)

    @pytest.mark.slow
    def test_an_undo_killed_at_every_step(self, nested: Branching) -> None:
        shown = nested.shown("child")
        nested.commit("child")
        steps = steps_of(lambda: undo(nested.store))
        assert {"undo", "stage back", "given back", "branch back"} <= {*steps}
        for index, step in enumerate(steps):
            nested.commit("child")
            assert differing(shown, nested.shown("parent")) == {}, step
            killed_at(index, lambda: undo(nested.store))
            assert undo(nested.store).branch == "child", step
            assert nested.stored() == ["branches/child", "branches/parent"], step
            assert differing(shown, nested.shown("child")) == {}, step
