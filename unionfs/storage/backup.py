"""Backup and verification of volumes."""

from __future__ import annotations

import os
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any

from unionfs.errors import UserError, on_failure, quoted
from unionfs.storage import workspace
from unionfs.storage.archive.base import Base
from unionfs.storage.archive.compress import WriteBehind, compressor, decompressor
from unionfs.storage.archive.content import Contents
from unionfs.storage.archive.entry import Entry
from unionfs.storage.archive.freeze import frozen, own_filesystem
from unionfs.storage.archive.headers import Malformed
from unionfs.storage.archive.manifest import AGAIN, Beside, Line, escape, latest, read_manifest
from unionfs.storage.archive.output import output_to, written
from unionfs.storage.archive.progress import UNSEEN, Progress
from unionfs.storage.archive.read import ArchiveReader
from unionfs.storage.archive.tar import Members, Tar
from unionfs.storage.archive.target import check_target
from unionfs.storage.archive.walk import Walker
from unionfs.storage.archive.write import ArchiveWriter, Pass
from unionfs.storage.drivers import find_driver
from unionfs.storage.volumes import Volume, Volumes
from unionfs.sys.fds import replacing

MANIFEST = "manifest"
"""The manifest of the last backup or restore, stored beside the volume's data for `verify`."""
_MOST_NOTES = 20


@dataclass
class Report:
    entries: int = 0
    size: int = 0
    """Bytes of content."""
    how: str = ""
    """How consistency was achieved, as a sentence fragment."""
    unstable: int = 0
    """Files that changed during every read attempt."""
    notes: list[str] = field(default_factory=list)
    more_notes: int = 0

    def count(self, entries: int, size: int) -> None:
        self.entries += entries
        self.size += size

    def total(self, entries: int, size: int, how: str) -> None:
        """Set the figures."""
        self.entries, self.size, self.how = entries, size, how

    def note(self, sentence: str) -> None:
        if len(self.notes) < _MOST_NOTES:
            self.notes.append(sentence)
        else:
            self.more_notes += 1

    def shared_blocks(self) -> None:
        self.how = "sharing blocks (reflinks)"

    def note_unstable(self, entry: Entry) -> None:
        self.unstable += 1
        self.note(
            f"{quoted(entry.path)} changed each time it was read; the archive may hold "
            "a mix of its states."
        )


def backup(
    volumes: Volumes,
    name: str,
    target: str,
    *,
    compress: str,
    since: str | None = None,
    progress: Progress = UNSEEN,
) -> Report:
    """Write a backup of a volume to the file `target` (`-`: standard output). Raises UserError."""
    report = Report()
    if since is not None and target != "-":
        _keep_bases(since, target)
    if _is_empty_memory(volumes, name):
        report.note(
            f"volume {quoted(name)} is in memory and not in use, so it is empty; back it up while it is used."
        )
    with volumes.working_on(name, "a backup") as volume, ExitStack() as stack:
        base_info, base = _base(since, volume, stack)
        path = stack.enter_context(volumes.used(name, "backup"))
        others = len(volumes.users(name)) > 1
        if target != "-":
            check_target(target, path)
        progress.reads_tree(path)
        out = stack.enter_context(output_to(target))
        started = time.time_ns()
        info: dict[str, Any] = {
            "format": 1,
            "id": str(uuid.uuid4()),
            "volume": volume.name,
            "driver": volume.driver,
            "options": dict(volume.options),
            "labels": dict(volume.labels),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started / 1e9)),
            "started": started,
            "base": base_info,
        }
        with written("backup", target):
            scratch = _hold_still(stack, volumes, volume, path, out, others, report)
            walker = Walker(path, report.note, leave_out=workspace.names(volume.directory))
            sink = WriteBehind(compressor(out, compress))
            stack.callback(sink.stop)
            contents = Contents(walker, report.note_unstable, scratch=scratch)
            writer = ArchiveWriter(Tar(sink), walker, contents, base=base, progress=progress)
            done = writer.write(info)
            sink.close()
        _tell_figures(report, done, incremental=base is not None)
    # The archive is complete: the manifest for `verify` is optional.
    with suppress(OSError):
        keep_manifest(volume, writer.copy_manifest)
    return report


def _tell_figures(report: Report, done: Pass, *, incremental: bool) -> None:
    how = [report.how] if report.how else []
    if report.unstable and not how:
        how = ["files that changed meanwhile were read again"]
    if incremental:
        how.append(f"{done.unchanged} unchanged in its base")
    report.total(done.entries - done.unchanged, done.read_bytes, ", ".join(how))


def _is_empty_memory(volumes: Volumes, name: str) -> bool:
    return volumes.get(name).options.get("type") == "tmpfs" and not volumes.users(name)


def _hold_still(
    stack: ExitStack,
    volumes: Volumes,
    volume: Volume,
    path: str,
    out: IO[bytes],
    others: bool,
    report: Report,
) -> str | None:
    """Freeze the volume's own filesystem, or without one return a directory for clones of its files."""
    if not others:
        return None
    status = os.fstat(out.fileno())
    elsewhere = stat.S_ISREG(status.st_mode) and status.st_dev != os.stat(path).st_dev
    if elsewhere and own_filesystem(path) and stack.enter_context(frozen(path)):
        report.how = "the volume's filesystem was frozen meanwhile"
        return None
    return find_driver(volume.driver).may_share(volume)


