"""Prints the cost of decoding and encoding, in nanoseconds: `python protocol_timing.py`. Not asserted."""

from __future__ import annotations

import functools
import os
import stat
import time
import timeit

from protocol_abi import STRUCTS
from protocol_messages import GOLDEN, message, number
from protocol_reference import Dirents, attributes_of

from unionfs.fuse.protocol import FOREVER, Opcode, decoder, encode


def measure(what: str, statement: object) -> None:
    """Print the best of several runs."""
    assert callable(statement)
    timer = timeit.Timer(statement, timer=time.process_time)
    count, _ = timer.autorange()
    print(f"{min(timer.repeat(5, count)) / count * 1e9:8.0f} ns  {what}")


def main() -> None:
    """Measure every step of a request on the fast path."""
    decode = decoder()
    body = bytearray(STRUCTS["fuse_write_in"].size)
    at, size = STRUCTS["fuse_write_in"].fields["size"]
    body[at : at + size] = number(1 << 20, size)
    messages = {
        kind: GOLDEN[kind]
        for kind in ("Lookup", "Getattr", "Read", "Readdirplus", "Open", "Forget", "Create")
    }
    messages["Write of 1 MiB"] = message(Opcode.WRITE, bytes(body) + bytes(1 << 20))
    for kind, raw in messages.items():
        buffer = bytearray(raw) + bytes(4096)
        view = memoryview(buffer)
        measure(f"decode {kind}", functools.partial(decode, view, len(raw)))
    raw = GOLDEN["Lookup"]
    view = memoryview(bytearray(raw) + bytes(4096))
    st = os.stat("/")
    attr = attributes_of(st, 1)
    entry = encode.entry_out(5, 0, FOREVER, FOREVER, attr)
    data = memoryview(bytearray(1 << 20))
    measure("encode entry", lambda: encode.entry(1, 5, 0, FOREVER, FOREVER, attr))
    measure("encode attr", lambda: encode.attr(1, FOREVER, attr))
    measure("encode opened", lambda: encode.opened(1, 5, 2))
    measure("encode data of 1 MiB", lambda: encode.data(1, data))
    measure("encode error", lambda: encode.error(1, 2))
    measure("attributes_of a stat", lambda: attributes_of(st, 1))
    measure(
        "decode Lookup + encode entry",
        lambda: (decode(view, len(raw)), encode.entry(1, 5, 0, FOREVER, FOREVER, attr)),
    )
    listing, plus = Dirents(1 << 62), Dirents(1 << 62)
    measure("Dirents.add", lambda: listing.add(b"a-usual-name", 7, 1, stat.S_IFREG))
    measure("Dirents.add_plus", lambda: plus.add_plus(b"a-usual-name", 7, 1, stat.S_IFREG, entry))


if __name__ == "__main__":
    main()
