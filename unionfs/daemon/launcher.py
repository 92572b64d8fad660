"""The launcher, for commands that mount something: the process that mounts for them has everything imported.

See launcher/fuse-unionfs.c and `resident`.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from unionfs.errors import UserError
from unionfs.sys.fds import Owned

NAME = "fuse-unionfs"
_SETTING = "UNIONFS_RESIDENT_SECONDS"
_FORWARDED = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
_POLL_SECONDS = 0.05


def find() -> str | None:
    """The launcher of this installation; None if there is none, or the user wants no resident."""
    if os.environ.get(_SETTING) == "0":
        return None
    # With `python -c` it is not a path, and nothing may be searched for in the current directory.
    script = os.path.realpath(sys.argv[0]) if "/" in sys.argv[0] else ""
    for program in filter(None, (script, sys.executable)):
        path = os.path.join(os.path.dirname(program), NAME)
        if os.access(path, os.X_OK):
            return path
    return None


def hand_over(launcher: str, calls: Sequence[Sequence[str]]) -> None:
    """Run `unionfs ARGUMENT...` for all calls at once, through the launcher, which mounts or says why not.

    Signals that arrive meanwhile interrupt them, and are blocked afterwards. Raises UserError.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    try:
        with ExitStack() as stack:
            running = []
            for arguments in calls:
                errors = stack.enter_context(Owned(os.memfd_create("stderr", os.MFD_CLOEXEC)))
                process = subprocess.Popen(
                    ["unionfs", *arguments], executable=launcher, stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL, stderr=errors,
                )  # fmt: skip
                running.append((stack.enter_context(process), errors))
            for process, _ in running:
                _wait(process)
            for process, errors in running:
                process.wait()
                _answer(process, os.fsdecode(os.pread(errors, 1 << 16, 0)).strip())
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise


def _answer(process: subprocess.Popen[bytes], text: str) -> None:
    if process.returncode != 0:
        raise UserError(text.removeprefix("unionfs: ") or "the mount failed without a reason; try again.")
    if text:
        print(text, file=sys.stderr)


def _wait(process: subprocess.Popen[bytes]) -> None:
    told = False
    with os.fdopen(os.pidfd_open(process.pid), "rb", buffering=0) as ended:
        while not select.select([ended], [], [], _POLL_SECONDS)[0]:
            if not told and signal.sigpending() & _FORWARDED:
                process.terminate()
                told = True
