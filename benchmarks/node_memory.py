"""What an inode that the kernel knows costs the daemon: bytes of memory, and the time of its first lookup.

    python -m benchmarks.node_memory [INODES]

No mount and no kernel FUSE: a union of one lower, in /dev/shm, with 1,000 files a directory, each looked up
once (1,000,000 by default; the lower needs about 1 KiB of memory for each). The memory is the growth of the
resident set, so the hash tables, the names and what the allocators keep are included. Requires root.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from pathlib import Path

from unionfs.union.layers import LayerStack
from unionfs.union.tree import Union

_IN_A_DIRECTORY = 1000


def _resident() -> int:
    """The bytes of the process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _fill(lower: Path, directories: int) -> None:
    for number in range(directories):
        directory = lower / f"d{number:04}"
        directory.mkdir()
        for file in range(_IN_A_DIRECTORY):
            (directory / f"file{file:05}").touch()


def _look_up_all(union: Union, directories: int) -> None:
    root = union.nodes.root
    for number in range(directories):
        found = union.lookup(root, b"d%04d" % number)
        assert found is not None
        directory = found[0]
        directory.looked_up()
        for file in range(_IN_A_DIRECTORY):
            found = union.lookup(directory, b"file%05d" % file)
            assert found is not None
            found[0].looked_up()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("inodes", type=int, nargs="?", default=1_000_000)
    directories = max(parser.parse_args().inodes // _IN_A_DIRECTORY, 1)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as home:
        lower, upper, work = (Path(home) / name for name in ("lower", "upper", "work"))
        for path in (lower, upper, work):
            path.mkdir()
        _fill(lower, directories)
        stack = LayerStack.open([str(lower)], str(upper), str(work))
        union = Union(stack)
        gc.collect()
        before, began = _resident(), time.perf_counter()
        _look_up_all(union, directories)
        took, grown, nodes = time.perf_counter() - began, _resident() - before, len(union.nodes)
        print(f"{nodes} inodes: {grown / nodes:.0f} bytes and {took / nodes * 1e6:.1f} µs each")
        union.close()
        stack.close()


if __name__ == "__main__":
    main()
