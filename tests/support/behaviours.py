"""What a program sees of a union: one row a behaviour, one column a filesystem that shows the same layers.

A row is a generator: it makes its part of the lower, and yields; then everything is mounted. It may yield
again, when everything is mounted anew, and once more, when the upper has become the topmost lower under a new
upper. It returns its cell; an OSError is a cell too. All rows of a column share one mount.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import shutil
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import acl, actions, areas, mounting, syscalls, tables
from tests.support.worker import Worker

DATA = b"some data " * 30_000
"""300 KB: as many blocks in a copy."""
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS, _FS_IMMUTABLE_FL, _FS_APPEND_FL = 0x80086601, 0x40086602, 0x10, 0x20
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Column:
    """A filesystem. ``session``: a session of `mounting.mounted`, `kernel`, or empty for a directory."""

    session: str = ""
    options: tuple[str, ...] = ()


_ALL_ON = ("redirect_dir=on", "index=on", "metacopy=on", "xino=on")
COLUMNS = {
    "native": Column(),
    "overlayfs": Column("kernel"),
    "overlayfs, all on": Column("kernel", _ALL_ON),
    "fuse-overlayfs": Column("fuse-overlayfs"),
    "hybrid": Column("direct-hybrid"),
    "passthrough": Column("direct-passthrough"),
    "cached": Column("direct-cached"),
    "pyfuse3": Column("pyfuse3"),
    "hybrid, all on": Column("direct-hybrid", _ALL_ON),
}
"""By title."""


@dataclass
class Place:
    """A row's own directory: in the lower, and, once mounted, in the merged tree and in the upper."""

    lower: Path
    root: Path = Path()
    upper: Path = Path()
    users: list[Worker] = field(default_factory=list)

    def make(self, name: str, data: bytes = DATA) -> Path:
        """A file of the lower; returns its name in the lower."""
        path = self.lower / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    @property
    def user(self) -> Worker:
        """A process of an ordinary user, uid 1000 in the group 1000 alone."""
        if not self.users:
            self.users.append(Worker(uid=1000, gid=1000))
        return self.users[0]


Looks = Generator[None, None, str]
Row = Callable[[Place], Looks]


def _is(condition: bool) -> str:
    return "yes" if condition else "no"


def _ino(path: Path) -> int:
    return path.lstat().st_ino


# -- names ---------------------------------------------------------------------------------------------


def renamed_directory(place: Place) -> Looks:
    """Whether its content is there under the new name, at once and later."""
    place.make("d/sub/f", b"1")
    yield
    (place.root / "d").rename(place.root / "e")
    (place.root / "d").mkdir()
    found = [sorted(os.listdir(place.root / name)) for name in ("d", "e", "e/sub")]
    yield
    again = [sorted(os.listdir(place.root / name)) for name in ("d", "e", "e/sub")]
    return _is(found == again == [[], ["sub"], ["f"]])


def exchanged_directories(place: Place) -> Looks:
    place.make("a/of-a")
    place.make("b/of-b")
    yield
    syscalls.renameat2(os.fsencode(place.root / "a"), os.fsencode(place.root / "b"), syscalls.RENAME_EXCHANGE)
    yield
    return _is([os.listdir(place.root / name) for name in ("a", "b")] == [["of-b"], ["of-a"]])


def whiteouts_of_others(place: Place) -> Looks:
    """AUFS's names: `.wh.gone` hides nothing of its own layer, so here only its own name must not show."""
    place.make(".wh.gone", b"")
    yield
    return _is(not os.listdir(place.root))


def rename_leaving_a_whiteout(place: Place) -> Looks:
    place.make("f")
    yield
    old, new = os.fsencode(place.root / "f"), os.fsencode(place.root / "g")
    syscalls.renameat2(old, new, syscalls.RENAME_WHITEOUT)
    return "yes"


def whiteout_by_hand(place: Place) -> Looks:
    yield
    os.mknod(place.root / "w", stat.S_IFCHR, 0)
    return "yes"


def small_cookies(place: Place) -> Looks:
    """A 32-bit program cannot read others: getdents(2) ends with EOVERFLOW."""
    for number in range(40):
        place.make(f"name-{number}", b"")
    yield
    fd = os.open(place.root, os.O_RDONLY)
    try:
        return _is(all(0 <= entry.offset < 1 << 31 for entry in syscalls.list_directory(fd)))
    finally:
        os.close(fd)


# -- numbers and links ---------------------------------------------------------------------------------


