"""What pyfuse3 gets for an answer: entries with their attributes, and open files."""

from __future__ import annotations

from typing import Any, Final

import pyfuse3

from unionfs.fuse.operations import Named

#: Seconds; only this daemon changes the tree, so cached entries stay valid.
FOREVER: Final = 1e9


def opened(number: int, *, keep_cache: bool = True) -> pyfuse3.FileInfo:
    """An open file with that number."""
    return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(number), keep_cache=keep_cache)


def named(found: Named) -> pyfuse3.EntryAttributes:
    """The reply for a name, valid for ever unless others can change its object."""
    reply = entry(found)
    if not found[0].territory.lasting:
        reply.entry_timeout = 0
    return reply


def entry(found: Named) -> pyfuse3.EntryAttributes:
    """The attributes of a node."""
    node, attributes = found
    st: Any = attributes.st
    reply = pyfuse3.EntryAttributes()
    # The library has one number for node and inode, so bound hard links have several numbers.
    reply.st_ino = pyfuse3.InodeT(node.id)
    reply.generation = node.generation
    reply.entry_timeout = FOREVER
    reply.attr_timeout = FOREVER if attributes.lasting else 0
    reply.st_mode = pyfuse3.ModeT(st.st_mode)
    reply.st_nlink = attributes.nlink
    reply.st_uid = st.st_uid
    reply.st_gid = st.st_gid
    reply.st_rdev = st.st_rdev
    reply.st_size = st.st_size
    reply.st_blksize = st.st_blksize
    reply.st_blocks = st.st_blocks
    reply.st_atime_ns = st.st_atime_ns
    reply.st_mtime_ns = st.st_mtime_ns
    reply.st_ctime_ns = attributes.ctime_ns
    return reply


def bare(number: int, kind: int = 0, seconds: float = 0) -> pyfuse3.EntryAttributes:
    """A name with only a number and a file type, which the kernel may cache for ``seconds``.

    Number 0 means a missing name. In a listing the entry is a name whose lookup fails: pyfuse3 has one number
    for node and inode, and readdir(3) skips inode 0, so the kernel gets an id without a node, and looks the
    name up before use. For ``.`` and ``..`` the kernel uses number and type, and counts no lookup
    (fs/fuse/readdir.c).
    """
    reply = pyfuse3.EntryAttributes()
    reply.st_ino = pyfuse3.InodeT(number)
    reply.st_mode = pyfuse3.ModeT(kind)
    reply.entry_timeout = seconds
    reply.attr_timeout = 0
    return reply
