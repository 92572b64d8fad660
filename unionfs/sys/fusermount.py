"""fusermount3, libfuse's set-user-id helper that mounts and unmounts for ordinary users."""

from __future__ import annotations

import errno
import os
import stat


def find_fusermount() -> str | None:
    """Return the path of fusermount3, or None if it is not installed."""
    # Not by shutil.which: importing shutil takes a tenth of the time of a short command.
    paths = (os.path.join(where, "fusermount3") for where in (*os.get_exec_path(), "/usr/bin", "/bin"))
    return next((path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)), None)


def lack() -> tuple[str, str] | None:
    """Return what keeps ordinary users from unmounting by the helper, and the cure; None if nothing is known.

    util/fusermount.c of libfuse 3: it unmounts only what is in /etc/mtab.
    """
    path = find_fusermount()
    if path is None:
        return "fusermount3 is missing", "install the package fuse3"
    status = os.stat(path)
    if status.st_uid != 0 or not status.st_mode & stat.S_ISUID:
        return f"{path} is not setuid root", f"let root run `chown root {path}; chmod 4755 {path}`"
    if not os.path.exists("/etc/mtab"):
        return "fusermount3 needs /etc/mtab", "let root run `ln -s /proc/self/mounts /etc/mtab`"
    return None


def unmount(mountpoint: str, *, lazy: bool) -> bool:
    """Unmount ``mountpoint``. Returns False without a helper. Raises ``OSError``: EBUSY, EPERM."""
    program = find_fusermount()
    if program is None:
        return False
    # For start-up time: umount2(2) usually suffices.
    import subprocess

    # The C locale, because the message is parsed below: the exit code is 1 for every failure.
    done = subprocess.run(
        [program, "-u", *(["-z"] if lazy else []), "--", mountpoint],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        cwd="/",
        env={**os.environ, "LC_ALL": "C"},
    )
    if done.returncode != 0:
        text = os.fsdecode(done.stderr).strip().rpartition(": ")[2] or f"{program} failed"
        raise OSError(errno.EBUSY if "busy" in text else errno.EPERM, text, mountpoint)
    return True
