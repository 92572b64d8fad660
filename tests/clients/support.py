"""Runs programs on a union, and proves that they did not change its lower."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import xxhash

from tests.support import mounting, snapshot

ENVIRONMENT = {
    **os.environ,
    "LC_ALL": "C.UTF-8",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "C", "GIT_COMMITTER_EMAIL": "c@example.org",
}  # fmt: skip


def run(
    *arguments: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> str:
    """The program's output, stdout and stderr together. A failure shows all of it."""
    done = subprocess.run(
        [str(argument) for argument in arguments], cwd=cwd, env={**ENVIRONMENT, **(env or {})},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="surrogateescape", timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, f"{arguments} ended with {done.returncode}:\n{done.stdout[-8000:]}"
    return done.stdout


def manifest(root: Path) -> dict[bytes, tuple[object, ...]]:
    """A tree except atimes: content (XXH3), mode, owner, size, times (ns), inode, xattrs."""
    entries = {}
    for path, entry in snapshot.take(root, contents=False).items():
        content: bytes = entry.content
        if stat.S_ISREG(entry.mode):
            digest = xxhash.xxh3_128()
            with open(os.path.join(os.fsencode(root), path), "rb", opener=_without_atime) as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            content = digest.digest()
        entries[path] = (
            entry.mode, entry.uid, entry.gid, entry.size, entry.rdev, entry.nlink, entry.mtime, entry.ctime,
            entry.ino, content, tuple(sorted(entry.xattrs.items())),
        )  # fmt: skip
    return entries


def _without_atime(path: str | bytes, flags: int) -> int:
    return os.open(path, flags | os.O_NOATIME | os.O_NOFOLLOW)


@contextlib.contextmanager
def union_over(
    lowers: Path | Sequence[Path], area: Path, session: str, options: Sequence[str] = ()
) -> Iterator[Path]:
    """The merged tree over ``lowers``. Afterwards every lower must be unchanged."""
    stack = [lowers] if isinstance(lowers, Path) else list(lowers)
    for name in ("upper", "work"):
        (area / name).mkdir()
    before = [manifest(lower) for lower in stack]
    with mounting.mounted(
        area, lowers=stack, upper=area / "upper", work=area / "work", session=session, options=options
    ) as mount:
        yield mount.mountpoint
    for lower, old in zip(stack, before, strict=True):
        new = manifest(lower)
        changed = sorted(path for path in new.keys() | old.keys() if new.get(path) != old.get(path))
        assert not changed, f"{lower} was changed: {changed[:20]}"