def one_number(place: Place) -> Looks:
    os.link(place.make("a"), place.lower / "b")
    yield
    return _is(_ino(place.root / "a") == _ino(place.root / "b"))


def one_file(place: Place) -> Looks:
    """A write by one name shows by the other, at once and later, and both are still links of one file."""
    os.link(place.make("a"), place.lower / "b")
    yield
    (place.root / "a").write_bytes(b"new")
    found = (place.root / "b").read_bytes() == b"new"
    yield
    same = _ino(place.root / "a") == _ino(place.root / "b") and (place.root / "a").stat().st_nlink == 2
    return _is(found and same and (place.root / "b").read_bytes() == b"new")


def counted_links(place: Place) -> Looks:
    """After one of three names was removed."""
    path = place.make("a")
    os.link(path, place.lower / "b")
    os.link(path, place.lower / "c")
    yield
    (place.root / "c").unlink()
    return str((place.root / "a").stat().st_nlink)


def _kept_number(make: Callable[[Place], Path], change: Callable[[Path], None], stages: int) -> Row:
    def row(place: Place) -> Looks:
        name = make(place).relative_to(place.lower)
        yield
        before = _ino(place.root / name)
        change(place.root / name)
        found = [_ino(place.root / name)]
        for _ in range(stages):
            yield
            found.append(_ino(place.root / name))
        return _is(set(found) == {before})

    return row


def _directory(place: Place) -> Path:
    return place.make("d/f").parent


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def listed_number(place: Place) -> Looks:
    """d_ino of a lower's file, of one that is copied up and of a directory."""
    place.make("f")
    place.make("g")
    place.make("d/f")
    yield
    _append(place.root / "g")
    fd = os.open(place.root, os.O_RDONLY)
    try:
        listed = {os.fsdecode(entry.name): entry.ino for entry in syscalls.list_directory(fd)}
    finally:
        os.close(fd)
    return _is(all(listed[name] == _ino(place.root / name) for name in ("f", "g", "d")))


def directory_links(place: Place) -> Looks:
    """Natively two, and one for each subdirectory."""
    place.make("d/one/f")
    yield
    (place.root / "d/two").mkdir()
    return str((place.root / "d").stat().st_nlink)


def removed_links(place: Place) -> Looks:
    place.make("f")
    yield
    with (place.root / "f").open("rb") as file:
        (place.root / "f").unlink()
        return str(os.fstat(file.fileno()).st_nlink)


def _handle(path: Path) -> ctypes.Array[ctypes.c_char]:
    buffer = ctypes.create_string_buffer(struct.pack("=Ii", 128, 0), 136)
    mount_id = ctypes.c_int()
    if _libc.name_to_handle_at(syscalls.AT_FDCWD, os.fsencode(path), buffer, ctypes.byref(mount_id), 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return buffer


def handle_of_the_removed(place: Place) -> Looks:
    """What open_by_handle_at(2) opens once other files were made; in the worst of many tries."""
    tries = 30
    yield
    handles = []
    for number in range(tries):
        path = place.root / f"old-{number}"
        path.write_bytes(b"old")
        handles.append(_handle(path))
        path.unlink()
    time.sleep(0.2)  # until the daemon has freed the inodes
    for number in range(2 * tries):
        (place.root / f"new-{number}").write_bytes(b"new")
    mount = os.open(place.root, os.O_RDONLY)
    found = set()
    try:
        for handle in handles:
            fd = _libc.open_by_handle_at(mount, handle, os.O_RDONLY)
            if fd < 0:
                found.add(errno.errorcode[ctypes.get_errno()])
            else:
                with open(fd, "rb") as file:
                    found.add("another file" if file.read() == b"new" else "the removed file")
    finally:
        os.close(mount)
    return max(found)


# -- data and metadata ---------------------------------------------------------------------------------


def chmod_alone(place: Place) -> Looks:
    """Whether the upper then holds the data."""
    place.make("f")
    yield
    (place.root / "f").chmod(0o600)
    if place.upper == place.root:
        return "no"
    return _is((place.upper / "f").lstat().st_blocks * 512 >= len(DATA))


def _flagged(flag: int) -> Row:
    def row(place: Place) -> Looks:
        path = place.make("f", b"old")
        fd = os.open(path, os.O_RDONLY)
        try:
            _set_flags(fd, flag)
            yield
            (place.root / "f").write_bytes(b"new")
            return "yes"
        finally:
            _set_flags(fd, 0)
            os.close(fd)

    return row


def _set_flags(fd: int, flags: int) -> None:
    found = struct.unpack("=i", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, b"\0" * 4))[0]
    found &= ~(_FS_IMMUTABLE_FL | _FS_APPEND_FL)
    fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("=i", found | flags))


