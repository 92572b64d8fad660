"""Who sees what when a lower file is copied up under live users, in every place, with each kind of writer.

One process uses a lower file (a row: an old descriptor, a mapping, a lock, a watch), another changes it (a
writer: a way to open and change a file), and a cell is what the user then sees. The places are a native
filesystem, kernel overlayfs and each session of the union.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import select
import stat
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import areas, mounting, snapshot, syscalls, tables
from tests.support.worker import Worker
from tests.support.writers import OLD, PAGE, PROGRAM, WRITERS, begin, end, lock

PLACES = {
    "native": "native",
    "overlay": "overlayfs",
    "direct-hybrid": "hybrid",
    "direct-passthrough": "passthrough",
    "direct-cached": "cached",
    "pyfuse3": "pyfuse3",
}
"""The places, a native filesystem or a session of ``mounting``, and their columns' titles."""

PROGRAMS = "direct-hybrid"
"""The place with another column, for programs and libraries."""
PROGRAMS_TITLE = "hybrid, programs"

REFUSED, SAME = "refused", "-"
"""Cells without a result: nothing was written; old and new look the same."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


# -- rows: who uses the file ---------------------------------------------------------------------------

Row = Callable[[Path, bytes, bytes, Worker], Iterator[str]]
"""Uses the file and yields once; then yields what it sees at that moment. The bytes: old and new content."""

_ALL = 2 * len(PROGRAM)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def _cell(found: object, old: object, new: object) -> str:
    if old == new:
        return SAME if found == new else repr(found)
    return "new" if found == new else "old" if found == old else repr(found)


def old_read(path: Path, old: bytes, new: bytes, worker: Worker) -> Iterator[str]:
    """read(2) on a descriptor that was opened before."""
    with _opened(path) as fd:
        os.pread(fd, _ALL, 0)
        yield ""
        while True:
            yield _cell(os.pread(fd, _ALL, 0), old, new)


def old_size(path: Path, old: bytes, new: bytes, worker: Worker) -> Iterator[str]:
    """fstat(2) on it."""
    with _opened(path) as fd:
        os.fstat(fd)
        yield ""
        while True:
            yield _cell(os.fstat(fd).st_size, len(old), len(new))


def old_mapping(path: Path, old: bytes, new: bytes, worker: Worker) -> Iterator[str]:
    """A shared mapping made before, with its page already read, of a closed file."""
    with _opened(path) as fd:
        address = _libc.mmap(None, PAGE, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    assert address != ctypes.c_void_p(-1).value

    def page() -> bytes:
        buffer = ctypes.create_string_buffer(PAGE)
        _libc.memcpy(buffer, address, PAGE)
        return buffer.raw

    before, after = (content[:PAGE].ljust(PAGE, b"\0") for content in (old, new))
    try:
        assert page() == before
        yield ""
        while True:
            yield _cell(page(), before, after)
    finally:
        _libc.munmap(address, PAGE)


def locked(call: str) -> Row:
    """A shared lock through an old descriptor, against the exclusive one wanted through a new one."""

    def row(path: Path, old: bytes, new: bytes, worker: Worker) -> Iterator[str]:
        with _opened(path) as fd:
            if call == "flock":
                fcntl.flock(fd, fcntl.LOCK_SH)
            else:
                fcntl.fcntl(fd, fcntl.F_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
            yield ""
            while True:
                code = worker.errno(lock, str(path), call)
                assert code in (0, errno.EAGAIN), os.strerror(code)
                yield "meet" if code else "do not meet"

    return row


def watched(path: Path, old: bytes, new: bytes, worker: Worker) -> Iterator[str]:
    """An inotify watch on the path, set before by a process that has the file open."""
    with _opened(path):
        fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            modified = 0x2
            assert _libc.inotify_add_watch(fd, os.fsencode(path), modified) >= 0
            yield ""
            while True:
                ready, _, _ = select.select([fd], [], [], 0.1)
                yield "event" if ready else "no event"
        finally:
            os.close(fd)


def reopened(flags: int) -> Row:
    """Opening /proc/self/fd/N of an old descriptor again."""

    def row(path: Path, old: bytes, new: bytes, worker: Worker) -> Iterator[str]:
        with _opened(path) as fd:
            yield ""
            while True:
                try:
                    again = os.open(f"/proc/self/fd/{fd}", flags)
                except OSError as error:
                    yield os.strerror(error.errno or 0)
                    continue
                found = os.pread(again, _ALL, 0)
                if flags != os.O_RDONLY:
                    os.pwrite(again, found[:1], 0)
                os.close(again)
                yield _cell(found, old, new)

    return row


def links(path: Path, old: bytes, new: bytes, worker: Worker) -> Iterator[str]:
    """st_nlink of an old descriptor."""
    with _opened(path) as fd:
        yield ""
        while True:
            yield str(os.fstat(fd).st_nlink)


WRITING, WRITING_UNLINKED = "the writer", "unlinked, then written: the writer"
ROWS: dict[str, Row] = {
    "read of an old descriptor": old_read,
    "its fstat size": old_size,
    "an old mapping": old_mapping,
    "flock, old and new descriptor": locked("flock"),
    "POSIX lock, old and new descriptor": locked("lockf"),
    "inotify watch on the path": watched,
    "old descriptor opened again for writing": reopened(os.O_RDWR),
    "old descriptor opened again for reading": reopened(os.O_RDONLY),
}
UNLINKED_ROWS: dict[str, Row] = {
    "unlinked, then written: read of an old descriptor": old_read,
    "unlinked, then written: its st_nlink": links,
}
IN_ORDER = (WRITING, *ROWS, WRITING_UNLINKED, *UNLINKED_ROWS)
"""All rows, from top to bottom."""


# -- trying --------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """One writer under one user. ``content``: of the file in the end; ``upper``: the name in the upper."""

    row: str
    writer: str
    unlinked: bool
    program: bool
    cell: str = REFUSED
    code: int = 0
    content: bytes | None = None
    upper: bytes | str | None = None
    upper_later: bytes | str | None = None

    @property
    def name(self) -> str:
        """The file's name."""
        rows = [*ROWS, *UNLINKED_ROWS]
        return f"{rows.index(self.row)}-{list(WRITERS).index(self.writer)}"

    @property
    def old(self) -> bytes:
        """The file's content before."""
        return PROGRAM if self.program else OLD

    @property
    def final(self) -> bytes:
        """What the writer makes of it."""
        return WRITERS[self.writer].final(self.old)


