"""The used structures of the FUSE ABI, as a table: names, sizes, offsets are those of the header.

Source: include/uapi/linux/fuse.h, protocol 7.45 (Linux 6.18). For fields younger than protocol 7.23 (Linux
3.15), a comment at the row names the minor version.

Rules:
- One row a structure; a row is a list of groups; a group is a `struct` code followed by field names.
- Host byte order, no implicit alignment: the header pads by hand, so do the rows ("=").
- A field whose name begins with `padding`, `unused`, `spare`, `dummy`, `reserved` or `__` is skipped when
  unpacked and zero when packed; it keeps its place in `Layout.fields`.
- A group like `fuse_attr attr` is a nested structure: its fields appear flattened as `attr.ino`.
- The header has unsigned times; the kernel reads and writes them as signed 64-bit seconds (fs/fuse/inode.c,
  fuse_change_attributes_common), so they are signed here: files from before 1970 keep their time. The same
  goes for the offset of LSEEK (fs/fuse/file.c, fuse_lseek).
"""

from __future__ import annotations

import re
import struct
from typing import Final, NamedTuple

_SKIPPED: Final = re.compile(r"(?:.*\.)?(?:padding|unused|spare|dummy|reserved|__)\w*$")


class Field(NamedTuple):
    """One field; `code` is a `struct` code, with a count for arrays."""

    name: str
    code: str

    @property
    def skipped(self) -> bool:
        """True for padding: absent in the result of unpacking and in the arguments of packing."""
        return _SKIPPED.match(self.name) is not None


class Layout:
    """One structure of the header: its fields, and the compiled `struct.Struct` for its bytes."""

    __slots__ = ("fields", "format", "names", "size", "struct")

    def __init__(self, fields: list[Field]) -> None:
        self.fields = fields
        self.names = tuple(field.name for field in fields if not field.skipped)
        # The format without its "=", so that formats can be joined: header + body in one call.
        self.format = "".join(
            f"{struct.calcsize('=' + field.code)}x" if field.skipped else field.code for field in fields
        )
        self.struct = struct.Struct("=" + self.format)
        self.size = self.struct.size


def _build(groups: tuple[str, ...], known: dict[str, Layout]) -> Layout:
    fields: list[Field] = []
    for group in groups:
        code, *names = group.split()
        for name in names:
            if code in known:
                fields += [Field(f"{name}.{part.name}", part.code) for part in known[code].fields]
            else:
                fields.append(Field(name, code))
    return Layout(fields)