def lower_atime(place: Place) -> Looks:
    """Natively it moves, as it was before the mtime (relatime)."""
    path = place.make("f")
    os.utime(path, (1, 2))
    yield
    (place.root / "f").read_bytes()
    return _is(path.stat().st_atime != 1 or (place.root / "f").stat().st_atime != 1)


def mapped_store(place: Place) -> Looks:
    """Whether stat(2) shows the mtime of a store through a mapping once it is unmapped."""
    yield
    path = place.root / "f"
    path.write_bytes(DATA)
    os.utime(path, (1, 1))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[0] = 0x78
    return _is(path.stat().st_mtime != 1)


def idle_setgid(place: Place) -> Looks:
    """setgid without group execute after a write by somebody outside the group."""
    yield
    path = place.root / "f"
    path.write_bytes(b"x")
    path.chmod(0o2666)
    place.user.call(actions.write_at, str(path), b"y", 0)
    return f"{stat.S_IMODE(path.stat().st_mode):o}"


def default_acl(place: Place) -> Looks:
    """Mode of a file made under umask 077 where a default ACL grants more."""
    yield
    os.setxattr(place.root, acl.DEFAULT, acl.simple(7, 7, 7, users={1000: 7}, mask=7))
    old = os.umask(0o077)
    try:
        os.close(os.open(place.root / "f", os.O_CREAT | os.O_WRONLY, 0o666))
    finally:
        os.umask(old)
    return f"{stat.S_IMODE((place.root / 'f').stat().st_mode):o}"


def own_xattrs(place: Place) -> Looks:
    """A container's own overlayfs needs them."""
    yield
    path = place.root / "d"
    path.mkdir()
    os.setxattr(path, "trusted.overlay.opaque", b"y")
    return _is(os.getxattr(path, "trusted.overlay.opaque") == b"y")


def busy_program(place: Place) -> Looks:
    """Writing to a program of a lower while it runs."""
    shutil.copy2("/bin/sleep", place.lower / "sleep")
    yield
    with subprocess.Popen([place.root / "sleep", "20"]) as process:
        try:
            os.close(os.open(place.root / "sleep", os.O_WRONLY))
        finally:
            process.kill()
    return "yes"


def reopened(place: Place) -> Looks:
    """Opening /proc/self/fd/N of a removed lower file for writing."""
    place.make("f")
    yield
    with (place.root / "f").open("rb") as file:
        (place.root / "f").unlink()
        os.close(os.open(f"/proc/self/fd/{file.fileno()}", os.O_WRONLY))
    return "yes"


# -- calls that not every filesystem has ---------------------------------------------------------------


def hole(place: Place) -> Looks:
    path = place.make("f", b"x")
    os.truncate(path, 1 << 20)
    yield
    with (place.root / "f").open("rb") as file:
        return _is(os.lseek(file.fileno(), 0, os.SEEK_HOLE) < 1 << 20)


def punched(place: Place) -> Looks:
    place.make("f")
    yield
    with (place.root / "f").open("r+b") as file:
        keep_size_and_punch = 3
        length = ctypes.c_long(4096)
        if _libc.fallocate(file.fileno(), keep_size_and_punch, ctypes.c_long(0), length):
            return errno.errorcode[ctypes.get_errno()]
        return _is(os.pread(file.fileno(), 4096, 0) == b"\0" * 4096)


def nameless(place: Place) -> Looks:
    yield
    fd = os.open(place.root, os.O_TMPFILE | os.O_RDWR)
    try:
        # With a directory fd Python calls linkat(2), with AT_SYMLINK_FOLLOW.
        os.link(f"/proc/self/fd/{fd}", place.root / "f", src_dir_fd=fd, follow_symlinks=True)
    finally:
        os.close(fd)
    return "yes"


def copied_range(place: Place) -> Looks:
    place.make("f")
    yield
    with (place.root / "f").open("rb") as source, (place.root / "g").open("wb") as target:
        return _is(os.copy_file_range(source.fileno(), target.fileno(), 100) == 100)


