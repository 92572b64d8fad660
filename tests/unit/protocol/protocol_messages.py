"""Messages for the tests: real ones (golden_6_18.txt), and hypothesis strategies for generated ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from hypothesis import strategies as st
from protocol_abi import NUMBERS, STRUCTS

from unionfs.fuse.protocol import decoder
from unionfs.fuse.protocol.request import Request


def golden() -> dict[str, bytes]:
    """Messages sent by Linux 6.18, by class of the request."""
    lines = Path(__file__).with_name("golden_6_18.txt").read_text().splitlines()
    return {
        kind: bytes.fromhex(raw) for kind, raw in (line.split() for line in lines if not line.startswith("#"))
    }


GOLDEN: Final = golden()


def number(value: int, size: int) -> bytes:
    """An unsigned number in host order."""
    return value.to_bytes(size, sys.byteorder)


def message(
    opcode: int, body: bytes, *, unique: int = 1, nodeid: int = 2, extlen: int = 0, length: int = -1
) -> bytes:
    """A message built from the header's offsets, not from our tables."""
    header = STRUCTS["fuse_in_header"]
    values = {
        "len": header.size + len(body) if length < 0 else length,
        "opcode": opcode,
        "unique": unique,
        "nodeid": nodeid,
        "uid": 3,
        "gid": 4,
        "pid": 5,
        "total_extlen": extlen,
    }
    raw = bytearray(header.size)
    for name, value in values.items():
        offset, size = header.fields[name]
        raw[offset : offset + size] = number(value, size)
    return bytes(raw) + body


def decode(raw: bytes, setxattr_ext: bool = True) -> Request:
    """Decode one message from a larger buffer with the rest of another one, as in a session."""
    agreed = NUMBERS["FUSE_SETXATTR_EXT"] if setxattr_ext else 0
    return decoder(agreed)(memoryview(raw + b"\xff" * 64), len(raw))


OPCODES: Final = st.sampled_from([*range(56), 4096, 1 << 31, 1 + (1 << 8)])

MESSAGES: Final = st.one_of(
    # a valid header, followed by anything
    st.builds(message, OPCODES, st.binary(max_size=200), extlen=st.integers(0, 8)),
    # real messages, damaged
    st.builds(
        lambda raw, at, byte, cut: (raw[: at % len(raw)] + byte + raw[at % len(raw) + 1 :])[: cut or None],
        st.sampled_from(sorted(GOLDEN.values())),
        st.integers(0, 600),
        st.binary(min_size=1, max_size=1),
        st.integers(-20, 0),
    ),
    st.binary(max_size=200),
)
