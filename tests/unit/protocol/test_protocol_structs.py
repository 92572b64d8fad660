"""The tables against the header: its facts for 7.45 (abi_7_45.txt), and the installed one, compiled."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from protocol_abi import NUMBERS, STRUCTS

from unionfs.fuse.protocol import flags
from unionfs.fuse.protocol.structs import LAYOUTS, Layout, record_align

INSTALLED = Path("/usr/include/linux/fuse.h")
COMPILER = shutil.which("cc") or shutil.which("gcc")
VARIABLE = {"fuse_dirent": "name"}
"""Fields without a fixed size, at the end of a structure."""


def offsets(layout: Layout) -> dict[str, tuple[int, int]]:
    """Offset and size in bytes of every field; nested ones as `attr.ino`."""
    found, at = {}, 0
    for field in layout.fields:
        size = struct.calcsize("=" + field.code)
        found[field.name] = (at, size)
        at += size
    return found


def fields(layout: Layout) -> dict[str, tuple[int, int]]:
    """The direct fields; a nested structure counts as one."""
    found: dict[str, tuple[int, int]] = {}
    for name, (offset, size) in offsets(layout).items():
        start, _ = found.setdefault(name.partition(".")[0], (offset, size))
        found[name.partition(".")[0]] = (start, offset + size - start)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_names_sizes_and_offsets_are_the_headers(name: str) -> None:
    expected = {field: place for field, place in STRUCTS[name].fields.items() if field != VARIABLE.get(name)}
    assert fields(LAYOUTS[name]) == expected
    assert LAYOUTS[name].size == STRUCTS[name].size


@pytest.mark.parametrize("name", LAYOUTS)
def test_packing_puts_each_value_at_its_offset(name: str) -> None:
    layout = LAYOUTS[name]
    shown = [field for field in layout.fields if not field.skipped]
    values = list(range(1, len(shown) + 1))
    raw = layout.struct.pack(*values)
    assert layout.struct.unpack(raw) == tuple(values)
    assert len(layout.names) == len(shown)
    places = offsets(layout)
    for field, value in zip(shown, values, strict=True):
        offset = places[field.name][0]
        assert raw[offset] == value, "little-endian" if raw[offset] else "big-endian"
    for field in layout.fields:
        if field.skipped:
            offset, size = places[field.name]
            assert not any(raw[offset : offset + size])


def our_name(number: str) -> int | None:
    """Our value for a number of the header, or None."""
    short = number.removeprefix("FUSE_")
    if short.startswith("NOTIFY_") and short.removeprefix("NOTIFY_") in flags.Notify.__members__:
        return flags.Notify[short.removeprefix("NOTIFY_")]
    # An opcode and a flag of INIT never share a name.
    for members in (flags.Init.__members__, flags.Opcode.__members__):
        if short in members:
            return int(members[short])
    value = getattr(flags, short, getattr(flags, number, None))
    return None if value is None else int(value)


@pytest.mark.parametrize("number", [name for name in NUMBERS if our_name(name) is not None])
def test_numbers_are_the_headers(number: str) -> None:
    assert our_name(number) == NUMBERS[number]


def test_no_number_is_ours_alone() -> None:
    plain = [name for name in vars(flags) if name.startswith(("FATTR", "FOPEN", "WRITE", "OPEN", "FSYNC"))]
    assert {name if name in NUMBERS else f"FUSE_{name}" for name in plain} <= NUMBERS.keys()
    for name in (*flags.Init.__members__, *flags.Opcode.__members__):
        assert f"FUSE_{name}" in NUMBERS
    for name in flags.Notify.__members__:
        assert f"FUSE_NOTIFY_{name}" in NUMBERS
    assert flags.SINCE.keys() <= set(flags.Init)
    assert set(flags.SINCE.values()) <= flags.LINUX.keys()


@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
@pytest.mark.skipif(not INSTALLED.exists(), reason=f"there is no {INSTALLED}")
def test_the_installed_header_agrees(tmp_path: Path) -> None:
    """The fields of /usr/include/linux/fuse.h, of any version, match our tables."""
    assert COMPILER is not None
    text = re.sub(r"/\*.*?\*/", "", INSTALLED.read_text(), flags=re.S)
    lines = []
    for name, body in re.findall(r"struct (\w+) \{(.*?)\n\};", text, re.S):
        if name not in LAYOUTS:
            continue
        for field in re.findall(r"(\w+)(?:\[\d+\])?;", body):
            if field != VARIABLE.get(name):
                place = f"offsetof(struct {name}, {field}), sizeof(((struct {name} *)0)->{field})"
                lines.append(f'printf("{name} {field} %zu %zu\\n", {place});')
    program = "#include <stdio.h>\n#include <stddef.h>\n#include <linux/fuse.h>\nint main(void) {%s}\n"
    source, binary = tmp_path / "abi.c", tmp_path / "abi"
    source.write_text(program % "\n".join(lines))
    subprocess.run([COMPILER, "-o", str(binary), str(source)], check=True)
    found = subprocess.run([str(binary)], check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(found) > 100
    # fields that were named later
    renamed = {("fuse_open_in", "unused"), ("fuse_open_out", "padding"), ("fuse_create_in", "padding")}
    renamed |= {
        ("fuse_notify_inval_entry_out", "padding"),
        ("fuse_in_header", "padding"),
        ("fuse_attr", "padding"),
    }
    renamed |= {("fuse_init_out", "unused"), ("fuse_init_in", "unused")}
    for line in found:
        name, field, offset, size = line.split()
        if (name, field) not in renamed:
            assert fields(LAYOUTS[name])[field] == (int(offset), int(size)), line


def test_record_align() -> None:
    assert [record_align(size) for size in (0, 1, 7, 8, 9)] == [0, 8, 8, 8, 16]
