"""One side of the comparison: its layers, its mount, and a worker for each identity."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.oracle import layers, operations
from tests.support import mounting
from tests.support.mounting import Mount
from tests.support.worker import Worker

NLINK = "trusted.overlay.nlink"
"""The xattr of files in the index (fs/overlayfs/util.c, ovl_set_nlink_upper)."""


def arena_name(index: int) -> str:
    """The directory of one arena."""
    return f"arena-{index:02}"


@dataclass
class Layers:
    """The layers in a directory: lowers, uppers that have become lowers, and the upper with its work."""

    home: Path
    count: int
    pushed: int = 0

    @property
    def first(self) -> list[Path]:
        """The lowers of the beginning, topmost first."""
        return [self.home / f"lower{index}" for index in range(1, self.count + 1)]

    @property
    def lowers(self) -> list[Path]:
        """All lowers, topmost first."""
        return [*(self.home / f"upper{index}" for index in reversed(range(self.pushed))), *self.first]

    @property
    def upper(self) -> Path:
        return self.home / f"upper{self.pushed}"

    @property
    def work(self) -> Path:
        return self.home / f"work{self.pushed}"

    def empty(self) -> None:
        """Remove all uppers and make an empty one."""
        for index in range(self.pushed + 1):
            shutil.rmtree(self.home / f"upper{index}", ignore_errors=True)
            shutil.rmtree(self.home / f"work{index}", ignore_errors=True)
        self.pushed = 0
        self._make()

    def push(self) -> None:
        """Put an empty upper on top."""
        self.pushed += 1
        self._make()

    def _make(self) -> None:
        self.upper.mkdir()
        self.work.mkdir()

    def build(self, arenas: int) -> None:
        """Create the lowers, with all arenas."""
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()
        for lower in self.first:
            lower.mkdir()
        for index in range(arenas):
            layers.build([lower / arena_name(index) for lower in self.first])


@dataclass
class Side:
    """One of the two. ``home`` is where it mounts; the other side's ``layers`` may be those mounted."""

    name: str
    home: Path
    layers: Layers
    options: Sequence[str] = ()
    mount: Mount | None = None
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    workers: dict[str, Worker] = field(default_factory=dict)

    def open(self, session: str) -> None:
        """Mount with an empty upper and start missing workers."""
        self.layers.empty()
        self.enter(session)
        for who, (uid, gid, groups) in operations.IDENTITIES.items():
            if who not in self.workers or not self.workers[who].alive:
                self.workers[who] = Worker(uid, gid, groups, modules=["tests.oracle.operations"])

    def enter(self, session: str) -> Mount:
        """Mount the layers with their present content; ``leave`` undoes it."""
        self.mount = self.stack.enter_context(self._mounted(session, self.home))
        return self.mount

    def _mounted(self, session: str, home: Path) -> contextlib.AbstractContextManager[Mount]:
        lowers, upper, work, options = self.layers.lowers, self.layers.upper, self.layers.work, self.options
        if session == "kernel":
            return mounting.kernel_mounted(home, lowers=lowers, upper=upper, work=work, options=options)
        return mounting.mounted(
            home, lowers=lowers, upper=upper, work=work, options=options, session=session
        )  # fmt: skip

    def read_by(self, session: str, home: Path) -> contextlib.AbstractContextManager[Mount]:
        """All layers as lowers, without an upper."""
        lowers = [self.layers.upper, *self.layers.lowers]
        if session == "kernel":
            return mounting.kernel_mounted(home, lowers=lowers, name="cross", options=self.options)
        return mounting.mounted(home, lowers=lowers, session=session, name="cross", options=self.options)

    def leave(self) -> None:
        """Unmount; raises MountFailed if the daemon does not end correctly."""
        for worker in self.workers.values():
            if worker.alive:
                worker.call(operations.end)
        self.mount = None
        self.stack.close()

    def destroy(self) -> None:
        """End everything by force."""
        if self.mount is not None:
            mounting.destroy(self.mount)
        for worker in self.workers.values():
            worker.kill()
            worker.close()
        self.workers.clear()
        self.mount = None
        with contextlib.suppress(AssertionError, OSError):
            self.stack.close()

    def has(self, arena: str, path: bytes) -> os.stat_result | None:
        """The attributes of what the upper has at a path of the arena, None without."""
        try:
            return os.lstat(os.path.join(os.fsencode(self.layers.upper / arena), path))
        except OSError:
            return None

    def was_indexed(self, arena: str, path: bytes) -> bool:
        """Whether the upper's file at that path has, or had, an entry in the index."""
        try:
            where = os.path.join(os.fsencode(self.layers.upper / arena), path)
            os.getxattr(where, NLINK, follow_symlinks=False)
        except OSError:
            return False
        return True

    def has_index_entries(self) -> bool:
        """Whether there is a file in the index."""
        index = self.layers.work / "index"
        return index.exists() and any(index.iterdir())
