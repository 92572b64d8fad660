"""Writes a tree into an archive, or only into a manifest: one pass, in constant memory."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable
from typing import IO, Any

from unionfs.storage.archive import manifest
from unionfs.storage.archive.base import Base
from unionfs.storage.archive.content import SMALL, Contents, pieces
from unionfs.storage.archive.entry import FILE, NO_DIGEST, SPARSE, Entry, digest_of, new_digest
from unionfs.storage.archive.headers import DELETED, INFO, MANIFEST
from unionfs.storage.archive.manifest import ManifestWriter, plain_line, whole_line
from unionfs.storage.archive.progress import UNSEEN, Progress
from unionfs.storage.archive.tar import Members, Tar
from unionfs.storage.archive.walk import Walker

_CHUNK = 1 << 20


class Pass:
    """One pass over a tree: entries go to `members`, their manifest lines to `add_line`."""

    def __init__(
        self,
        walker: Walker,
        contents: Contents,
        members: Members,
        add_line: Callable[[bytes], None],
        *,
        base: Base | None = None,
        progress: Progress = UNSEEN,
    ) -> None:
        self._walker = walker
        self._contents = contents
        self._members = members
        self._add_line = add_line
        self._base = base
        self._progress = progress
        self.entries = 0
        self.unchanged = 0
        """Of the entries, those that are in the base."""
        self.read_bytes = 0

    def run(self) -> None:
        """Walk the tree. Raises UserError, and OSError from `members`."""
        for entry, fd in self._walker.entries(self._take if self._base is None else None):
            self._count(0)
            if self._base is not None and (line := self._base.line_if_unchanged(entry)) is not None:
                self.unchanged += 1
                self._add_line(line)
            elif entry.kind == FILE and entry.size <= SMALL:
                self._add_small(entry, fd)
            elif entry.kind in (FILE, SPARSE):
                self._add_large(entry, fd)
            else:
                self._members.add(entry)
                self._add_line(whole_line(entry, NO_DIGEST, manifest.HERE))

    def _count(self, size: int) -> None:
        self.entries += 1
        self.read_bytes += size
        if not self.entries & 255:
            self._progress(self.entries, self.read_bytes)

    def _take(self, fd: int, path: bytes, status: os.stat_result) -> bool:
        """Add a small file without special attributes, the common case; returns False for others.

        The result equals that of `_add_small`, in as few steps as possible: backups spend their time here.
        """
        size = status.st_size
        if not 0 < size <= SMALL or status.st_blocks * 512 < size:
            return False
        try:
            if os.listxattr(fd):
                return False
        except OSError:
            return False
        try:
            data = os.pread(fd, size + 1, 0)
            after = os.fstat(fd)
        except OSError as error:
            self._walker.failed(path, error)
            return True
        mtime = status.st_mtime_ns
        header = self._members.plain_header(
            path, status.st_mode & 0o7777, status.st_uid, status.st_gid, size, mtime
        )
        if header is None:
            return False
        if (
            len(data) != size
            or after.st_mtime_ns != mtime
            or after.st_ctime_ns != status.st_ctime_ns
            or after.st_size != size
        ):
            return False
        self._members.add_plain(header, data)
        self._add_line(plain_line(path, status, digest_of(data)))
        self._count(size)
        return True

    def _add_small(self, entry: Entry, fd: int) -> None:
        entry, data = self._contents.small(entry, fd)
        if data is None:
            self._add_large(entry, fd)
            return
        self.read_bytes += entry.size
        self._members.add(entry, data)
        self._add_line(whole_line(entry, digest_of(data), manifest.HERE))

    def _add_large(self, first: Entry, fd: int) -> None:
        attempted: tuple[Entry, str] | None = None
        for entry, source in self._contents.attempts(first, fd):
            if attempted is not None:
                self._add_line(whole_line(*attempted, manifest.AGAIN))
            digest = new_digest(entry)
            self._members.begin(entry)
            for offset, data in pieces(entry, source):
                digest.update(offset, data)
                self._members.put(data)
                self.read_bytes += len(data)
                self._progress(self.entries, self.read_bytes)
            self._members.end(entry)
            attempted = entry, digest.hexdigest(entry.size)
        assert attempted is not None
        self._add_line(whole_line(*attempted, manifest.HERE))


class ArchiveWriter:
    """Writes one archive; `base` makes it an incremental one."""

    def __init__(
        self,
        tar: Tar,
        walker: Walker,
        contents: Contents,
        *,
        base: Base | None = None,
        progress: Progress = UNSEEN,
    ) -> None:
        self._tar = tar
        self._base = base
        self._lines: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=8 << 20)  # noqa: SIM115
        self._manifest = ManifestWriter(self._lines)
        self._pass = Pass(walker, contents, tar, self._manifest.add, base=base, progress=progress)

    def write(self, info: dict[str, Any]) -> Pass:
        """Write the whole archive; returns the pass with its figures. Raises UserError and OSError."""
        text = json.dumps(info, indent=2).encode("ascii") + b"\n"
        self._add_own(b"info.json", INFO, io.BytesIO(text), digest_of(text))
        self._pass.run()
        if self._base is not None:
            self._add_own(b"deleted", DELETED, *self._base.deleted())
        self._manifest.finish()
        self._tar.special(MANIFEST, self._lines)
        self._tar.finish()
        return self._pass

    def _add_own(self, short_name: bytes, name: bytes, content: IO[bytes], digest: str) -> None:
        self._manifest.add(manifest.member_line(short_name, digest))
        self._tar.special(name, content)

    def copy_manifest(self, out: IO[bytes]) -> None:
        self._lines.seek(0)
        while chunk := self._lines.read(_CHUNK):
            out.write(chunk)
