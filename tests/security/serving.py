"""Starts the FUSE servers of tests, which are programs beside them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.syscalls import umount


@contextmanager
def serving(server: Path, place: Path) -> Iterator[subprocess.Popen[str]]:
    """A server that has mounted its filesystem at ``place``, a new directory; both end with the context."""
    place.mkdir()
    with subprocess.Popen([sys.executable, server, place], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "up\n"
            yield child
        finally:
            umount(place, 2)  # MNT_DETACH
            child.kill()
