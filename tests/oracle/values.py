"""The values of random operations: names, modes, owners, xattrs, times, flags."""

from __future__ import annotations

import os
import stat

from tests.oracle.layers import CAPABILITY, LONG_NAME, TEAM
from tests.support import acl, syscalls

# Names of the lowers recur, so that objects are created over a whiteout or in an opaque directory.
NAMES = [
    b"new", b"n2", b"gone", b"low", b"hidden", b"a", b"b", b"x", b"both", b"f", b"top", b"never-was", b"d",
    b"sp ace\n", b"\xfe\xff", b"N" * 255, b"\xc3\xa9" * 127 + b"x",
]  # fmt: skip
ODD_PATHS = [
    b"", b".", b"file/x", b"nowhere/x", b"m/", b"file/", b"sl-dir/both", b"sl-dir/new", b"sl-file/",
    b"sl-dir/",     b"home/f", b"home/new", b"new/", b"m/sub/../low", b"L" * 256, b"m/" + b"L" * 256,
    LONG_NAME + b"/x",
    b"m/.",     b"sl-lost", b"sl-lost/x", b"white", b"gone-dir", b"only-top",
]  # fmt: skip
MODES = [0o644, 0o600, 0o755, 0o666, 0o777, 0o4755, 0o2755, 0o6777, 0o2644, 0o1777, 0o000, 0o7777]
IDS = [(-1, -1), (0, 0), (1000, 1000), (1000, TEAM), (-1, TEAM), (1002, -1), (-1, 1000)]
XATTRS = [
    "user.one", "user.dir", "user.new", "user.empty", "trusted.two", "trusted.overlay.opaque",
    "trusted.overlay.origin", "trusted.overlay.overlay.opaque", "trusted.overlay.whiteout",
    "trusted.overlay.",     "trusted.overlayx", "user.overlay.opaque", "security.capability",
    "security.other", "bogus.name", "user.",
    "user." + "n" * 250, "user." + "n" * 251, "trusted.overlay." + "n" * 235, acl.ACCESS, acl.DEFAULT,
]  # fmt: skip
ACLS = [
    acl.simple(6, 4, 4), acl.simple(7, 7, 0, users={1002: 5}, mask=5),
    acl.simple(7, 0, 0, users={1000: 6}, mask=2),
    acl.encode([]), b"junk", acl.encode([(acl.USER_OBJ, 7, 0)]),
]  # fmt: skip
VALUES = [b"", b"v", b"y", b"x", b"v" * 300, b"\0\xff", b"v" * 70000]
TIMES = [
    (1_100_000_000, 123_456_789), (0, 0), (0, 1), (-2, 7), (5_000_000_000, 1), (1, 999_999_999),
    (0, syscalls.UTIME_NOW), (0, syscalls.UTIME_OMIT), (0, 1_000_000_000),
]  # fmt: skip
SIZES = [0, 1, 5, 300, 4096, 4097, 100_000, 300_003]
OFFSETS = [0, 1, 100, 4095, 8192, 200_000]
OPEN_FLAGS = [
    os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_CREAT | os.O_EXCL,
    os.O_RDWR | os.O_TRUNC, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND, os.O_RDONLY | os.O_DIRECTORY,
    os.O_RDONLY | os.O_NOFOLLOW, os.O_PATH, os.O_RDONLY | os.O_CREAT, os.O_CREAT | os.O_DIRECTORY,
]  # fmt: skip
DEVICES = [
    (stat.S_IFIFO | 0o666, (0, 0)), (stat.S_IFCHR | 0o644, (1, 3)), (stat.S_IFCHR | 0o644, (0, 0)),
    (stat.S_IFCHR | 0o600, (0, 1)), (stat.S_IFBLK | 0o660, (7, 200)), (stat.S_IFBLK | 0o660, (0, 0)),
    (stat.S_IFSOCK | 0o777, (0, 0)), (stat.S_IFREG | 0o664, (0, 0)), (stat.S_IFIFO | 0o4711, (0, 0)),
    (stat.S_IFCHR | 0o644, (259, 300_000)),
]  # fmt: skip
TARGETS = [b"file", b"m", b"nowhere", b"/absolute/lost", b"sl-file", b"t" * 4095, b"t" * 300, b"", b"caf\xe9"]
CONTENTS = [b"", b"z", b"hello\n" * 30, b"\0" * 5000, b"w" * 70_000]
UMASKS = [0o022, 0o022, 0, 0o077, 0o027]
WHO = ["root", "root", "root", "user", "user", "other"]
RENAME_FLAGS = [0, 0, 0, 0, 1, 2, 2, 2, 4, 3, 5, 8]
CREATE_FLAGS = [os.O_WRONLY, os.O_WRONLY | os.O_EXCL, os.O_RDWR | os.O_TRUNC]
WRITE_FLAGS = [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_TRUNC]
REOPEN_FLAGS = [os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC, os.O_WRONLY]
CAPABILITIES = [CAPABILITY, b"j"]
