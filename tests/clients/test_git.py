"""git: clone, commit, gc and fsck, in repositories of the lower and of the upper."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.clients.support import run, union_over

pytestmark = pytest.mark.usefixtures("root")


def make_repository(path: Path, commits: int) -> None:
    content = random.Random(1)
    run("git", "init", "-q", "-b", "main", path)
    for number in range(commits):
        for name in range(40):
            file = path / f"d{name % 7}" / f"file{name}"
            file.parent.mkdir(exist_ok=True)
            with file.open("a") as text:
                text.write(f"{number} {content.getrandbits(200)}\n")
        run("git", "add", "-A", cwd=path)
        run("git", "commit", "-q", "-m", f"commit {number}", cwd=path)


def test_clone_commit_and_gc(area: Path, session: str) -> None:
    origin = area / "lower/origin"
    origin.mkdir(parents=True)
    make_repository(origin, 8)
    head = run("git", "rev-parse", "HEAD", cwd=origin)
    with union_over(area / "lower", area, session) as merged:
        clone = merged / "clone"
        run("git", "clone", "-q", "--no-hardlinks", merged / "origin", clone)
        assert run("git", "rev-parse", "HEAD", cwd=clone) == head
        (clone / "new").write_text("new\n")
        (clone / "d1/file1").unlink()
        (clone / "d2").rename(clone / "moved")
        run("git", "add", "-A", cwd=clone)
        run("git", "commit", "-q", "-m", "in the clone", cwd=clone)
        run("git", "gc", "-q", "--aggressive", "--prune=now", cwd=clone)
        run("git", "fsck", "--full", "--strict", cwd=clone)
        assert run("git", "status", "--porcelain", cwd=clone) == ""

        # the repository in the lower: its index, refs, packs and loose objects are copied up
        there = merged / "origin"
        assert run("git", "status", "--porcelain", cwd=there) == ""
        (there / "d0/file0").write_text("changed\n")
        run("git", "commit", "-q", "-a", "-m", "in the lower's repository", cwd=there)
        run("git", "pull", "-q", "--no-rebase", "--no-edit", clone, "main", cwd=there)
        run("git", "gc", "-q", "--prune=now", cwd=there)
        run("git", "fsck", "--full", "--strict", cwd=there)
        assert run("git", "rev-list", "--count", "HEAD", cwd=there).strip() == "11"
        loose = list(there.glob(".git/objects/[0-9a-f][0-9a-f]/*"))
        assert loose == []

        # stash, branch switch and reset touch many files at once
        (there / "d3/file3").write_text("stashed\n")
        run("git", "stash", "-q", cwd=there)
        run("git", "checkout", "-q", "-b", "old", "HEAD~6", cwd=there)
        run("git", "checkout", "-q", "main", cwd=there)
        run("git", "stash", "pop", "-q", cwd=there)
        assert (there / "d3/file3").read_text() == "stashed\n"
        run("git", "reset", "-q", "--hard", cwd=there)
        run("git", "worktree", "add", "-q", merged / "tree", "old", cwd=there)
        assert run("git", "status", "--porcelain", cwd=merged / "tree") == ""
    run("git", "fsck", "--full", cwd=origin)
    assert run("git", "rev-parse", "HEAD", cwd=origin) == head