_TABLE: Final[dict[str, tuple[str, ...]]] = {
    # -- headers of messages
    "fuse_in_header": ("I len opcode", "Q unique nodeid", "I uid gid pid", "H total_extlen padding"),
    "fuse_out_header": ("I len", "i error", "Q unique"),
    # -- file attributes
    "fuse_attr": (
        "Q ino size blocks",
        "q atime mtime ctime",
        "I atimensec mtimensec ctimensec mode nlink uid gid rdev blksize flags",  # flags: 7.32
    ),
    "fuse_sx_time": ("q tv_sec", "I tv_nsec", "i __reserved"),  # 7.39
    "fuse_statx": (  # 7.39; bit for bit the struct statx of statx(2)
        "I mask blksize",
        "Q attributes",
        "I nlink uid gid",
        "H mode __spare0",
        "Q ino size blocks attributes_mask",
        "fuse_sx_time atime btime ctime mtime",
        "I rdev_major rdev_minor dev_major dev_minor",
        "14Q __spare2",
    ),
    "fuse_kstatfs": ("Q blocks bfree bavail files ffree", "I bsize namelen frsize padding", "6I spare"),
    # -- names and attributes
    "fuse_entry_out": (
        "Q nodeid generation entry_valid attr_valid",
        "I entry_valid_nsec attr_valid_nsec",
        "fuse_attr attr",
    ),
    "fuse_forget_in": ("Q nlookup",),
    "fuse_forget_one": ("Q nodeid nlookup",),
    "fuse_batch_forget_in": ("I count dummy",),
    "fuse_getattr_in": ("I getattr_flags dummy", "Q fh"),
    "fuse_attr_out": ("Q attr_valid", "I attr_valid_nsec dummy", "fuse_attr attr"),
    "fuse_statx_in": ("I getattr_flags reserved", "Q fh", "I sx_flags sx_mask"),  # 7.39
    "fuse_statx_out": ("Q attr_valid", "I attr_valid_nsec flags", "2Q spare", "fuse_statx stat"),  # 7.39
    "fuse_setattr_in": (
        "I valid padding",
        "Q fh size lock_owner",
        "q atime mtime ctime",
        "I atimensec mtimensec ctimensec mode unused4 uid gid unused5",
    ),
    # -- creation, renaming
    "fuse_mknod_in": ("I mode rdev umask padding",),
    "fuse_mkdir_in": ("I mode umask",),
    "fuse_rename_in": ("Q newdir",),
    "fuse_rename2_in": ("Q newdir", "I flags padding"),
    "fuse_link_in": ("Q oldnodeid",),
    "fuse_create_in": ("I flags mode umask open_flags",),  # open_flags: 7.33
    # -- open files
    "fuse_open_in": ("I flags open_flags",),  # open_flags: 7.33
    "fuse_open_out": ("Q fh", "I open_flags", "i backing_id"),  # backing_id: 7.40
    "fuse_release_in": ("Q fh", "I flags release_flags", "Q lock_owner"),
    "fuse_read_in": ("Q fh offset", "I size read_flags", "Q lock_owner", "I flags padding"),
    "fuse_write_in": ("Q fh offset", "I size write_flags", "Q lock_owner", "I flags padding"),
    "fuse_write_out": ("I size padding",),
    "fuse_fsync_in": ("Q fh", "I fsync_flags padding"),
    "fuse_fallocate_in": ("Q fh offset length", "I mode padding"),
    "fuse_lseek_in": ("Q fh", "q offset", "I whence padding"),  # 7.24
    "fuse_lseek_out": ("q offset",),  # 7.24
    "fuse_copy_file_range_in": ("Q fh_in off_in nodeid_out fh_out off_out len flags",),  # 7.28
    "fuse_copy_file_range_out": ("Q bytes_copied",),  # 7.45
    "fuse_ioctl_in": ("Q fh", "I flags cmd", "Q arg", "I in_size out_size"),
    "fuse_ioctl_out": ("i result", "I flags in_iovs out_iovs"),
    "fuse_syncfs_in": ("Q padding",),  # 7.34
    # -- the whole filesystem
    "fuse_statfs_out": ("fuse_kstatfs st",),
    # -- extended attributes
    "fuse_setxattr_in": ("I size flags setxattr_flags padding",),  # the last two: 7.33, with SETXATTR_EXT
    "fuse_getxattr_in": ("I size padding",),
    "fuse_getxattr_out": ("I size padding",),
    # -- the connection
    "fuse_init_in": ("I major minor max_readahead flags flags2", "11I unused"),  # from flags2 on: 7.36
    "fuse_init_out": (
        "I major minor max_readahead flags",
        "H max_background congestion_threshold",
        "I max_write time_gran",
        "H max_pages map_alignment",  # 7.28, 7.31
        "I flags2 max_stack_depth",  # 7.36, 7.40
        "H request_timeout",  # 7.43
        "11H unused",
    ),
    "fuse_interrupt_in": ("Q unique",),
    # -- directories
    "fuse_dirent": ("Q ino off", "I namelen type"),
    "fuse_direntplus": ("fuse_entry_out entry_out", "fuse_dirent dirent"),
    # -- notifications
    "fuse_notify_inval_inode_out": ("Q ino", "q off len"),
    "fuse_notify_inval_entry_out": ("Q parent", "I namelen flags"),
    "fuse_notify_store_out": ("Q nodeid offset", "I size padding"),
    "fuse_notify_prune_out": ("I count padding", "Q spare"),  # 7.45
}


def _build_all() -> dict[str, Layout]:
    known: dict[str, Layout] = {}
    for name, groups in _TABLE.items():
        known[name] = _build(groups, known)
    return known


LAYOUTS: Final[dict[str, Layout]] = _build_all()
"""Each structure by the header's name."""

IN_HEADER: Final = LAYOUTS["fuse_in_header"]
OUT_HEADER: Final = LAYOUTS["fuse_out_header"]
IN_HEADER_SIZE: Final = IN_HEADER.size
OUT_HEADER_SIZE: Final = OUT_HEADER.size
ATTR_SIZE: Final = LAYOUTS["fuse_attr"].size
ENTRY_OUT_SIZE: Final = LAYOUTS["fuse_entry_out"].size

SETXATTR_COMPAT_SIZE: Final = 8
"""Bytes of fuse_setxattr_in without SETXATTR_EXT (FUSE_COMPAT_SETXATTR_IN_SIZE)."""

INIT_COMPAT_SIZE: Final = 16
"""Bytes of fuse_init_in before protocol 7.36."""


def record_align(size: int) -> int:
    """`size` bytes rounded up to 8 (FUSE_REC_ALIGN), the padding of directory entries."""
    return (size + 7) & ~7
