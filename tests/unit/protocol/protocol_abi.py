"""The header's facts (abi_7_45.txt), parsed for the tests: names, sizes and offsets not typed by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final


@dataclass
class Struct:
    """A structure of the header; `fields` maps a name to (offset, size) in bytes."""

    size: int
    fields: dict[str, tuple[int, int]] = field(default_factory=dict)


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
