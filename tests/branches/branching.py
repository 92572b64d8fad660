"""A base, a store of branches, and what a commit must give: the tree that the branch showed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.mount import cli_calls
from tests.mount.cli_calls import Done, succeed
from tests.support import snapshot
from unionfs.branches import apply
from unionfs.branches.commit import Result, Wish, commit
from unionfs.branches.store import Store

Tree = dict[bytes, tuple[Any, ...]]


class Branching:
    """Calls of `unionfs` with a store in `area`, and the directory `base` below it."""

    def __init__(self, area: Path) -> None:
        self.area = area
        self.base = area / "base"
        self.base.mkdir()
        self.root = area / "storage"
        self.store = Store(str(self.root))

    def unionfs(self, *words: str | Path, cwd: Path | None = None, **extra: Any) -> Done:
        """Run `unionfs`, by default in the base."""
        env = {"UNIONFS_ROOT": str(self.root), **extra.pop("env", {})}
        return cli_calls.unionfs(*words, cwd=cwd or self.base, env=env, **extra)

    def says(self, *words: str | Path, **extra: Any) -> str:
        """The output of a command, which must succeed."""
        return succeed(self.unionfs(*words, **extra))

    def tries(self, script: str, name: str = "br", *words: str | Path, **extra: Any) -> Done:
        """Run a shell script on a branch, which is kept. It must succeed."""
        done = self.unionfs("try", "--keep", "-n", name, *words, "--", "sh", "-ec", script, **extra)
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done

    def commit(self, name: str = "br", **wish: Any) -> Result:
        """Commit a branch in this process."""
        return commit(self.store, name, Wish(**wish))

    def shown(self, name: str = "br") -> Tree:
        """The tree that a branch shows, mounted."""
        mountpoint = self.says("branch", "mount", name).strip()
        try:
            return tree(mountpoint, links=False)
        finally:
            self.says("umount", mountpoint)

    def stored(self) -> list[str]:
        """What the store of branches and commits has, besides the lock and the note of the last commit."""
        found = []
        for part in ("branches", "commits"):
            if (self.root / part).is_dir():
                names = {*os.listdir(self.root / part)} - {"lock", "last.json"}
                found += [f"{part}/{name}" for name in names]
        return sorted(found)


def tree(root: str | Path, *, times: bool = True, links: bool = True) -> Tree:
    """Every entry of a tree with all that a command decides: attributes, content, which names are one file.

    `links`: the link counts of directories, too, which a union does not have.
    """
    taken = snapshot.take(root)
    first: dict[tuple[int, int], bytes] = {}
    # What an undo needs of a commit may have names of the same files elsewhere.
    names = Counter((entry.dev, entry.ino) for entry in taken.values())
    found: Tree = {}
    for path, entry in sorted(taken.items()):
        is_directory = entry.kind == 0o040000
        same = b"" if is_directory or entry.nlink < 2 else first.setdefault((entry.dev, entry.ino), path)
        found[path] = (
            entry.mode, entry.uid, entry.gid, 0 if is_directory else entry.size, entry.rdev,
            names[entry.dev, entry.ino] if not is_directory else entry.nlink if links else 0,
            entry.mtime if times else 0, entry.content, same,
            tuple(sorted((name, value) for name, value in entry.xattrs.items() if "overlay" not in name)),
        )  # fmt: skip
    return found


def differing(one: Tree, other: Tree) -> dict[bytes, tuple[Any, Any]]:
    """The paths at which two trees differ."""
    return {
        path: (one.get(path), other.get(path))
        for path in sorted({*one, *other})
        if one.get(path) != other.get(path)
    }


def directly(area: Path, fill: Callable[[Path], None], script: str) -> Tree:
    """The tree that a script makes of a copy of the base, without a union; without times."""
    copy = area / "direct"
    copy.mkdir()
    fill(copy)
    subprocess.run(["sh", "-ec", script], cwd=copy, check=True, capture_output=True)
    return tree(copy, times=False)


def killed_before(step: str, action: Callable[[], object]) -> None:
    """Do it in a process that is killed before a step of that name."""
    killed_when(lambda seen: seen == step, action, step)


def killed_when(due: Callable[[str], bool], action: Callable[[], object], what: object) -> None:
    """Do it in a process that is killed before the first step that is `due`; `what`: for messages."""
    pid = os.fork()
    if pid == 0:

        def hook(seen: str) -> None:
            if due(seen):
                os.kill(os.getpid(), signal.SIGKILL)

        apply.set_hook(hook)
        try:
            action()
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), (what, status)
