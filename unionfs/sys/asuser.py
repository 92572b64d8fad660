"""Runs work for another user in a child process with that user's ids and none of root's resources.

The child has only that user's permissions, so a planted symlink leads nowhere that the user cannot reach.
The kernel makes a process that changes its uid undumpable: the user can kill or stop it, but neither read its
memory nor trace it (kernel/cred.c, commit_creds; ptrace(2)).
"""

from __future__ import annotations

import importlib
import os
import pwd
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

from unionfs.sys.calls import new_session_keyring
from unionfs.sys.child import run_child

_PATH: Final = "/usr/local/bin:/usr/bin:/bin"


def run_as(
    uid: int,
    action: Callable[[], int],
    *,
    modules: Sequence[str] = (),
    environment: Mapping[str, str] = {},
    seconds: float | None = None,
) -> int | None:
    """Like `run_child`, with a child that runs as `uid`. It inherits stdout and stderr.

    `modules` are imported first: the user may not be able to read this program's files.
    """
    for name in modules:
        importlib.import_module(name)

    def as_user() -> int:
        _become(uid, environment)
        return action()

    return run_child(as_user, seconds)


def _become(uid: int, environment: Mapping[str, str]) -> None:
    try:
        entry = pwd.getpwuid(uid)
        name, gid, home = entry.pw_name, entry.pw_gid, entry.pw_dir
    except KeyError:
        name, gid, home = str(uid), uid, "/"
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.closerange(3, 2**31 - 1)
    with suppress(OSError):
        new_session_keyring()
    os.chdir("/")
    os.umask(0o077)
    if name.isdigit():
        os.setgroups([])
    else:
        os.initgroups(name, gid)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    os.environ.clear()
    os.environ.update({"PATH": _PATH, "HOME": home, "USER": name, "LC_ALL": "C.UTF-8", **environment})
    if "XDG_RUNTIME_DIR" not in os.environ and os.path.isdir(f"/run/user/{uid}"):
        os.environ["XDG_RUNTIME_DIR"] = f"/run/user/{uid}"
