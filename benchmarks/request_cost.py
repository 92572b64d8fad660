"""The cost of the direct session's loop per request: unwatched, and while somebody watches.

    python -m benchmarks.request_cost [--requests N] [--rounds N]

No mount and no kernel: the same GETATTR is "read" repeatedly, its handler returns a prepared answer, and that
is written to /dev/null. Prints the CPU time per request in nanoseconds, best and median of the rounds.
"""

from __future__ import annotations

import argparse
import errno
import os
import statistics
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Sequence

import trio

from unionfs.fuse.direct.device import Device
from unionfs.fuse.direct.loop import Loop
from unionfs.fuse.protocol import Init, Opcode, Privileges, Settings, encode, negotiate
from unionfs.fuse.protocol.requests import InitRequest
from unionfs.union.layers import LayerStack
from unionfs.union.tree import Union

_HEADER = struct.Struct("=IIQQIIIHH")  # struct fuse_in_header


def _loop(device: Device, union: Union, *, watched: bool) -> Loop:
    offered = InitRequest.of(major=7, minor=45, max_readahead=1 << 17, flags=int(sum(Init)))
    decision = negotiate(offered, Settings(), Privileges(initial_user_namespace=True, sys_admin=True))
    answers = {Opcode.GETATTR: lambda request: encode.ok(request.unique)}
    if not watched:
        return Loop(device, decision, union, Counter(), answers, {})
    from unionfs.fuse.latency import Latencies

    latencies = Latencies()
    loop = Loop(device, decision, union, Counter(), answers, {}, latencies)
    latencies.watch(3600)
    return loop


def _measure(device: Device, union: Union, requests: int, *, watched: bool) -> float:
    """Nanoseconds of CPU time per request."""
    loop = _loop(device, union, watched=watched)
    message = _HEADER.pack(_HEADER.size + 16, int(Opcode.GETATTR), 1, 1, 0, 0, 1, 0, 0) + bytes(16)
    loop._buffer[: len(message)] = message
    size, left = len(message), requests

    def readv(fd: int, buffers: Sequence[bytearray]) -> int:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENODEV, "")
        left -= 1
        return size

    original, os.readv = os.readv, readv  # type: ignore[assignment]
    try:
        began = time.process_time_ns()
        trio.run(loop.run)
        return (time.process_time_ns() - began) / requests
    finally:
        os.readv = original


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--unwatched-only", action="store_true")
    arguments = parser.parse_args()
    ways = {"nobody watches": False, "watched": True}
    if arguments.unwatched_only:
        del ways["watched"]
    device = Device(os.open(os.devnull, os.O_WRONLY))
    times: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as lower:
        stack = LayerStack.open([lower], None, None)
        try:
            union = Union(stack)
            for _ in range(arguments.rounds):
                for name, watched in ways.items():
                    times[name].append(_measure(device, union, arguments.requests, watched=watched))
        finally:
            stack.close()
            device.close()
    for name, found in times.items():
        print(f"{name:15} best {min(found):7.0f} ns, median {statistics.median(found):7.0f} ns per request")


if __name__ == "__main__":
    main()
