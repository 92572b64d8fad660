"""Restores and clones volumes: new content is completed beside the old, then replaces it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from unionfs.errors import UserError, on_failure, quoted
from unionfs.storage import workspace
from unionfs.storage.archive import manifest
from unionfs.storage.archive.content import Contents
from unionfs.storage.archive.entry import FILE, SPARSE
from unionfs.storage.archive.extract import Extractor
from unionfs.storage.archive.headers import Malformed
from unionfs.storage.archive.manifest import latest
from unionfs.storage.archive.progress import UNSEEN, Progress
from unionfs.storage.archive.read import ArchiveReader
from unionfs.storage.archive.walk import Walker
from unionfs.storage.backup import Report, explained, keep_manifest, open_archive, read_whole
from unionfs.storage.drivers import find_driver
from unionfs.storage.model import VolumeUser
from unionfs.storage.volumes import Volume, Volumes
from unionfs.sys.calls import syncfs
from unionfs.sys.fds import directory
from unionfs.union.filedata import clone as clone_data
from unionfs.union.filedata import copy_data

_LONGEST_CHAIN = 1000
_NOTHING = "nothing was restored"
_Chain = list[tuple[str, ArchiveReader]]


def restore(
    volumes: Volumes,
    name: str,
    source: str,
    *,
    bases: Sequence[str] = (),
    create: bool = False,
    progress: Progress = UNSEEN,
) -> Report:
    """Replace a volume's content with the archive `source` (`-`: standard input). Raises UserError.

    The bases of an incremental archive are searched beside it and in `bases`. With `create`, a missing volume
    is created as the archive describes it, and removed again if the restore fails.
    """
    with ExitStack() as stack:
        opened = partial(open_chain, source, bases, stack, _NOTHING, progress)
        if not create or volumes.exists(name):
            return _restore(volumes, name, opened, progress)
        chain = opened()
        _create_described(volumes, name, source, chain[-1][1].info)
        try:
            return _restore(volumes, name, lambda: chain, progress)
        except BaseException:
            with suppress(UserError):
                volumes.remove(name)
            raise


def _create_described(volumes: Volumes, name: str, source: str, described: Mapping[str, Any]) -> None:
    """Create the volume that an archive describes. Raises UserError.

    An archive is not trusted: it must not choose a directory of this host, a server, or a plugin.
    """
    driver, options, labels = (described.get(key) or {} for key in ("driver", "options", "labels"))
    if not (isinstance(options, dict) and isinstance(labels, dict)):
        options, labels = {}, {}
    words = {str(key): str(value) for key, value in options.items()}
    is_tmpfs = words.get("type") == "tmpfs" and set(words) <= {"type", "device", "o"}
    if driver != "local" or not (is_tmpfs or set(words) <= {"size", "fs"}):
        shown = " ".join([f"-d {driver}", *(f"-o {key}={value}" for key, value in words.items())])
        raise UserError(
            f"the backup {quoted(source)} is of a volume with storage elsewhere ({quoted(shown)}), which is "
            "not taken from an archive; create it by `unionfs volume create`, and restore without --create."
        )
    volumes.create(
        name, driver="local", options=words, labels={str(key): str(value) for key, value in labels.items()}
    )


def _restore(
    volumes: Volumes, name: str, opened: Callable[[], _Chain], progress: Progress
) -> Report:
    """Restore from the archives that `opened` returns, which is called when the volume can be restored."""
    report = Report()
    with volumes.working_on(name, "a restore") as volume, ExitStack() as stack:
        with volumes.still(name, "restored"):
            pass
        find_driver(volume.driver).restores_mounted(volume)
        chain = opened()
        fill(
            volumes, volume, stack, report, "restored",
            lambda extractor: _apply(extractor, chain, report, progress),
        )  # fmt: skip
        last = chain[-1][1]
        if len(chain) > 1:
            report.total(*_state(last), f"from {len(chain)} archives")
        with suppress(OSError):
            keep_manifest(volume, last.copy_manifest)
    return report


def fill(
    volumes: Volumes,
    volume: Volume,
    stack: ExitStack,
    report: Report,
    what: str,
    create: Callable[[Extractor], None],
    extractor_for: Callable[[str, Callable[[str], None]], Extractor] = Extractor,
) -> None:
    """Let `create` make the volume's new content, then replace the old content with it."""
    driver = find_driver(volume.driver)
    user = VolumeUser.of_this_process("restore")
    mounted = driver.restores_mounted(volume)
    if mounted:
        volumes.attach(volume.name, user)
        stack.callback(_detach, volumes, volume, user, report)
    with on_failure(
        f"volume {quoted(volume.name)} cannot be {what}",
        "its content is as it was. Free space, or check its storage",
    ), driver.replacement(volume) as place:
        with extractor_for(place.path, report.note) as extractor:
            create(extractor)
            extractor.finish()
        with directory(place.path) as fd:
            syncfs(fd)
        # Another process may have started to use the volume.
        with volumes.still(volume.name, what, besides=user if mounted else ""):
            place.commit()


def _detach(volumes: Volumes, volume: Volume, user: str, report: Report) -> None:
    """Whether it can or not, the content is what it is now; the volume's next use tries again."""
    try:
        volumes.detach(volume.name, user)
    except UserError as error:
        report.note(f"volume {quoted(volume.name)} stays in use: {error}")


