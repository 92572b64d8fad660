"""ACLs in archives: the same text as getfacl(1) prints, and the same value as setfacl(1) sets."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest

from unionfs.storage.archive import acl
from unionfs.sys.attributes import ACL_ACCESS

TEXTS = [
    "user::rwx\nuser:7:r--\ngroup::r-x\nmask::r-x\nother::---\n",
    "user::rw-\nuser:7:rwx\nuser:4294967294:--x\ngroup::---\ngroup:8:-w-\ngroup:9:r-x\nmask::rwx\nother::r--\n",
    "user::---\ngroup::-wx\ngroup:0:rw-\nmask::rw-\nother::--x\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_as_the_tools_have_it(area: Path, text: str) -> None:
    file = area / "f"
    file.touch()
    subprocess.run(["setfacl", "--set-file=-", file], input=text, text=True, check=True)
    shown = subprocess.run(["getfacl", "-ncpE", file], capture_output=True, text=True, check=True).stdout
    value = os.getxattr(file, ACL_ACCESS)
    assert acl.to_text(value).decode() == shown.rstrip("\n") + "\n" == text
    assert acl.from_text(text.encode()) == value
    assert acl.from_text(text.replace("\n", ",").encode()) == value


@pytest.mark.parametrize(
    "text",
    [
        b"user::rwxx",
        b"user::rw",
        b"user:",
        b"user:root:rwx",
        b"mask:1:rwx",
        b"other:1:rwx",
        b"owner::rwx",
        b"user:-1:rwx",
        b"user:1:2:rwx",
        b":1:rwx",
    ],
)
def test_lines_that_are_none(text: bytes) -> None:
    with pytest.raises(ValueError, match="not an entry of an ACL"):
        acl.from_text(b"user::rwx\n" + text + b"\n")


@pytest.mark.parametrize(
    "value",
    [
        b"",
        struct.pack("<I", 1),
        struct.pack("<IH", 2, 1),
        struct.pack("<IHHI", 2, 0x03, 7, 0),
        struct.pack("<IHHI", 2, 0x01, 8, 0),
        struct.pack("<IHHI", 3, 0x01, 7, 0),
    ],
)
def test_values_that_are_none(value: bytes) -> None:
    with pytest.raises(ValueError, match="no POSIX ACL"):
        acl.to_text(value)
    assert acl.to_text(struct.pack("<I", 2)) == b"\n"
