"""How late other tasks of the daemon run while clients keep the direct session busy.

    python benchmarks/loop_fairness.py [--seconds S] [--clients N] [--io MODE]

This process serves a union over /dev/shm, next to a task that is due every millisecond. Each client is a
process that walks the tree and reads its files. Prints how late the task ran: median, 99th percentile and
worst, in milliseconds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import trio

from unionfs.fuse.direct.mounting import MountOptions
from unionfs.fuse.operations import Operations
from unionfs.fuse.protocol import IoMode
from unionfs.fuse.session_direct import serve
from unionfs.sys.mountinfo import mounted_at
from unionfs.sys.unmount import unmount
from unionfs.union.layers import LayerStack
from unionfs.union.tree import Union

_CLIENT = """
import os, sys, time
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    for base, _, names in os.walk(sys.argv[1]):
        for name in names:
            fd = os.open(os.path.join(base, name), os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.read(fd, 65536)
            os.close(fd)
"""


async def _measure(root: Path, io: IoMode, clients: int, seconds: float) -> tuple[list[float], int]:
    stack = LayerStack.open([str(root / "lower")], str(root / "upper"), str(root / "work"))
    operations = Operations(Union(stack))
    options = MountOptions("unionfs", "unionfs", True, False, (), ())
    late: list[float] = []
    ready = trio.Event()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                serve, operations, str(root / "merged"), options, io, lambda *_: ready.set()
            )
            await ready.wait()
            command = [sys.executable, "-c", _CLIENT, str(root / "merged"), str(seconds)]
            async with trio.open_nursery() as busy:
                for _ in range(clients):
                    busy.start_soon(trio.run_process, command)
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    wanted = time.perf_counter() + 0.001
                    await trio.sleep(0.001)
                    late.append((time.perf_counter() - wanted) * 1000)
            await trio.to_thread.run_sync(_unmount, root / "merged")
    finally:
        stack.close()
    return late, sum(operations.requests.values())


def _unmount(path: Path) -> None:
    mount = mounted_at(str(path))
    if mount is not None:
        unmount(mount, lazy=True)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--io", type=IoMode, default=IoMode.HYBRID, choices=list(IoMode))
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="unionfs-fairness-", dir="/dev/shm"))
    try:
        for name in ("upper", "work", "merged"):
            (root / name).mkdir()
        for index in range(2000):
            path = root / f"lower/d{index % 50}/f{index}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x" * 16384)
        os.umask(0)
        late, requests = trio.run(_measure, root, arguments.io, arguments.clients, arguments.seconds)
    finally:
        _unmount(root / "merged")
        shutil.rmtree(root, ignore_errors=True)
    late.sort()
    print(
        f"{arguments.clients} clients, {requests} requests, {len(late)} ticks late by: median "
        f"{statistics.median(late):.2f} ms, p99 {late[int(len(late) * 0.99)]:.2f} ms, worst {late[-1]:.2f} ms"
    )


if __name__ == "__main__":
    main()
