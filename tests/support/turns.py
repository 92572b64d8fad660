"""Tests in parallel processes that must not run side by side: locks on files in the run's directory.

flock(2) ends with its process, so a killed test blocks nobody.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path


@contextmanager
def _locked(name: str, how: int) -> Iterator[None]:
    path = Path(tempfile.gettempdir(), f"turn-{name}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, how)
        yield
    finally:
        os.close(fd)


@contextmanager
def machine(*, alone: bool) -> Iterator[None]:
    """Run a test beside others, or alone on this machine."""
    # The first lock is held only while waiting: later tests do not overtake one that waits to be alone.
    with _locked("queue", fcntl.LOCK_EX):
        place = _locked("machine", fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        place.__enter__()
    try:
        yield
    finally:
        place.__exit__(None, None, None)


def only_one(name: str) -> AbstractContextManager[None]:
    """Nobody else is in here with that name at the same time."""
    return _locked(name, fcntl.LOCK_EX)
