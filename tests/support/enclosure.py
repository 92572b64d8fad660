"""Runs a Python in mount and PID namespaces of its own: ``python enclosure.py ARGUMENT...``.

Root's workers of pytest-xdist start through it. What one of them mounts is in no other's mount table, which
would keep its daemons alive. /run/unionfs and /run/user are its own. It sees only the processes of its tests,
and when it ends, however it does, the kernel ends them all, and their mounts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

PRIVATE = ("/run/unionfs", "/run/user")
"""Fixed directories that root's commands share on a host."""


def command() -> list[str]:
    """The start of a command line: a Python in an enclosure; outside of one if this user may not make it."""
    wanted = [sys.executable, __file__]
    if os.geteuid() == 0 and subprocess.run([*wanted, "-c", ""], stderr=subprocess.DEVNULL).returncode == 0:
        return wanted
    return [sys.executable]


def _code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def main() -> int:
    """Returns the exit code of the Python inside."""
    # Imported here because this file is run by its path, before tests is a package.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from tests.support import areas, syscalls

    # The terminal sends it to the worker too, whose end is the end of these processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID)
    syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    areas.detach_copies()
    for path in PRIVATE:
        os.makedirs(path, 0o755, exist_ok=True)
        syscalls.mount("tmpfs", path, "tmpfs", 0, "mode=755")
    init = os.fork()
    if init:
        return _code(os.waitpid(init, 0)[1])
    syscalls.die_with_parent()
    syscalls.mount("proc", "/proc", "proc")
    worker = os.fork()
    if worker == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    # The first process of a PID namespace inherits its orphans.
    while True:
        pid, status = os.wait()
        if pid == worker:
            os._exit(_code(status))


if __name__ == "__main__":
    sys.exit(main())
