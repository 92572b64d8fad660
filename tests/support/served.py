"""A read-only FUSE filesystem that shows a directory, in a process of its own: one that can be stopped.

The kernel caches nothing of it, so every call reaches the process. It answers one request at a time, after
SECONDS: `python -m tests.support.served SOURCE TARGET [SECONDS]`. The xattr `user.bytes_read` of everything
is the number of bytes that were read from all files, and `user.reads_backwards` how many reads of one open
file began before the last one of it.
"""

import os
import stat
import sys
import time

import pyfuse3
import trio

_DELAY = 0.0


def attributes(st: os.stat_result) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_blksize", "st_blocks",
                 "st_atime_ns", "st_mtime_ns", "st_ctime_ns"):  # fmt: skip
        setattr(entry, name, getattr(st, name))
    entry.entry_timeout = entry.attr_timeout = 0
    return entry


def _delay() -> None:
    time.sleep(_DELAY)


class Served(pyfuse3.Operations):  # type: ignore[misc,unused-ignore]
    supports_dot_lookup = False

    def __init__(self, source: bytes) -> None:
        super().__init__()
        self.paths = {pyfuse3.ROOT_INODE: source}
        self.numbers = {source: pyfuse3.ROOT_INODE}
        self.bytes_read = self.backwards = 0
        self.last_reads: dict[int, int] = {}

    def entry(self, path: bytes) -> pyfuse3.EntryAttributes:
        _delay()
        try:
            entry = attributes(os.lstat(path))
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or 5) from None
        number = self.numbers.setdefault(path, pyfuse3.InodeT(len(self.numbers) + 1))
        self.paths[number] = path
        entry.st_ino = number
        return entry

    async def lookup(self, parent_inode, name, ctx):  # type: ignore[no-untyped-def]
        return self.entry(os.path.join(self.paths[parent_inode], name))

    async def getattr(self, inode, ctx):  # type: ignore[no-untyped-def]
        return self.entry(self.paths[inode])

    async def readlink(self, inode, ctx):  # type: ignore[no-untyped-def]
        return os.readlink(self.paths[inode])

    async def getxattr(self, inode, name, ctx):  # type: ignore[no-untyped-def]
        if name == b"user.bytes_read":
            return b"%d" % self.bytes_read
        if name == b"user.reads_backwards":
            return b"%d" % self.backwards
        try:
            return os.getxattr(self.paths[inode], name, follow_symlinks=False)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or 5) from None

    async def listxattr(self, inode, ctx):  # type: ignore[no-untyped-def]
        return [os.fsencode(name) for name in os.listxattr(self.paths[inode], follow_symlinks=False)]

    async def open(self, inode, flags, ctx):  # type: ignore[no-untyped-def]
        _delay()
        return pyfuse3.FileInfo(fh=os.open(self.paths[inode], os.O_RDONLY))

    async def read(self, fh, off, size):  # type: ignore[no-untyped-def]
        _delay()
        self.backwards += off < self.last_reads.get(fh, 0)
        self.last_reads[fh] = off
        data = os.pread(fh, size, off)
        self.bytes_read += len(data)
        return data

    async def flush(self, fh):  # type: ignore[no-untyped-def]
        _delay()

    async def release(self, fh):  # type: ignore[no-untyped-def]
        os.close(fh)
        self.last_reads.pop(fh, None)

    async def statfs(self, ctx):  # type: ignore[no-untyped-def]
        found, reply = os.statvfs(self.paths[pyfuse3.ROOT_INODE]), pyfuse3.StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree",
                     "f_favail", "f_namemax"):  # fmt: skip
            setattr(reply, name, getattr(found, name))
        return reply

    async def opendir(self, inode, ctx):  # type: ignore[no-untyped-def]
        return inode

    async def readdir(self, fh, start_id, token):  # type: ignore[no-untyped-def]
        _delay()
        path = self.paths[fh]
        for index, name in enumerate(sorted(os.listdir(path))):
            if index < start_id:
                continue
            entry = self.entry(os.path.join(path, name))
            if not pyfuse3.readdir_reply(token, name, entry, index + 1):
                return


async def main(source: bytes, target: str) -> None:
    pyfuse3.init(Served(source), target, {"fsname=served", "ro", "allow_other", "default_permissions"})
    try:
        await pyfuse3.main()
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    _DELAY = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    assert stat.S_ISDIR(os.stat(sys.argv[1]).st_mode)
    trio.run(main, os.fsencode(sys.argv[1]), sys.argv[2])
