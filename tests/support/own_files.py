"""The same calls on a union over an ordinary user's own files and on a native copy of them.

`python -m tests.support.own_files run|look NATIVE UNION` prints JSON: for each scenario what the calls
returned and what the tree is like afterwards, natively and on the union. `build DIR...` makes the trees.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from typing import Any

from tests.support.own_scenarios import SCENARIOS

OLD = 1_000_000_000
"""The time of modification of everything that was there before, seconds since 1970."""


def build(root: str, tree: dict[str, int]) -> None:
    """Make the tree; modes and times last, and from below."""
    os.mkdir(root)
    for path, mode in tree.items():
        full = f"{root}/{path.rstrip('/')}"
        if path.endswith("/"):
            os.mkdir(full)
        elif stat.S_ISLNK(mode):
            os.symlink("target", full)
        elif stat.S_ISFIFO(mode):
            os.mkfifo(full)
        elif path in ("true", "all"):
            with open("/bin/true", "rb") as program, open(full, "wb") as file:
                file.write(program.read())
        else:
            with open(full, "w") as file:
                file.write(f"{path}\n")
            os.setxattr(full, "user.old", b"old")
    for path, mode in reversed(tree.items()):
        full = f"{root}/{path.rstrip('/')}"
        if not stat.S_ISLNK(mode):
            os.chmod(full, stat.S_IMODE(mode))
        os.utime(full, (OLD, OLD), follow_symlinks=False)
    os.utime(root, (OLD, OLD))


def look(root: str) -> dict[str, Any]:
    """Every entry below the root: mode, owner, age, xattrs, and content. What may not be read is made
    readable for the moment, as its owner may.
    """
    found: dict[str, Any] = {}
    waiting = [root]
    while waiting:
        path = waiting.pop()
        st = os.lstat(path)
        age = "old" if st.st_mtime == OLD else "set" if st.st_mtime == 9 else "new"
        entry: list[Any] = [oct(st.st_mode), st.st_uid, st.st_gid, age]
        found[os.path.relpath(path, root)] = entry
        if stat.S_ISLNK(st.st_mode):
            entry.append(os.readlink(path))
            continue
        needed = stat.S_IMODE(st.st_mode) | 0o700
        if needed != stat.S_IMODE(st.st_mode):
            os.chmod(path, needed)
        if not stat.S_ISFIFO(st.st_mode):
            entry.append({name: os.getxattr(path, name).decode() for name in os.listxattr(path)})
        if stat.S_ISDIR(st.st_mode):
            waiting += [f"{path}/{name}" for name in sorted(os.listdir(path))]
        elif stat.S_ISREG(st.st_mode):
            with open(path, "rb") as file:
                data = file.read()
            entry.append(data.decode() if data.isascii() else len(data))
    for path in reversed(list(found)):
        mode = int(found[path][0], 8)
        if not stat.S_ISLNK(mode):
            os.chmod(os.path.normpath(f"{root}/{path}"), stat.S_IMODE(mode))
    return dict(sorted(found.items()))


def looked_at(root: str) -> Any:
    """The result of :func:`look`, or its error."""
    try:
        return look(root)
    except OSError as error:
        return f"{error}"


def main() -> None:
    os.umask(0o022)
    if sys.argv[1] == "build":
        for top in sys.argv[2:]:
            for name, one in SCENARIOS.items():
                build(f"{top}/{name}", one.tree)
        return
    roots = sys.argv[2:]
    results: dict[str, Any] = {}
    for name, one in SCENARIOS.items():
        tops = [f"{root}/{name}" for root in roots]
        calls = [one.act(top) for top in tops] if sys.argv[1] == "run" else [None, None]
        results[name] = [[call, looked_at(top)] for call, top in zip(calls, tops, strict=True)]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
