"""The header's facts (abi_7_45.txt), read for the tests: names, sizes and offsets that we did not type."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final


@dataclass
class Struct:
    """A structure of the header; `fields` maps a name to (offset, size) in bytes."""

    size: int
    fields: dict[str, tuple[int, int]] = field(default_factory=dict)

    def flat(self) -> dict[str, tuple[int, int]]:
        """The fields, with those of the nested fuse_file_lock in place of `lk`: the one a request has."""
        found: dict[str, tuple[int, int]] = {}
        for name, (offset, size) in self.fields.items():
            if name == "lk":
                lock = STRUCTS["fuse_file_lock"].fields.items()
                found |= {f"lk.{inner}": (offset + at, length) for inner, (at, length) in lock}
            else:
                found[name] = (offset, size)
        return found


STRUCTS: Final[dict[str, Struct]] = {}
NUMBERS: Final[dict[str, int]] = {}


def _read() -> None:
    struct = Struct(0)
    for line in Path(__file__).with_name("abi_7_45.txt").read_text().splitlines():
        words = line.split()
        if line.startswith("#"):
            continue
        if "=" in words:
            NUMBERS[words[0]] = int(words[2])
        elif line.startswith("  "):
            struct.fields[words[0]] = (int(words[1]), int(words[2]))
        else:
            struct = STRUCTS[words[0]] = Struct(int(words[1]))


_read()
