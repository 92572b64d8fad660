"""A filesystem with failing names: `failing_lower.py MOUNTPOINT` prints "up" and serves.

`file` and `dir` work. A name such as `EIO` or `ESTALE` fails in a lookup with that errno. The xattrs of
`xattr-dir` and of the empty file `xattr-file` cannot be read (EIO).
"""

from __future__ import annotations

import errno
import os
import stat
import sys

import pyfuse3
import trio

ERRORS = ("EIO", "ESTALE", "EACCES", "ELOOP", "EPERM", "ENXIO", "ETIMEDOUT", "ENOMEM")
KINDS = {
    **dict.fromkeys(ERRORS, stat.S_IFREG),
    "file": stat.S_IFREG,
    "dir": stat.S_IFDIR,
    "xattr-file": stat.S_IFREG,
    "xattr-dir": stat.S_IFDIR,
}
IDS = {os.fsencode(name): pyfuse3.InodeT(number) for number, name in enumerate(KINDS, 2)}
NAMES = {number: name for name, number in IDS.items()}


class _Failing(pyfuse3.Operations):
    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        kind = stat.S_IFDIR if inode == 1 else KINDS[os.fsdecode(NAMES[inode])]
        entry.st_ino, entry.st_mode, entry.st_nlink = inode, pyfuse3.ModeT(kind | 0o755), 1
        return entry

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if parent_inode != 1 or name not in IDS:
            raise pyfuse3.FUSEError(errno.ENOENT)
        if os.fsdecode(name) in ERRORS:
            raise pyfuse3.FUSEError(getattr(errno, os.fsdecode(name)))
        return await self.getattr(IDS[name])

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        found = pyfuse3.StatvfsData()
        found.f_bsize = found.f_frsize = 4096
        found.f_namemax = 255
        return found

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        return pyfuse3.FileHandleT(inode)

    async def readdir(
        self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken
    ) -> None:
        if fh != 1:
            return
        for position, (name, number) in enumerate(IDS.items(), 1):
            if position <= start_id:
                continue
            entry = await self.getattr(number)
            if os.fsdecode(name) in ERRORS:
                entry.entry_timeout = entry.attr_timeout = 0
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), entry, position):
                return

    async def getxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> bytes:
        raise pyfuse3.FUSEError(errno.EIO if NAMES.get(inode, b"").startswith(b"xattr") else errno.ENODATA)

    async def listxattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> list[pyfuse3.XAttrNameT]:
        if NAMES.get(inode, b"").startswith(b"xattr"):
            raise pyfuse3.FUSEError(errno.EIO)
        return []


def main() -> None:
    """Serve until unmounted."""
    pyfuse3.init(_Failing(), sys.argv[1], {*pyfuse3.default_options, "allow_other"})
    print("up", flush=True)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
