"""Copies a file's content between volumes: by reflink, else by the kernel's copy, preserving holes."""

from __future__ import annotations

import errno
import os

from unionfs.storage.archive.content import Contents
from unionfs.storage.archive.entry import SPARSE, Entry
from unionfs.storage.archive.extract import Extractor
from unionfs.sys.calls import clone_file
from unionfs.union.filedata import copy_piece

_CHUNK = 64 << 20
_NO_REFLINK = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM)


def copy_content(extractor: Extractor, contents: Contents, entry: Entry, fd: int) -> bool:
    """Fill the file `entry`, open as `fd`. Returns whether its blocks are shared.

    A file that changes during the copy is copied again.
    """
    shared = True
    for attempt, source in contents.attempts(entry, fd):
        with extractor.new_file(attempt) as target:
            shared = _share(target, source)
            if not shared:
                _copy(target, source, attempt)
    return shared


def _share(target: int, source: int) -> bool:
    try:
        clone_file(target, source)
    except OSError as error:
        if error.errno not in _NO_REFLINK:
            raise
        return False
    return True


def _copy(target: int, source: int, entry: Entry) -> None:
    if entry.kind == SPARSE:
        os.ftruncate(target, entry.size)
    for offset, length in entry.segments if entry.kind == SPARSE else [(0, entry.size)]:
        end = offset + length
        while offset < end:
            count = copy_piece(source, target, min(end - offset, _CHUNK), offset)
            if count == 0:
                break  # it has become shorter
            offset += count
