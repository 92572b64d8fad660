"""Finds a command in the tree of a container, before it is started there."""

from __future__ import annotations

import os
import stat

from unionfs.containers.process import CommandError
from unionfs.errors import quoted, reason
from unionfs.sys.fds import Owned
from unionfs.sys.openat2 import open_in_root

NOT_FOUND = 127
NOT_EXECUTABLE = 126
_INTERPRETER_LINE = 256  # BINPRM_BUF_SIZE, linux/binfmts.h


def find_command(root: int, name: str, workdir: str, search: str) -> None:
    """Refuse a command that cannot be started, with its exit code, before starting. Raises CommandError."""
    directories = [workdir] if "/" in name else [part or "." for part in search.split(":")]
    found = False
    for directory in directories:
        path = os.path.join(workdir, directory, name)
        try:
            opened = Owned(open_in_root(root, os.fsencode(path)))
        except OSError:
            continue
        with opened as fd:
            mode = os.stat(fd).st_mode
            found = found or not stat.S_ISDIR(mode) or "/" in name
            if stat.S_ISREG(mode) and mode & 0o111:
                _check_interpreter(root, fd, name, workdir)
                return
    if found:
        raise CommandError(
            f"{quoted(name)} in the union is not executable; check its mode.", NOT_EXECUTABLE
        )
    where = "does not exist in the union" if "/" in name else f"is not in the union's PATH, {search}"
    raise CommandError(f"{quoted(name)} {where}; check the name and the lowers.", NOT_FOUND)


def _check_interpreter(root: int, fd: int, name: str, workdir: str) -> None:
    """Refuse a script whose interpreter is missing, for which execve(2) fails with ENOENT."""
    try:
        with open(f"/proc/self/fd/{fd}", "rb") as script:
            first = script.read(_INTERPRETER_LINE).partition(b"\n")[0]
    except OSError:
        return  # not readable even for root: let the kernel decide
    if not first.startswith(b"#!"):
        return
    words = first[2:].split(maxsplit=1)
    if not words:
        return
    try:
        os.close(open_in_root(root, os.path.join(os.fsencode(workdir), words[0])))
    except OSError as error:
        interpreter = quoted(words[0])
        raise CommandError(
            f"{quoted(name)} is a script for {interpreter}, which cannot be found in the union: "
            f"{reason(error)}; check its first line and the lowers.",
            NOT_FOUND,
        ) from error
