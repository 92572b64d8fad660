"""The xattr with owner, mode and type, and the names of xattrs in such a layer."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from unionfs.union.attributes import replaced
from unionfs.union.markers import Markers
from unionfs.union.permissions import (
    CONTAINERS,
    PRIVILEGED,
    USER,
    Permissions,
    parse,
    shown_names,
    stored_name,
    value_of,
)

CAPABILITY = b"security.capability"
MARKERS = Markers(b"user.overlay.")


def _like(path: Path, mode: int, size: int = 0) -> os.stat_result:
    return replaced(path.stat(), {stat.ST_MODE: mode, stat.ST_UID: 7, stat.ST_GID: 8, stat.ST_SIZE: size})


@pytest.mark.parametrize(
    ("value", "mode", "owner", "device"),
    [
        # as containers/storage, fuse-overlayfs 1.10, 1.16 and this program write it
        (b"0:5:04755:file", 0o104755, (0, 5), (0, 0)), (b"1:2:600", 0o100600, (1, 2), (0, 0)),
        (b"1:2:100640", 0o100640, (1, 2), (0, 0)), (b"4294967294:0:0", 0o100000, (4294967294, 0), (0, 0)),
        (b"-1:5:644", 0o100644, (65534, 5), (0, 0)), (b"0:6:0660:block-8-300", 0o060660, (0, 6), (8, 300)),
        (b"0:0:666:char-1-3", 0o020666, (0, 0), (1, 3)), (b"0:0:666:char1-3", 0o020666, (0, 0), (1, 3)),
        (b"0:0:622:pipe", 0o010622, (0, 0), (0, 0)), (b"0:0:777:socket", 0o140777, (0, 0), (0, 0)),
    ],
)  # fmt: skip
def test_values(
    tmp_path: Path, value: bytes, mode: int, owner: tuple[int, int], device: tuple[int, int]
) -> None:
    st = parse(value, _like(tmp_path, 0o100755))
    assert st is not None
    assert (st.st_mode, (st.st_uid, st.st_gid)) == (mode, owner)
    assert (os.major(st.st_rdev), os.minor(st.st_rdev)) == device
    again = parse(value_of(st), _like(tmp_path, 0o100755))
    assert again == st
    assert again.st_rdev == st.st_rdev


@pytest.mark.parametrize(
    "value",
    [b"", b"0", b"0:0", b"0:0:", b"0:0:8", b"0:0:-755", b" 0:0:755", b"0:0:755\n", b"0:0:755\0", b"0:0:755:",
     b"0:0:755:dir", b"0:0:755:symlink", b"0:0:755:char", b"0:0:755:char-1", b"0:0:755:char-0-0",
     b"0:0:755:char-4096-0", b"0:0:755:block-1-1048576", b"0:0:755:file:file", b"4294967295:0:755",
     b"99999999999:0:755", b"-2:0:755", b"\xff" * 70, b"0:0:" + b"7" * 400, "٣:0:755".encode()],
)  # fmt: skip
def test_other_values_are_ignored(tmp_path: Path, value: bytes) -> None:
    assert parse(value, _like(tmp_path, 0o100755)) is None


def test_only_an_empty_file_has_another_type(tmp_path: Path) -> None:
    assert parse(b"0:0:600:pipe", _like(tmp_path, 0o100755, size=1)) is None
    for kind in (b"file", b"pipe", b"char-1-3"):
        assert parse(b"0:0:600:" + kind, _like(tmp_path, 0o040755)) is None
    assert parse(b"0:0:600:dir", _like(tmp_path, 0o040755)) is not None


def test_what_an_owner_may_not_do(tmp_path: Path) -> None:
    """In a mount of the host's root."""
    file = tmp_path / "file"
    file.touch()
    os.chmod(file, 0o755)
    st = file.stat()
    mine, others = Permissions([CONTAINERS], st.st_uid), Permissions([CONTAINERS], st.st_uid + 1)
    for value, kept in ((b"3:4:6755", "-rwsr-sr-x"), (b"0:0:666:char-1-3", "crw-rw-rw-")):
        os.setxattr(file, CONTAINERS, value)
        assert stat.filemode(mine.show(st, os.fsencode(file)).st_mode) == kept
    assert others.show(st, os.fsencode(file)) == st
    os.setxattr(file, CONTAINERS, b"3:4:6711")
    shown = others.show(st, os.fsencode(file))
    assert (shown.st_uid, shown.st_gid, stat.filemode(shown.st_mode)) == (3, 4, "-rwx--x--x")
    os.setxattr(file, CONTAINERS, b"%d:%d:6711" % (st.st_uid, st.st_gid))
    assert stat.filemode(others.show(st, os.fsencode(file)).st_mode) == "-rws--s--x"


@pytest.mark.parametrize("kept", [PRIVILEGED, USER, CONTAINERS])
def test_names(kept: bytes) -> None:
    permissions = Permissions([kept])
    names = [b"user.mine", CONTAINERS, USER, PRIVILEGED, b"user.overlay.opaque", CAPABILITY, b"trusted.x"]
    names += [b"user.containers.override_" + name for name in names]
    stored = [stored_name(MARKERS, permissions, name) for name in names]
    assert shown_names(MARKERS, permissions, stored) == names
    assert not set(stored) & {CONTAINERS, USER, PRIVILEGED, b"user.overlay.opaque"}
    assert (stored_name(MARKERS, permissions, CAPABILITY) == CAPABILITY) == (kept != CONTAINERS)
    assert shown_names(MARKERS, permissions, [CONTAINERS, USER, PRIVILEGED, b"user.overlay.opaque"]) == []
    with pytest.raises(OSError, match="not supported"):
        stored_name(MARKERS, permissions, b"user.containers.override_" + b"x" * 220)