@dataclass
class Tried:
    """One place. The lower before and after, from `snapshot.take` (empty for a native filesystem)."""

    trials: list[Trial]
    before: snapshot.Tree
    after: snapshot.Tree

    def cells(self) -> dict[tuple[str, str], str]:
        """What was seen, by row and writer; also whether the writers could write."""
        found = {(trial.row, trial.writer): trial.cell for trial in self.trials}
        for trial in self.trials:
            row = WRITING_UNLINKED if trial.unlinked else WRITING
            found[row, trial.writer] = os.strerror(trial.code) if trial.code else "writes"
        return found


def _stored(path: Path) -> bytes | str | None:
    try:
        info = path.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
        return "whiteout"
    return path.read_bytes()


def _try(trial: Trial, root: Path, worker: Worker) -> None:
    path = root / trial.name
    row = (UNLINKED_ROWS if trial.unlinked else ROWS)[trial.row]
    looks = row(path, trial.old, trial.final, worker)
    with contextlib.closing(looks):  # type: ignore[type-var]
        next(looks)
        try:
            worker.call(begin, str(path), trial.writer, trial.unlinked)
        except OSError as error:
            trial.code = error.errno or 0
            worker.call(end)
        else:
            during = next(looks)
            trial.content = worker.call(end)
            after = next(looks)
            trial.cell = after if after == during else f"{during}, then {after}"
    if not trial.unlinked:
        trial.content = path.read_bytes()


@contextlib.contextmanager
def _read_only(lower: Path) -> Iterator[Path]:
    """The lower on a filesystem that is mounted read-only."""
    where = lower.parent / "read-only"
    where.mkdir()
    syscalls.mount(str(lower), where, "", syscalls.MS_BIND)
    try:
        syscalls.mount("", where, "", syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY)
        yield where
    finally:
        syscalls.umount(where)


@functools.cache
def tried(place: str, *, read_only: bool = False, program: bool = False) -> Tried:
    """Try every writer under every user of data, or of a ``program``, in one place.

    Raises what ``mounting.mounted`` raises.
    """
    trials = [Trial(row, writer, False, program) for row in ROWS for writer in WRITERS]
    named = [writer for writer in WRITERS if WRITERS[writer].flags >= 0]
    trials += [Trial(row, writer, True, program) for row in UNLINKED_ROWS for writer in named]
    with areas.area() as area, Worker(modules=["tests.support.writers"]) as worker:
        lower, upper, work = (area / name for name in ("lower", "upper", "work"))
        for directory in (lower, upper, work):
            directory.mkdir()
        for trial in trials:
            (lower / trial.name).write_bytes(trial.old)
        if place == "native":
            for trial in trials:
                _try(trial, lower, worker)
            return Tried(trials, {}, {})
        before = snapshot.take(lower)
        with contextlib.ExitStack() as stack:
            layer = stack.enter_context(_read_only(lower)) if read_only else lower
            mount = stack.enter_context(
                mounting.mounted(area, lowers=[layer], upper=upper, work=work, session=place)
            )
            for trial in trials:
                _try(trial, mount.mountpoint, worker)
                trial.upper = _stored(upper / trial.name)
        for trial in trials:
            trial.upper_later = _stored(upper / trial.name)
        return Tried(trials, before, snapshot.take(lower))


# -- the table -----------------------------------------------------------------------------------------


def summary(cells: dict[str, str]) -> str:
    """The cells of all writers as one: the most frequent result, then the exceptions."""
    counted = Counter(cell for cell in cells.values() if cell not in (REFUSED, SAME))
    if not counted:
        return SAME
    (usual, _), *others = counted.most_common()
    exceptions = [
        f"{', '.join(name for name, cell in cells.items() if cell == other)}: {other}" for other, _ in others
    ]
    return "; ".join([usual, *exceptions])


def column(place: str, *, program: bool = False) -> dict[str, str]:
    """The cells of one place, by the titles of their rows."""
    cells = tried(place, program=program).cells()
    return {
        row: summary({writer: cell for (of, writer), cell in cells.items() if of == row}) for row in IN_ORDER
    }


def table() -> list[str]:
    """The lines of the table."""
    columns = {}
    for place, title in PLACES.items():
        columns[title] = column(place)
        if place == PROGRAMS:
            columns[PROGRAMS_TITLE] = column(place, program=True)
    return tables.table(columns)
