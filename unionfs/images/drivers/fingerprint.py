"""Whether the lowers of a container are those of an earlier one: the name of a base."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence

from unionfs.errors import on_failure, quoted


def fingerprint(lowers: Sequence[str], root: str) -> str:
    """Return 32 hexadecimal digits that change with everything below the lowers. Raises UserError.

    Every change of a file or directory changes its ctime (inode(7)). Layers of the image store never change:
    for these the path suffices. The storage root `root` does not count.
    """
    total = hashlib.sha256()
    images, own = f"{os.path.realpath(root)}/images/layers/", os.lstat(root)
    for lower in lowers:
        total.update(os.fsencode(lower) + b"\0")
        if not lower.startswith(images):
            with on_failure(f"lower {quoted(lower)} cannot be read", "check its permissions"):
                _add(total, lower, (own.st_dev, own.st_ino))
    return total.hexdigest()[:32]


def _add(total: hashlib._Hash, top: str, left_out: tuple[int, int]) -> None:
    st = os.stat(top)
    total.update(_words(b"", st))
    waiting = [top] if stat.S_ISDIR(st.st_mode) else []
    while waiting:
        path = waiting.pop()
        with os.scandir(path) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            st = entry.stat(follow_symlinks=False)
            if (st.st_dev, st.st_ino) != left_out:
                total.update(_words(os.fsencode(entry.path), st))
                if stat.S_ISDIR(st.st_mode):
                    waiting.append(entry.path)


def _words(path: bytes, st: os.stat_result) -> bytes:
    return b"%b\0%d %d %d %d\n" % (path, st.st_ino, st.st_mode, st.st_size, st.st_ctime_ns)
