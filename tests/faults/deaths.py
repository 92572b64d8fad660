"""Deaths of daemons whose mount outlives them: at each system call of an operation, and before each answer.

The caller gets success, and the directory is the new one, also as the kernel remembers it: as if nothing had
happened.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from tests.faults.batch import Batch, Case, Layers, Report
from tests.faults.injecting import Injector
from tests.support import areas, mounting
from tests.support.mounting import Mount
from tests.support.patience import patient
from tests.support.worker import REPOSITORY
from unionfs.daemon import live
from unionfs.sys import calls
from unionfs.sys.process import wait_gone

_SECONDS: Final = patient(30)
_DONT_SYNC: Final = 0x4000  # AT_STATX_DONT_SYNC, include/uapi/linux/fcntl.h
_PLAIN: Final = "from tests.support.prepared import take_no_shortcuts; take_no_shortcuts()\n" \
    "from unionfs.cli.main import main; main()"
_NLINK: Final = 4  # STATX_NLINK; the field is at byte 16


def resends() -> bool:
    """Whether the kernel sends requests again, which a mount that outlives its daemon needs."""
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2]) >= (6, 9)


class Deaths(Batch):
    """Cases on one mount, which outlives all its daemons."""

    def run(self) -> Report:
        with _outliving(self._layers, self._session, self._options) as mount:
            for case in self._cases:
                self._die(case, mount)
        self._at_rest()
        return self._report()

    def _die(self, case: Case, mount: Mount) -> None:
        top = f"{mount.mountpoint}/{case.directory}"
        mount.pid = _serving(mount.mountpoint).pid
        with Injector(mount.pid, answers=True) as injector:
            self._act(case, top, mount, injector)
        if case.error is not None:
            case.blame(f"the caller got {case.error}")
        for name, known, links in _links(top):
            # The kernel refuses to link a file of which it knows no name (fs/namei.c, vfs_link).
            if known == 0:
                case.blame(f"the kernel knows {known} links of {name}, which has {links}")
        self._judge(case, top)


def _links(top: str) -> Iterator[tuple[str, int, int]]:
    """The names of non-directories there, the links that the kernel remembers, and those that there are."""
    for path, _, names in os.walk(top):
        for name in names:
            where = os.fsencode(os.path.join(path, name))
            flags = calls.AT_SYMLINK_NOFOLLOW | _DONT_SYNC
            known = struct.unpack_from("=I", calls.statx(calls.AT_FDCWD, where, flags, _NLINK), 16)[0]
            yield name, known, os.lstat(where).st_nlink


@contextlib.contextmanager
def _outliving(layers: Layers, session: str, options: Sequence[str]) -> Iterator[Mount]:
    """A mount with a holder; the daemons may die as often as they like."""
    top = layers.place / "merged"
    top.mkdir(exist_ok=True)
    program = [sys.executable, "-c", _PLAIN] if session.endswith(mounting.PLAIN) else mounting.command()
    io = session.removeprefix("direct-").removesuffix(mounting.PLAIN)
    words: list[str | Path] = [
        *program, "mount", "-l", layers.lower, "-u", layers.upper, "-w", layers.work,
        "-o", ",".join(["outlive", *options]), "--session", "direct", "--io", io, top,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "UNIONFS_DEATHS": "0"}
    subprocess.run(words, check=True, env=environment, timeout=_SECONDS)
    try:
        yield Mount(top, _serving(top).pid, [layers.lower], layers.upper, layers.work, session)
        last = _serving(top)
        # Other mount namespaces may have copies.
        subprocess.run([*mounting.command(), "umount", "--lazy", top], check=True, timeout=_SECONDS)
        assert wait_gone(last.pid, last.started, _SECONDS)
    finally:
        areas.detach(top)


def _serving(top: Path) -> live.LiveMount:
    """The daemon that serves the mount, when there is one with a holder."""
    deadline = time.monotonic() + _SECONDS
    while True:
        for entry in live.live_mounts():
            if entry.settings.mountpoint == str(top) and entry.holder is not None:
                return entry
        assert time.monotonic() < deadline, "no daemon took over"
        time.sleep(0.005)
