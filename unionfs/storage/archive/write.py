"""A tree into an archive: one pass, constant memory, every file as of one moment where that can be had."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from xxhash import xxh3_128

from unionfs.errors import UserError, quoted, reason
from unionfs.storage.archive import manifest
from unionfs.storage.archive.compress import Sink
from unionfs.storage.archive.entry import FILE, HARDLINK, SPARSE, Entry, SparseDigest, digest_of
from unionfs.storage.archive.headers import PlainFiles, encode, sparse_map, special_file, stored_size
from unionfs.storage.archive.manifest import Line, ManifestWriter, whole_line
from unionfs.storage.archive.walk import Walker
from unionfs.sys.calls import clone_file

INFO, MANIFEST, DELETED = (b".unionfs-backup/" + name for name in (b"info.json", b"manifest", b"deleted"))

_SMALL = 256 << 10
_CHUNK = 1 << 20
_FLUSH = 1 << 20
_TRIES = 3
_ZEROS = bytes(_CHUNK)
# A file that changed in the same tick of the kernel's clock as the backup before began may look unchanged
# (the clock of most filesystems ticks 100 to 1000 times a second), so such a file is taken again.
_RACY = 50_000_000


class ArchiveWriter:
    """Writes one archive.

    `base` gives the lines of the manifest of the archive that this one is built on, and `base_started` when
    that one was begun (nanoseconds). `scratch` is a directory on the tree's filesystem where files may be
    cloned to, to be read as of one moment. `progress` gets (entries, bytes read) now and then.
    """

    def __init__(
        self,
        sink: Sink,
        walker: Walker,
        note: Callable[[str], None],
        *,
        base: Iterator[Line] | None = None,
        base_started: int = 0,
        scratch: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._sink = sink
        self._walker = walker
        self._note = note
        self._parts: list[bytes] = []
        self._size = 0
        self._lines: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=8 << 20)  # noqa: SIM115
        self.manifest = ManifestWriter(self._lines)
        self._deleted: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=1 << 20)  # noqa: SIM115
        self._deleted_digest = xxh3_128()
        self._base = base
        self._base_started = base_started
        self._next = None if base is None else next(base, None)
        self._scratch = scratch
        self._progress = progress
        self._plain = PlainFiles()
        if base is None:
            walker.fast = self._add_plain
        self.entries = 0
        self.read_bytes = 0
        self.changed = 0

    def write(self, info: dict[str, Any]) -> None:
        """Write the whole archive. Raises UserError, and OSError of the sink."""
        text = json.dumps(info, indent=2).encode("ascii") + b"\n"
        self._put_special(INFO, text)
        self.manifest.add(manifest.member_line(b"info.json", digest_of(text)))
        for entry, fd in self._walker.entries():
            self._add(entry, fd)
        if self._base is not None:
            while self._next is not None:
                self._delete(self._next)
            self.manifest.add(manifest.member_line(b"deleted", self._deleted_digest.hexdigest()))
            self._put_stream(DELETED, self._deleted)
        self.manifest.finish()
        self._put_stream(MANIFEST, self._lines)
        self._put(bytes(1024))
        self._flush()

    def copy_manifest(self, out: IO[bytes]) -> None:
        """The manifest of the archive that has been written."""
        self._lines.seek(0)
        while chunk := self._lines.read(_CHUNK):
            out.write(chunk)

    # -- output -------------------------------------------------------------------------------------------

    def _put(self, data: bytes) -> None:
        self._parts.append(data)
        self._size += len(data)
        if self._size >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        if self._parts:
            data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts, self._size = [], 0
            self._sink.write(data)
        if self._progress is not None:
            self._progress(self.entries, self.read_bytes)

    def _put_special(self, name: bytes, data: bytes) -> None:
        self._put(special_file(name, len(data), time.time_ns()) + data + bytes(-len(data) % 512))

    def _put_stream(self, name: bytes, stream: IO[bytes]) -> None:
        size = stream.tell()
        self._put(special_file(name, size, time.time_ns()))
        stream.seek(0)
        while chunk := stream.read(_CHUNK):
            self._put(chunk)
        self._put(bytes(-size % 512))

    # -- entries ------------------------------------------------------------------------------------------

    def _add(self, entry: Entry, fd: int) -> None:
        self.entries += 1
        if self._base is not None:
            known = self._known(entry)
            if known is not None and self._is_unchanged(entry, known):
                entry.digest = known.digest
                line = whole_line(entry, manifest.BASE)
                # Attributes are compared as well: a clock that was set back may hide a change.
                if line.partition(b"\t")[0] == known.shown:
                    self.manifest.add(line)
                    return
                entry.digest = "-"
        if entry.kind == FILE and entry.size <= _SMALL:
            self._add_small(entry, fd)
        elif entry.kind in (FILE, SPARSE):
            self._add_large(entry, fd)
        else:
            self._put(encode(entry, 0))
            self.manifest.add(whole_line(entry, manifest.HERE))

    def _add_plain(self, fd: int, path: bytes, status: os.stat_result) -> bool:
        """Add a small file that has nothing particular, as most have not; False for others.

        What `_add` does too, in as few steps as can be: this is where the time of a backup goes.
        """
        size = status.st_size
        if not 0 < size <= _SMALL or status.st_blocks * 512 < size:
            return False
        try:
            if os.listxattr(fd):
                return False
        except OSError:
            return False
        mtime, ctime = status.st_mtime_ns, status.st_ctime_ns
        mode, uid, gid = status.st_mode & 0o7777, status.st_uid, status.st_gid
        header = self._plain.encode(path, mode, uid, gid, size, mtime)
        if header is None:
            return False
        data = os.read(fd, size + 1)
        after = os.fstat(fd)
        if (
            len(data) != size
            or after.st_mtime_ns != mtime
            or after.st_ctime_ns != ctime
            or after.st_size != size
        ):
            return False
        parts = self._parts
        parts.append(header)
        parts.append(data)
        parts.append(_ZEROS[: -size % 512])
        self._size += size + 1536
        self.manifest.add(
            b"f %o %d %d %d %d - %b %b\there %d %d\n"
            % (
                mode,
                uid,
                gid,
                size,
                mtime,
                digest_of(data).encode(),
                manifest.escape(path),
                ctime,
                status.st_ino,
            )
        )
        self.entries += 1
        self.read_bytes += size
        if self._size >= _FLUSH:
            self._flush()
        return True

    def _add_small(self, entry: Entry, fd: int) -> None:
        for left in range(_TRIES, -1, -1):
            data = os.read(fd, entry.size + 1) if entry.size else b""
            while 0 < len(data) < entry.size and (more := os.read(fd, entry.size - len(data))):
                data += more
            status = os.fstat(fd)
            if (status.st_mtime_ns, status.st_ctime_ns, status.st_size, len(data)) == (
                entry.mtime, entry.ctime, entry.size, entry.size,
            ):  # fmt: skip
                break
            if not left:
                self._say_changed(entry)
                data = data[: entry.size].ljust(entry.size, b"\0")
                break
            again = self._again(entry, fd)
            if again.kind != FILE or again.size > _SMALL:
                self._add_large(again, fd)
                return
            entry = again
        entry.digest = digest_of(data)
        self.read_bytes += entry.size
        if data:
            self._put(encode(entry, entry.size) + data + _ZEROS[: -entry.size % 512])
        else:
            self._put(encode(entry, 0))
        self.manifest.add(whole_line(entry, manifest.HERE))

    def _again(self, entry: Entry, fd: int) -> Entry:
        """The attributes of a file as they are by now, and its content from the start."""
        os.lseek(fd, 0, os.SEEK_SET)
        again = self._walker.file_entry(fd, entry.path)
        assert again is not None
        if again.kind == HARDLINK:  # it got a second name meanwhile, which will be the link
            again.kind, again.link = FILE, b""
            again.size = os.fstat(fd).st_size
            again.xattrs = entry.xattrs
        return again

    def _say_changed(self, entry: Entry) -> None:
        self.changed += 1
        self._note(
            f"{quoted(os.fsdecode(entry.path))} changed each time it was read; the archive holds it as it "
            "was over a short while."
        )

    def _add_large(self, entry: Entry, fd: int) -> None:
        for left in range(_TRIES, -1, -1):
            source = self._frozen(entry, fd)
            try:
                if source != fd:
                    # Of a clone only the content counts; the attributes are the file's.
                    segments = self._walker_segments(source, entry)
                    entry.kind = FILE if segments is None else SPARSE
                    entry.segments = segments or []
                self._put(encode(entry, stored_size(entry)))
                if entry.kind == SPARSE:
                    self._put(sparse_map(entry.segments))
                    entry.digest = self._sparse_content(entry, source)
                else:
                    entry.digest = self._content(entry, source)
                self._put(bytes(-stored_size(entry) % 512))
            finally:
                if source != fd:
                    os.close(source)
            status = os.fstat(fd)
            good = source != fd or (status.st_mtime_ns, status.st_ctime_ns, status.st_size) == (
                entry.mtime, entry.ctime, entry.size,
            )  # fmt: skip
            if good or not left:
                if not good:
                    self._say_changed(entry)
                self.manifest.add(whole_line(entry, manifest.HERE))
                return
            self.manifest.add(whole_line(entry, manifest.AGAIN))
            entry = self._again(entry, fd)

    def _walker_segments(self, fd: int, entry: Entry) -> list[tuple[int, int]] | None:
        from unionfs.storage.archive.walk import data_segments

        if entry.kind != SPARSE:
            return None
        segments = data_segments(fd, entry.size)
        return None if segments == [(0, entry.size)] else segments

    def _frozen(self, entry: Entry, fd: int) -> int:
        """A clone of the file as of this moment, with the entry made right for it; the file itself without
        one.
        """
        if self._scratch is None:
            return fd
        try:
            clone = os.open(self._scratch, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:
            self._scratch = None
            return fd
        try:
            for _ in range(_TRIES):
                clone_file(clone, fd)
                status = os.fstat(fd)
                if status.st_size == os.fstat(clone).st_size:
                    entry.size = status.st_size
                    entry.mtime, entry.ctime = status.st_mtime_ns, status.st_ctime_ns
                    return clone
                os.ftruncate(clone, 0)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                self._scratch = None  # no reflinks here
        os.close(clone)
        return fd

    def _content(self, entry: Entry, fd: int) -> str:
        """Put exactly as many bytes as the header says: what is missing is zeros, what is more is left
        out.
        """
        total, left = xxh3_128(), entry.size
        while left:
            chunk = os.read(fd, min(left, _CHUNK)) or _ZEROS[: min(left, _CHUNK)]
            total.update(chunk)
            self._put(chunk)
            left -= len(chunk)
            self.read_bytes += len(chunk)
        return total.hexdigest()

    def _sparse_content(self, entry: Entry, fd: int) -> str:
        digest = SparseDigest()
        for offset, length in entry.segments:
            end = offset + length
            while offset < end:
                chunk = os.pread(fd, min(end - offset, _CHUNK), offset) or _ZEROS[: min(end - offset, _CHUNK)]
                digest.update(offset, chunk)
                self._put(chunk)
                offset += len(chunk)
                self.read_bytes += len(chunk)
        return digest.hexdigest(entry.size)

    # -- incremental --------------------------------------------------------------------------------------

    def _known(self, entry: Entry) -> Line | None:
        """The line of the base about the same path; what the base has before it is gone now."""
        assert self._base is not None
        place = manifest.order(entry.path)
        while self._next is not None:
            known = self._next.order()
            if known > place:
                return None
            if known == place:
                found, self._next = self._next, next(self._base, None)
                return found
            self._delete(self._next)
        return None

    def _delete(self, line: Line) -> None:
        assert self._base is not None
        text = manifest.escape(line.path) + b"\n"
        self._deleted.write(text)
        self._deleted_digest.update(text)
        self._next = next(self._base, None)

    def _is_unchanged(self, entry: Entry, known: Line) -> bool:
        return (
            (entry.ctime, entry.ino, entry.mtime, entry.size)
            == (known.ctime, known.ino, known.mtime, known.size)
            and entry.kind == known.kind
            and entry.ctime < self._base_started - _RACY
        )


def explain_full(error: OSError, place: str) -> UserError:
    """The sentence for a backup that could not be written."""
    return UserError(
        f"the backup could not be written to {quoted(place)}: {reason(error)}; nothing is left of it. Free "
        "space, or write it elsewhere."
    )
