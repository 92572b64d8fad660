"""Work that root does for another user, in a child that is that user and has nothing of root's.

What the child opens, makes or removes it may as that user only, so nothing planted in the way leads further
than the user can reach. The kernel makes a process that changed its uid undumpable: the user can end or stop
it, but neither read its memory nor trace it (kernel/cred.c, commit_creds; ptrace(2)).
"""

from __future__ import annotations

import importlib
import os
import pwd
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

from unionfs.sys.keyring import new_session_keyring

_POLL_SECONDS: Final = 0.02
_END_SECONDS: Final = 1.0
_PATH: Final = "/usr/local/bin:/usr/bin:/bin"


def run_as(
    uid: int,
    action: Callable[[], int],
    *,
    modules: Sequence[str] = (),
    environment: Mapping[str, str] = {},
    seconds: float | None = None,
) -> int | None:
    """The exit code of `action()`, run by a child as user `uid`; None when it did not end by itself.

    It is killed after `seconds` (None: never) and when the user stops it. stdout and stderr are the caller's.
    `modules` are imported before: the user may not be able to read this program's files. To be called while
    there is one thread. Raises OSError when no process can be started.
    """
    for name in modules:
        importlib.import_module(name)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _become(uid, environment)
            code = action()
        finally:
            os._exit(code)
    deadline = None if seconds is None else time.monotonic() + seconds
    while deadline is None or time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WUNTRACED | os.WNOHANG)
        if found and os.WIFSTOPPED(status):
            break
        if found:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        time.sleep(_POLL_SECONDS)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    # Not for ever: a child that waits for the user's own filesystem may never end.
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline and os.waitpid(pid, os.WNOHANG)[0] == 0:
        time.sleep(_POLL_SECONDS)
    return None


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
