"""The inputs of scripts/fuzz. Anything but an answer, or a request that is left to Python, is an error."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import random
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.unit.test_core_answers import Modes, Mount, message
from unionfs.core.node import Node
from unionfs.core.reads import SPLICED
from unionfs.fuse.protocol import Opcode
from unionfs.union.layers import LayerStack
from unionfs.union.tree import Union

NAMES = (
    b"d", b"f", b"link", b"large", b"meta", b"absent", b".", b"..", b".wh.f", b"", b"a/b", b"n" * 256,
    b"\xff",
)  # fmt: skip
XATTRS = (b"security.capability", b"system.posix_acl_access", b"user.x", b"")
NUMBERS = (0, 1, 2, 63, 64, 255, 4096, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
#: How often each request comes: with many FORGETs there would be no nodes.
OPCODES = {
    Opcode.LOOKUP: 8, Opcode.GETATTR: 3, Opcode.READLINK: 2, Opcode.OPEN: 5, Opcode.RELEASE: 3,
    Opcode.GETXATTR: 2, Opcode.FORGET: 1, Opcode.BATCH_FORGET: 1, Opcode.READDIR: 2, Opcode.READDIRPLUS: 3,
    Opcode.READ: 4, Opcode.STATFS: 1, Opcode.SETATTR: 4, Opcode.CREATE: 2, Opcode.MKDIR: 1, Opcode.UNLINK: 1,
    Opcode.RMDIR: 1, Opcode.RENAME: 1, Opcode.RENAME2: 1, Opcode.LISTXATTR: 1,
}  # fmt: skip
#: Bits of fuse_setattr_in.valid; most files remain small, and accessible.
FATTRS = (0, 1, 2, 4, 6, 7, 8, 16, 32, 48, 64, 0x1B0, 0x420, 0x806, 0x807, 0x80E, 2**32 - 1)
#: A new union after so many, since most nodes are soon forgotten or their files are open.
MESSAGES = 5000


def mutated(source: random.Random, data: bytes) -> bytes:
    """The bytes with up to three changes."""
    changed = bytearray(data)
    for _ in range(source.choice((0, 0, 1, 1, 2, 3))):
        at = source.randrange(len(changed) + 1)
        match source.randrange(5):
            case 0 if changed:
                changed[at % len(changed)] = source.randrange(256)
            case 1:
                del changed[at:]
            case 2:
                changed[at:at] = source.randbytes(source.randrange(20))
            case 3:
                width = source.choice((2, 4, 8))
                number = source.choice(NUMBERS) & ((1 << 8 * width) - 1)
                changed[at : at + width] = number.to_bytes(width, "little")
            case _:
                del changed[at : at + source.randrange(9)]
    return bytes(changed)


# -- requests -----------------------------------------------------------------------------------------------


def request(source: random.Random, nodes: list[Node], handles: int) -> bytes:
    """A request, valid or nearly so."""
    (opcode,) = source.choices(list(OPCODES), list(OPCODES.values()))
    node = source.choice(nodes)
    number = source.choice(NUMBERS) if source.random() < 0.1 else node.id
    match opcode:
        case Opcode.LOOKUP:
            body = source.choice(NAMES) + b"\0"
        case Opcode.GETATTR:
            body = bytes(16)
        case Opcode.OPEN:
            body = struct.pack("=II", source.choice((0, 0, 0, os.O_RDWR, os.O_TRUNC)), 0)
        case Opcode.RELEASE:
            body = struct.pack("=QIIQ", source.randrange(handles + 2), 0, 0, 0)
        case Opcode.GETXATTR:
            body = struct.pack("=II", source.choice((0, 1, 4096)), 0) + source.choice(XATTRS) + b"\0"
        case Opcode.LISTXATTR:
            body = struct.pack("=II", source.choice((0, 1, 4096)), 0)
        case Opcode.READDIR | Opcode.READDIRPLUS:
            offset = source.choice((0, 0, 1, 2, source.randrange(1 << 31), source.choice(NUMBERS)))
            body = struct.pack("=QQI20x", 0, offset, source.choice((0, 24, 152, 200, 4096, 1 << 20)))
        case Opcode.READ:
            size = source.choice((0, 1, 4096, SPLICED - 1, SPLICED))
            body = struct.pack(
                "=QQI20x", source.choice((0, source.randrange(handles + 2))), source.choice(NUMBERS), size
            )
        case Opcode.SETATTR:
            body = setattr_body(source, handles)
        case Opcode.CREATE:
            body = struct.pack("=IIII", source.randrange(3), 0o100600, 0, 0) + source.choice(NAMES) + b"\0"
        case Opcode.MKDIR:
            body = struct.pack("=II", 0o700, 0) + source.choice(NAMES) + b"\0"
        case Opcode.UNLINK | Opcode.RMDIR:
            body = source.choice(NAMES) + b"\0"
        case Opcode.RENAME | Opcode.RENAME2:
            body = struct.pack("=Q", source.choice(nodes).id) + bytes(8 if opcode is Opcode.RENAME2 else 0)
            body += source.choice(NAMES) + b"\0" + source.choice(NAMES) + b"\0"
        case Opcode.FORGET:
            lookups = node.lookups & (2**64 - 1)
            body = struct.pack("=Q", source.choice((1, 2, lookups, source.choice(NUMBERS))))
        case Opcode.BATCH_FORGET:
            some = [source.choice(nodes) for _ in range(source.randrange(4))]
            body = struct.pack("=II", len(some), 0) + b"".join(struct.pack("=QQ", one.id, 1) for one in some)
        case _:
            body = b""
    given = message(opcode, number, body)
    changed = mutated(source, given)
    if changed != given and source.random() < 0.8:  # with its length, or nothing more is looked at
        changed = struct.pack("=I", len(changed)) + changed[4:]
    return changed


def setattr_body(source: random.Random, handles: int) -> bytes:
    """struct fuse_setattr_in."""
    size = source.choice((0, 1, 4096, 70_000, source.choice(NUMBERS)))
    seconds = [source.choice(NUMBERS) & (2**63 - 1) for _ in range(2)]
    nanoseconds = [source.choice((0, 999_999_999, 10**9, (1 << 30) - 1, (1 << 30) - 2)) for _ in range(2)]
    owner = [source.choice((0, 7, 2**32 - 1)) for _ in range(2)]
    return struct.pack(
        "=IIQQQqqQIIIIIIII", source.choice(FATTRS), 0, source.randrange(handles + 2), size, 0, *seconds, 0,
        *nanoseconds, 0, source.choice((0, 0o644, 0o104755, 0o41777, 2**32 - 1)), 0, *owner, 0,
    )  # fmt: skip


class Raises(logging.Handler):
    """A request that fails by another exception than OSError is answered, and logged."""

    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage()) from (record.exc_info[1] if record.exc_info else None)


def make_layers(home: Path) -> None:
    (home / "lower/d").mkdir(parents=True)
    (home / "upper").mkdir()
    (home / "work").mkdir()
    (home / "lower/d/f").write_bytes(b"data")
    (home / "lower/f").write_bytes(b"data")
    (home / "lower/large").write_bytes(bytes(100_001))
    (home / "lower/link").symlink_to("target")
    (home / "lower/meta").write_bytes(b"")
    os.setxattr(home / "lower/meta", "user.overlay.metacopy", b"")


def fuzz_wire(source: random.Random, until: float) -> int:
    """Requests to one union after the other. Returns their number."""
    sent = 0
    logging.getLogger("unionfs.core.answers").addHandler(Raises())
    while time.monotonic() < until:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as home:
            make_layers(Path(home))
            layers = [str(Path(home) / name) for name in ("lower", "upper", "work")]
            stack = LayerStack.open(layers[:1], *layers[1:], userxattr=True)
            union = Union(stack)
            mount = Mount(union)
            mount.serve(Modes(mount.gone), has_acls=True)
            for _ in range(MESSAGES):
                nodes = sorted(union.nodes, key=lambda node: node.id)
                ask(mount, request(source, nodes, mount.handles.next))
            sent += MESSAGES
            for number in range(1, mount.handles.next):
                mount.answers.take(message(Opcode.RELEASE, 1, struct.pack("=QIIQ", number, 0, 0, 0)))
            mount.close()
            union.close()
            stack.close()
    return sent


def ask(mount: Mount, given: bytes) -> None:
    """Answer one request; the answer is about it and has the length that it states."""
    try:
        mount.answers.take(given)
        while True:
            answer = mount.kernel.recv(1 << 20)
            assert struct.unpack_from("=I", answer)[0] == len(answer), answer
    except BlockingIOError:
        return
    except BaseException:
        print("after the request", given.hex(), flush=True)
        raise


# -- records of directories ---------------------------------------------------------------------------------


def records(source: random.Random) -> bytes:
    """What getdents64(2) returns: struct linux_dirent64 (fs/readdir.c) for each name."""
    found = b""
    for _ in range(source.randrange(8)):
        name = source.choice((*NAMES, source.randbytes(source.randrange(40)))) + b"\0"
        size = 19 + len(name)
        padded = size + -size % 8
        found += struct.pack("=QQHB", source.choice(NUMBERS), 0, padded, source.randrange(16)) + name
        found += bytes(padded - size)
    return found


def fuzz_listing(source: random.Random, until: float) -> int:
    """Records to one listing after the other. Returns the number of blocks."""
    if importlib.util.find_spec("unionfs.core.entries") is None:
        print("this core does not parse records")
        return 0
    Entries = importlib.import_module("unionfs.core.entries").Entries
    Place, root = importlib.import_module("unionfs.core.places").Place, os.open("/", os.O_PATH)
    layer = importlib.import_module("unionfs.core.places").Layer(0, "/", root, is_upper=False)
    parts = [Place(layer, layer.root, name) for name in (b"one", b"two")]
    done = 0
    while time.monotonic() < until:
        entries = Entries(parts)
        for _ in range(source.randrange(1, 6)):
            block = mutated(source, records(source)) if source.random() < 0.9 else source.randbytes(200)
            done += 1
            try:
                entries.add_records(source.randrange(2), block, whiteouts_by_name=source.random() < 0.5)
            except OSError:
                continue
            except BaseException:
                print("after the records", block.hex(), flush=True)
                raise
        entries.order()
        names = entries.names()
        assert all(name and b"/" not in name and b"\0" not in name for name in names), names
    os.close(root)
    return done


TARGETS: dict[str, Callable[[random.Random, float], int]] = {"wire": fuzz_wire, "listing": fuzz_listing}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", default=str(time.time_ns()))
    parser.add_argument("target", nargs="?", choices=sorted(TARGETS))
    arguments = parser.parse_args()
    for name in [arguments.target] if arguments.target else TARGETS:
        print(f"{name}, --seed {arguments.seed}", flush=True)
        done = TARGETS[name](random.Random(f"{name} {arguments.seed}"), time.monotonic() + arguments.seconds)
        print(f"{name}: {done} inputs, no error", flush=True)


if __name__ == "__main__":
    main()