def _base(
    since: str | None, volume: Volume, stack: ExitStack
) -> tuple[dict[str, Any] | None, Base | None]:
    """Returns the archive's record of its base, and the base itself."""
    if since is None:
        return None, None
    reader = stack.enter_context(open_archive(since))
    with explained(since):
        for _ in reader.entries():
            pass
    if reader.info.get("volume") != volume.name:
        raise UserError(
            f"{quoted(since)} is a backup of the volume {quoted(str(reader.info.get('volume')))}, not of "
            f"{quoted(volume.name)}; give one of this volume."
        )
    info = {
        "id": reader.info["id"],
        "file": os.path.basename(since),
        "started": int(reader.info["started"]),
    }
    return info, Base(latest(reader.manifest_lines()), info["started"])


def _keep_bases(since: str, target: str) -> None:
    """Refuse to overwrite an archive that the incremental backup depends on."""
    seen: set[str] = set()
    while since not in seen:
        try:
            same = os.path.samefile(since, target)
        except (FileNotFoundError, NotADirectoryError):
            return
        if same:
            raise UserError(
                f"{quoted(target)} is needed to restore the incremental backups based on it "
                "(--since), so it cannot be replaced; give the new backup another name."
            )
        seen.add(since)
        with open_archive(since) as reader, explained(since):
            base = reader.info.get("base")
            if base is None:
                return
            since = os.path.join(os.path.dirname(since), os.path.basename(str(base["file"])))


@contextmanager
def open_archive(
    source: str, *, nothing: str = "", progress: Progress = UNSEEN
) -> Iterator[ArchiveReader]:
    """Open the archive `source` (`-`: standard input). Raises UserError; `nothing` as for `explained`."""
    with on_failure(f"the backup {quoted(source)} cannot be read", "check its path"):
        raw = open(0 if source == "-" else source, "rb", buffering=0, closefd=source != "-")  # noqa: SIM115
        if stat.S_ISDIR(os.fstat(raw.fileno()).st_mode):
            raise IsADirectoryError(21, "it is a directory")
    try:
        progress.reads_file(raw.fileno())
        with explained(source, nothing=nothing):
            reader = ArchiveReader(decompressor(raw))
        yield reader
    finally:
        with suppress(OSError):  # it was only read
            raw.close()


def read_whole(reader: ArchiveReader, report: Report, progress: Progress) -> None:
    """Read an archive to its end and add its figures to the report. Raises Malformed."""
    for _ in reader.entries():
        content = reader.content()
        progress(report.entries + reader.count, report.size + reader.read_bytes)
        content = progress.along(content)
        for _ in content:
            pass
    for _ in reader.deleted():
        pass
    report.count(reader.count, reader.read_bytes)


@contextmanager
def explained(source: str, *, nothing: str = "") -> Iterator[None]:
    """Turn errors in an archive into a UserError; `nothing` is the consequence, "nothing was restored"."""
    shown = "standard input" if source == "-" else quoted(source)
    cure = f"{nothing}. Use another copy of it." if nothing else "use another copy of it."
    try:
        yield
    except Malformed as error:
        raise UserError(f"the backup {shown} cannot be trusted: {error}; {cure}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the backup {shown} cannot be trusted: it is malformed ({error}); {cure}") from error


def keep_manifest(volume: Volume, copy: Callable[[IO[bytes]], None]) -> None:
    """Store a manifest beside the volume's data."""
    with replacing(f"{volume.directory}/{MANIFEST}", sync=False) as out:
        copy(out)


def backed_up(volume: Volume) -> float | None:
    """Return when the volume was last backed up or restored (seconds since the epoch), None if not known."""
    try:
        return os.lstat(f"{volume.directory}/{MANIFEST}").st_mtime
    except OSError:
        return None


# -- verify ------------------------------------------------------------------------------------------------


def verify_archive(source: str, progress: Progress = UNSEEN) -> Report:
    """Read an archive to its end and check it against its manifest. Raises UserError on a mismatch."""
    report = Report()
    with open_archive(source, progress=progress) as reader, explained(source):
        read_whole(reader, report, progress)
        # An incremental archive also names entries stored in its base.
        for _ in latest(reader.manifest_lines()):
            pass
        base = reader.info.get("base")
        if base is not None:
            report.how = f"incremental, on top of {quoted(str(base['file']))}"
    return report


@dataclass
class Differences:
    """How a volume differs from the manifest of its last backup or restore."""

    entries: int = 0
    damaged: list[str] = field(default_factory=list)
    """Content that differs although size and times are unchanged."""
    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)


def verify_volume(volumes: Volumes, name: str, progress: Progress = UNSEEN) -> Differences:
    """Compare a volume's content with the manifest of its last backup or restore. Raises UserError."""
    found = Differences()
    with volumes.working_on(name, "a verification") as volume, volumes.used(name, "verification") as path:
        try:
            source = open(f"{volume.directory}/{MANIFEST}", "rb")  # noqa: SIM115
        except FileNotFoundError:
            raise UserError(
                f"volume {quoted(name)} has no manifest to be verified against; make a backup of it first."
            ) from None
        with source, explained(f"{volume.directory}/{MANIFEST}"):
            walker = Walker(path, lambda sentence: None, leave_out=workspace.names(volume.directory))
            known = Beside(latest(read_manifest(source)), lambda old: found.missing.append(_shown(old)))
            contents = Contents(walker, lambda entry: None)
            progress.reads_tree(path)
            add = partial(_compare, known, found)
            Pass(walker, contents, Members(), add, progress=progress).run()
            known.finish()
    return found


def _compare(known: Beside, found: Differences, raw: bytes) -> None:
    new = Line(raw)
    if new.state == AGAIN:
        return
    found.entries += 1
    old = known.at(new.path)
    if old is None:
        found.added.append(_shown(new))
    elif old.shown != new.shown:
        same = (old.kind, old.size, old.mtime) == (new.kind, new.size, new.mtime)
        (found.damaged if same and old.digest != new.digest else found.changed).append(_shown(new))


def _shown(line: Line) -> str:
    return os.fsdecode(escape(line.path))
