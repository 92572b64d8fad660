"""Names and attributes: walking, packing, changing and removing trees."""

from __future__ import annotations

from benchmarks.perf.parts import GIT_ENVIRONMENT, WORD
from benchmarks.perf.workloads.base import Workload, timed

_GIT = ["git", "-c", "safe.directory=*"]


def metadata() -> tuple[Workload, ...]:
    """The group metadata."""
    return (
        timed("find", "metadata", "find, which requests no attributes", lambda turn: ["find", "tree"],
              lambda sizes: sizes.tree_entries, lines=lambda sizes: sizes.tree_entries,
              writes=False, quick=True),
        timed("du", "metadata", "du -s", lambda turn: ["du", "-s", "tree"],
              lambda sizes: sizes.tree_entries, writes=False, quick=True),
        timed("grep", "metadata", "grep -r for a word", lambda turn: ["grep", "-r", WORD, "tree"],
              lambda sizes: sizes.tree_entries, lines=lambda sizes: sizes.tree_files // 10,
              writes=False, quick=True),
        timed("git-status", "metadata", "git status, nothing changed",
              lambda turn: [*_GIT, "-C", "repo", "status", "--short"],
              lambda sizes: sizes.repository_files, lower=("repo",), lines=lambda sizes: 0,
              environment=lambda turn: GIT_ENVIRONMENT, operation="file", writes=False, quick=True),
        timed("git-clone", "metadata", "git clone of a repository of the lower, without hard links",
              lambda turn: [*_GIT, "clone", "-q", "--no-hardlinks", "repo", "clone"],
              lambda sizes: sizes.repository_files, lower=("repo",), check="[ -s clone/file0000.txt ]",
              environment=lambda turn: GIT_ENVIRONMENT, operation="file", quick=True),
        # to a new directory: the tree may be in the lower, and tar would remove each file first
        timed("untar", "metadata", "tar -x of the tree",
              lambda turn: ["tar", "-xf", str(turn.area.archive()), "--one-top-level=new"],
              lambda sizes: sizes.tree_entries, lower=(), check="[ -s new/tree/file0000.txt ]", quick=True),
        timed("create", "metadata", "make files of 1 KiB",
              lambda turn: [str(turn.area.helper()), "create", "new", str(turn.sizes.small_files)],
              lambda sizes: sizes.small_files, lower=(), operation="file", check="[ -s new/00/f0000 ]",
              quick=True),
        timed("chmod", "metadata", "chmod -R, which copies every file up",
              lambda turn: ["chmod", "-R", "o-r", "tree"],
              lambda sizes: sizes.tree_entries, check="[ $(stat -c %a tree/file0000.txt) = 640 ]",
              quick=True),
        timed("chown", "metadata", "chown -R, which copies every file up",
              lambda turn: ["chown", "-R", "1:1", "tree"],
              lambda sizes: sizes.tree_entries, check="[ $(stat -c %u:%g tree/file0000.txt) = 1:1 ]"),
        timed("rm", "metadata", "rm -rf of a tree of the lower", lambda turn: ["rm", "-rf", "tree"],
              lambda sizes: sizes.tree_entries, check="[ ! -e tree ]", quick=True),
    )  # fmt: skip