ROWS: dict[str, Row] = {
    "a directory of a lower is renamed": renamed_directory,
    "two of them are exchanged": exchanged_directories,
    "`RENAME_WHITEOUT`": rename_leaving_a_whiteout,
    "making a character device 0/0": whiteout_by_hand,
    "`.wh.` names are hidden": whiteouts_of_others,
    "directory offsets fit into 31 bits": small_cookies,
    "names of one lower file have one `st_ino`": one_number,
    "they stay one file when it is changed": one_file,
    "`st_nlink` after one of three was removed": counted_links,
    "`st_ino` stays at copy-up: file": _kept_number(lambda place: place.make("f"), _append, 0),
    "`st_ino` stays at copy-up: directory": _kept_number(_directory, lambda path: path.chmod(0o700), 0),
    "it stays at a remount: file": _kept_number(lambda place: place.make("f"), _append, 1),
    "it stays at a remount: directory": _kept_number(_directory, lambda path: path.chmod(0o700), 1),
    "it stays under a new upper: file": _kept_number(lambda place: place.make("f"), _append, 2),
    "it stays under a new upper: directory": _kept_number(_directory, lambda path: path.chmod(0o700), 2),
    "`d_ino` is `st_ino`": listed_number,
    "`st_nlink` of a merged directory with two": directory_links,
    "`st_nlink` of an open removed lower file": removed_links,
    "a handle of a removed file": handle_of_the_removed,
    "`chmod` of a lower file copies its data": chmod_alone,
    "writing to a lower file with `+i`": _flagged(_FS_IMMUTABLE_FL),
    "truncating one with `+a`": _flagged(_FS_APPEND_FL),
    "reading a lower file moves its atime": lower_atime,
    "a store through a mapping shows in mtime": mapped_store,
    "mode 2666 after a stranger's write": idle_setgid,
    "mode under a default ACL and umask 077": default_acl,
    "`trusted.overlay.*` of one's own": own_xattrs,
    "writing to a running program": busy_program,
    "opening a removed lower file again, to write": reopened,
    "`SEEK_HOLE`": hole,
    "punching a hole": punched,
    "`O_TMPFILE`, then `linkat`": nameless,
    "`copy_file_range`": copied_range,
}


# -- running -------------------------------------------------------------------------------------------


class _Running:
    """All rows of a column; a row that has ended has its cell."""

    def __init__(self, rows: dict[str, Row], lower: Path) -> None:
        self.cells: dict[str, str] = {}
        self._places = {title: Place(lower / f"{index:02}") for index, title in enumerate(rows)}
        for place in self._places.values():
            place.lower.mkdir()
            place.lower.chmod(0o777)
        self._looks = {title: rows[title](place) for title, place in self._places.items()}

    def go_on(self, root: Path | None = None, upper: Path | None = None) -> bool:
        """Each row does its next part; returns whether any is left."""
        for title, looks in list(self._looks.items()):
            place = self._places[title]
            if root is not None:
                place.root = root / place.lower.name
                place.upper = place.root if upper is None else upper / place.lower.name
            try:
                next(looks)
            except StopIteration as end:
                self.cells[title] = end.value
            except OSError as error:
                self.cells[title] = errno.errorcode[error.errno or 0]
            if title in self.cells:
                del self._looks[title]
        return bool(self._looks)

    def close(self) -> None:
        for looks in self._looks.values():
            looks.close()
        for place in self._places.values():
            for user in place.users:
                user.kill()


def table() -> list[str]:
    """The lines of the table."""
    return tables.table({title: cells(title) for title in COLUMNS})


@functools.cache
def cells(title: str) -> dict[str, str]:
    """The cells of a column, by the titles of their rows."""
    column = COLUMNS[title]
    with areas.area() as area:
        lower, upper, second, work, second_work = (area / str(number) for number in range(5))
        for path in (lower, upper, second, work, second_work):
            path.mkdir()
        running = _Running(ROWS, lower)
        with contextlib.closing(running):
            running.go_on()
            if not column.session:
                while running.go_on(lower):
                    pass
                return {row: running.cells[row] for row in ROWS}
            for lowers, top, room in (
                ([lower], upper, work),
                ([lower], upper, work),
                ([upper, lower], second, second_work),
            ):
                with _mounted(column, area, lowers, top, room) as mount:
                    running.go_on(mount.mountpoint, top)
        return {row: running.cells[row] for row in ROWS}


def _mounted(
    column: Column, area: Path, lowers: list[Path], upper: Path, work: Path
) -> contextlib.AbstractContextManager[mounting.Mount]:
    if column.session == "kernel":
        return mounting.kernel_mounted(
            area, lowers=lowers, upper=upper, work=work, options=column.options, name="merged"
        )
    return mounting.mounted(
        area, lowers=lowers, upper=upper, work=work, session=column.session, options=column.options
    )