def open_chain(
    source: str, bases: Sequence[str], stack: ExitStack, nothing: str, progress: Progress = UNSEEN
) -> list[tuple[str, ArchiveReader]]:
    """The archives that make up a state, the full one first. Raises UserError when one is missing; `nothing`
    is as for `explained`.
    """
    chain = [(source, stack.enter_context(open_archive(source, nothing=nothing, progress=progress)))]
    while (base := chain[0][1].info.get("base")) is not None:
        path = chain[0][0]
        with explained(path, nothing=nothing):
            wanted, file = str(base["id"]), os.path.basename(str(base["file"]))
        if len(chain) > _LONGEST_CHAIN or any(other.info["id"] == wanted for _, other in chain):
            raise UserError(f"the backup {quoted(path)} has itself as its base; use another copy of it.")
        chain.insert(0, _find_base(path, wanted, file, bases, stack, nothing, progress))
    return chain


def _find_base(
    path: str, wanted: str, file: str, bases: Sequence[str], stack: ExitStack, nothing: str,
    progress: Progress,
) -> tuple[str, ArchiveReader]:  # fmt: skip
    beside = [] if path == "-" else [os.path.join(os.path.dirname(path), file)]
    for candidate in (*bases, *beside):
        if candidate in beside and not os.path.exists(candidate):
            continue
        opened = ExitStack()
        reader = opened.enter_context(open_archive(candidate, nothing=nothing, progress=progress))
        if reader.info["id"] == wanted:
            stack.enter_context(opened)
            return candidate, reader
        opened.close()
    raise UserError(
        f"the backup {quoted(path)} is incremental, and its base ({quoted(file)}, id "
        f"{quoted(wanted)}) is not beside it; name it by --base FILE."
    )


def _apply(
    extractor: Extractor, chain: list[tuple[str, ArchiveReader]], report: Report, progress: Progress
) -> None:
    before: ArchiveReader | None = None
    for path, reader in chain:
        with explained(path, nothing=_NOTHING):
            for entry in reader.entries():
                content = reader.content()
                progress(report.entries + reader.count, report.size + reader.read_bytes)
                content = progress.along(content)
                extractor.add(entry, content)
            for gone in reader.deleted():
                extractor.remove(gone)
            if before is not None:
                _check_base(before, reader)
        report.count(reader.count, reader.read_bytes)
        extractor.end_archive()
        before = reader


def _state(reader: ArchiveReader) -> tuple[int, int]:
    """Return the entries and bytes of content that an archive describes together with its bases."""
    entries = size = 0
    for line in latest(reader.manifest_lines()):
        entries += 1
        size += line.size if line.kind in (FILE, SPARSE) else 0
    return entries, size


def _check_base(base: ArchiveReader, reader: ArchiveReader) -> None:
    """Check that the base holds every entry the incremental archive refers to, unchanged."""
    known = manifest.Beside(latest(base.manifest_lines()))
    for line in latest(reader.manifest_lines()):
        if line.state != manifest.BASE:
            continue
        old = known.at(line.path)
        if old is None or old.shown != line.shown:
            raise Malformed(f"its base does not hold {os.fsdecode(manifest.escape(line.path))} as it says")


def verify_chain(source: str, bases: Sequence[str], progress: Progress = UNSEEN) -> Report:
    """Check the archives that `restore` would read, without a volume. Raises UserError if it would fail."""
    report = Report()
    with ExitStack() as stack:
        before: ArchiveReader | None = None
        for path, reader in open_chain(source, bases, stack, "", progress):
            with explained(path):
                read_whole(reader, report, progress)
                if before is not None:
                    _check_base(before, reader)
            before = reader
    return report


def clone(volumes: Volumes, source: str, target: str, *, progress: Progress = UNSEEN) -> Report:
    """Make the volume `target` with the driver, options, labels and content of `source`. Raises UserError."""
    report = Report()
    found = volumes.get(source)
    with volumes.working_on(source, "a clone"), volumes.used(source, "clone") as path, ExitStack() as stack:
        if volumes.exists(target):
            raise UserError(
                f"volume {quoted(target)} already exists; choose another name, or remove it first."
            )
        find_driver(found.driver).check_clone(found)
        made = volumes.create(target, driver=found.driver, options=found.options, labels=found.labels)
        try:
            with volumes.working_on(target, "a clone"):
                fill(
                    volumes, made, stack, report, "cloned",
                    lambda extractor: _copy(found, path, extractor, report, progress),
                )  # fmt: skip
                stack.close()
        except BaseException:
            # Remove an incomplete clone.
            with suppress(UserError):
                stack.close()
            with suppress(UserError):
                volumes.remove(target)
            raise
    return report


def _copy(volume: Volume, path: str, extractor: Extractor, report: Report, progress: Progress) -> None:
    walker = Walker(path, report.note, leave_out=workspace.names(volume.directory))
    contents = Contents(
        walker,
        lambda entry: report.note(f"{quoted(entry.path)} changed each time it was copied."),
    )
    progress.reads_tree(path)
    copied = 0
    shared, never = True, set[int]()
    for entry, fd in walker.entries():
        if entry.kind in (FILE, SPARSE):
            copied += 1
            for attempt, source in contents.attempts(entry, fd):
                with extractor.new_file(attempt) as target:
                    cloned = clone_data(source, target, 0, never)
                    if not cloned:
                        told = progress.within()
                        copy_data(source, target, attempt.size, told, dense=attempt.kind != SPARSE)
            shared &= cloned
            report.count(1, entry.size)
        else:
            extractor.add(entry)
            report.count(1, 0)
        progress(report.entries, report.size)
    if copied and shared:
        report.shared_blocks()
