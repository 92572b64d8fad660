"""Exports a volume as a plain tar, and imports one: archives of other programs, without a manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from unionfs.errors import on_failure, quoted
from unionfs.storage import workspace
from unionfs.storage.archive import acl
from unionfs.storage.archive.compress import Sink, compressor, decompressor
from unionfs.storage.archive.content import Contents
from unionfs.storage.archive.entry import DIRECTORY, HARDLINK, Entry
from unionfs.storage.archive.extract import Extractor
from unionfs.storage.archive.foreign import ForeignReader
from unionfs.storage.archive.headers import Malformed
from unionfs.storage.archive.output import output_to, written
from unionfs.storage.archive.progress import UNSEEN, Progress
from unionfs.storage.archive.tar import Tar
from unionfs.storage.archive.target import refuse_inside
from unionfs.storage.archive.walk import Walker
from unionfs.storage.archive.write import Pass
from unionfs.storage.backup import Report
from unionfs.storage.restore import fill
from unionfs.storage.volumes import Volumes

_MOST_NANOSECONDS = 1 << 63


@dataclass(frozen=True, slots=True)
class Owner:
    """Replaces the owners of all entries; None: as they are."""

    uid: int | None = None
    gid: int | None = None

    def of(self, entry: Entry) -> Entry:
        uid, gid = self.uids(entry.uid, entry.gid)
        return entry._replace(uid=uid, gid=gid)

    def uids(self, uid: int, gid: int) -> tuple[int, int]:
        return uid if self.uid is None else self.uid, gid if self.gid is None else self.gid


class _OwnedTar(Tar):
    """A tar whose entries have other owners."""

    def __init__(self, sink: Sink, owner: Owner) -> None:
        super().__init__(sink)
        self._owner = owner

    def plain_header(self, path: bytes, mode: int, uid: int, gid: int, size: int, mtime: int) -> bytes | None:
        return super().plain_header(path, mode, *self._owner.uids(uid, gid), size, mtime)

    def add(self, entry: Entry, data: bytes = b"") -> None:
        super().add(self._owner.of(entry), data)

    def begin(self, entry: Entry) -> None:
        super().begin(self._owner.of(entry))


def export(
    volumes: Volumes, name: str, target: str, *, compress: str, owner: Owner, progress: Progress = UNSEEN
) -> Report:
    """Write a volume's content as a tar to the file `target` (`-`: standard output). Raises UserError."""
    report = Report()
    with volumes.working_on(name, "an export") as volume, volumes.used(name, "export") as path:
        if target != "-":
            refuse_inside(target, path)
        progress.reads_tree(path)
        with output_to(target, "tar") as out:
            walker = Walker(path, report.note, leave_out=workspace.names(volume.directory))
            sink = compressor(out, compress)
            tar = _OwnedTar(sink, owner)
            contents = Contents(walker, report.note_unstable)
            done = Pass(walker, contents, tar, lambda line: None, progress=progress)
            with written("tar", target):
                done.run()
                tar.finish()
                sink.close()
    report.total(done.entries, done.read_bytes, "")
    return report


def import_(
    volumes: Volumes, name: str, source: str, *, owner: Owner, progress: Progress = UNSEEN
) -> Report:
    """Replace a volume's content with that of a tar (`-`: standard input). Raises UserError.

    After an error the volume is unchanged. The tar is not trusted.
    """
    report = Report()
    shown = "standard input" if source == "-" else quoted(source)
    with volumes.working_on(name, "an import") as volume, ExitStack() as stack:
        with volumes.still(name, "imported"):
            pass
        with on_failure(f"the tar {shown} cannot be read", "check its path"):
            file = 0 if source == "-" else source
            raw = stack.enter_context(open(file, "rb", buffering=0, closefd=source != "-"))
            progress.reads_file(raw.fileno())

        def read(extractor: Extractor) -> None:
            with on_failure(f"the tar {shown} cannot be imported", "nothing was changed", Malformed):
                reader = ForeignReader(decompressor(raw))
                for member in reader.entries():
                    entry = owner.of(_checked(member))
                    content = reader.content()
                    progress(report.entries, report.size)
                    content = progress.along(content)
                    extractor.add(entry, content)
                    report.count(1, entry.size)

        fill(volumes, volume, stack, report, "imported", read, lambda path, note: _Plain(path, note, owner))
    return report


class _Plain(Extractor):
    """Makes the entries of a tar; directories that it does not name are made, too."""

    def __init__(self, root: str, note: Callable[[str], None], owner: Owner) -> None:
        super().__init__(root, note)
        self._made_by = owner.of(Entry(b"", DIRECTORY, 0o755, os.geteuid(), os.getegid(), 0, 0))
        self._remember(self._made_by)

    def _enter(self, at: int, name: bytes, path: bytes) -> int:
        try:
            os.stat(name, dir_fd=at, follow_symlinks=False)
        except FileNotFoundError:
            self._mkdir(at, name)
            self._remember(self._made_by._replace(path=b"/".join([*self._parts, name])))
        return self._open_directory(at, name, path)


def _checked(member: Entry) -> Entry:
    """Return a tar's member with its path below the volume. Raises Malformed."""
    path, link = _path(member.path), member.link
    if member.kind == HARDLINK:
        link = _path(link)
    if b"\0" in link:
        raise Malformed(f"the target of the link {quoted(path)} has a zero byte")
    if not -_MOST_NANOSECONDS <= member.mtime < _MOST_NANOSECONDS:
        raise Malformed(f"the time of {quoted(path)} is out of range")
    return member._replace(path=path, link=link, xattrs=_kept(member.xattrs))


def _path(name: bytes) -> bytes:
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts or b"\0" in name:
        raise Malformed(f"its entry {quoted(name)} leads out of the volume")
    return b"/".join(parts)


def _kept(xattrs: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """Those that belong to the files; labels of the host they come from (security.selinux) do not."""
    names: Iterable[bytes] = (
        name
        for name in xattrs
        if name.startswith((b"user.", b"trusted.")) or name in acl.RECORDS or name == b"security.capability"
    )
    return {name: xattrs[name] for name in names}
