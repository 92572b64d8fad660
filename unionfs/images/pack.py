"""Layers in the kernel's format as the tar of one OCI layer (OCI image-spec, layer.md).

The topmost layers of a stack become the tar: one for an export, more to squash them. Those below are only
read for what a layer of an image cannot express, and so comes out whole: a directory that was renamed by a
redirect (opaque, with its merged content), a file whose data is in a lower (metacopy), and the other names of
a hard link that an index keeps together. Without these layers it is refused.

The same tree gives the same bytes: names are in the order of their bytes, each directory's whiteouts first;
access times and holes are not stored.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from unionfs.core.places import Place
from unionfs.core.search import PREFIX
from unionfs.errors import LayerError, quoted, reason
from unionfs.images.indexed import Index
from unionfs.storage.archive import acl
from unionfs.storage.archive.content import is_unchanged, pieces
from unionfs.storage.archive.entry import (
    BLOCK,
    CHARACTER,
    DIRECTORY,
    FIFO,
    FILE,
    HARDLINK,
    NO_XATTRS,
    SYMLINK,
    Entry,
)
from unionfs.storage.archive.tar import Tar
from unionfs.sys.attributes import ALL, read_xattrs
from unionfs.sys.fds import Owned
from unionfs.union.markers import ABSENT
from unionfs.union.merge import Found, Merge
from unionfs.union.named import INTERNAL, OPAQUE, hidden_name

_KINDS = {
    stat.S_IFREG: FILE, stat.S_IFLNK: SYMLINK, stat.S_IFIFO: FIFO, stat.S_IFCHR: CHARACTER,
    stat.S_IFBLK: BLOCK,
}  # fmt: skip
_UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EINVAL)
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_SMALL = 1 << 20
_NEEDS_LOWERS = "name its lowers by --lower, topmost first"


@dataclass(slots=True)
class Packed:
    """What was written."""

    entries: int = 0
    size: int = 0
    """Bytes of files."""
    whiteouts: int = 0
    notes: list[str] = field(default_factory=list)
    """Sentences about what was left out or changed meanwhile."""


@dataclass(slots=True)
class _Level:
    """A directory whose names are still to be written, the next one last."""

    path: bytes
    parts: list[Place]
    whole: bool
    names: list[tuple[bytes, Found]]


class Packer:
    """Writes the topmost `count` layers of a merge as a tar; `finish` of the tar is the caller's."""

    def __init__(
        self, merge: Merge, count: int, out: Tar, index: Index | None = None, *, may_have_index: bool = False
    ) -> None:
        """`index`: that of the upper, or None; with `may_have_index` there may be one that is not known."""
        self._merge = merge
        self._count = count
        self._out = out
        self._first: dict[int, bytes] = {}
        self._missing: dict[int, int] = {}  # how many names of a lower's file were not written
        self._index = index
        self._may_have_index = may_have_index
        self._written: set[bytes] = {b""}
        self.packed = Packed()

    def run(self) -> Packed:
        """Write everything. Raises LayerError for what needs lowers, and OSError."""
        roots = self._merge.roots
        self._add(_entry(b"", DIRECTORY, os.stat(self._merge.gate.fd(roots[0])), self._xattrs(roots[0])))
        # Where the stack ends above the lowest layer, a root is opaque (`.wh..wh..opq`).
        if len(roots) <= self._count and self._merge.named.cut(roots[-1]):
            self._mark(b"", OPAQUE)
        stack = [self._level(b"", roots, whole=False)]
        while stack:
            level = stack[-1]
            if not level.names:
                stack.pop()
                continue
            name, found = level.names.pop()
            path = level.path + b"/" + name if level.path else name
            with self._reading(path):
                if (below := self._name(level, name, path, found)) is not None:
                    stack.append(below)
        if any(self._missing.values()) or (self._index is not None and not self._index.is_empty()):
            self._other_names()
        return self.packed

    # -- directories --------------------------------------------------------------------------------------

    def _tops(self, parts: Sequence[Place]) -> list[Place]:
        return [part for part in parts if part.layer.index < self._count]

    def _level(self, path: bytes, parts: list[Place], *, whole: bool) -> _Level:
        """A directory, whose whiteouts are written at once."""
        listed = parts if whole else self._tops(parts)
        names = self._merge.listing(listed).entries().names() if whole else self._raw_names(listed)
        shown = []
        for name in sorted(names):
            found = self._merge.search(parts, name)
            if found is not None:
                shown.append((name, found))
            elif not whole:
                self._mark(path, PREFIX + name)
                self.packed.whiteouts += 1
        shown.reverse()
        return _Level(path, parts, whole, shown)

    def _raw_names(self, parts: Sequence[Place]) -> set[bytes]:
        """The names that real directories have or hide."""
        names: set[bytes] = set()
        for part in parts:
            with Owned(self._merge.gate.open_for_listing(part)) as fd:
                for name in map(os.fsencode, os.listdir(fd)):
                    if name.startswith(PREFIX):
                        if name.startswith(INTERNAL) or (hidden := hidden_name(name)) is None:
                            continue
                        name = hidden
                    names.add(name)
        return names

    @contextmanager
    def _reading(self, path: bytes) -> Iterator[None]:
        """Note what is removed meanwhile. Raises LayerError for what cannot be read."""
        try:
            yield
        except FileNotFoundError:
            self.packed.notes.append(f"{quoted(path)} was removed while it was read; it was left out.")
        except OSError as error:
            if error.errno not in _UNREADABLE:
                raise  # as of the output
            raise LayerError(
                f"{quoted(path)} cannot be read: {reason(error)}; make it readable, or run this as root."
            ) from error

    def _name(self, level: _Level, name: bytes, path: bytes, found: Found) -> _Level | None:
        """Write the entry of a name; returns a directory to continue with."""
        st, places = found
        if not stat.S_ISDIR(st.st_mode):
            self._object(level.parts, name, path, found)
            return None
        self._add(_entry(path, DIRECTORY, st, self._xattrs(places[0])))
        whole = level.whole
        if not whole and self._is_redirected(places, path):
            whole = True
            self._mark(path, OPAQUE)
        elif not whole and self._is_cut(level.parts, places, name):
            self._mark(path, OPAQUE)
        return self._level(path, places, whole=whole)

    def _is_redirected(self, places: Sequence[Place], path: bytes) -> bool:
        """Whether a redirect in a layer of the tar leads to other content. Raises LayerError without it."""
        for place in self._tops(places):
            if self._merge.markers.directory(self._merge.gate.fd(place)).redirect is None:
                continue
            if len(self._tops(self._merge.roots)) == len(self._merge.roots):
                raise _refuse(path, "was renamed without its content, which is in a lower (redirect)")
            return True
        return False

    def _is_cut(self, above: Sequence[Place], places: Sequence[Place], name: bytes) -> bool:
        """Whether the layers of the tar hide what those below have under a directory's name."""
        found = self._tops(places)
        if not found or any(self._merge.is_opaque(place) for place in found):
            return bool(found)
        # A removed name, or anything but a directory, in a deeper layer of the tar.
        last = found[-1].layer.index
        for part in self._tops(above):
            if part.layer.index <= last:
                continue
            try:
                os.stat(name, dir_fd=self._merge.gate.fd(part), follow_symlinks=False)
            except FileNotFoundError:
                if not self._merge.named.hides(part, self._merge.gate.fd(part), name):
                    continue
            return True
        return False

    # -- entries ------------------------------------------------------------------------------------------

    def _object(self, parts: Sequence[Place], name: bytes, path: bytes, found: Found) -> None:
        st, (place,) = found
        kind = _KINDS.get(stat.S_IFMT(st.st_mode))
        if kind is None:
            self.packed.notes.append(
                f"{quoted(path)} is a socket, which no archive can hold; it was left out."
            )
            return
        copy, layer = None, place.layer
        if layer.index < self._count:
            self._refuse_indexed(place, name, path)
        elif self._index is not None and (copy := self._index.find(name, found)) is not None:
            st, layer = copy.st, self._merge.roots[0].layer
        if st.st_nlink > 1:
            key = layer.key(st)
            first = self._first.setdefault(key, path)
            if layer.index >= self._count:
                self._missing[key] = self._missing.get(key, st.st_nlink) - 1
            if first != path:
                self._add(_entry(path, HARDLINK, st, NO_XATTRS, link=first))
                return
        if kind == FILE and copy is None and self._take(path, name, found):
            return
        data = partial(self._open_data, parts, name, path, place)
        if copy is not None and self._index is not None:
            where = b"/proc/self/fd/%d/%b" % (self._index.fd, copy.entry)
            with Owned(os.open(where, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
                self._write(path, kind, fd, where, partial(self._data_of_copy, where, data))
        else:
            with Owned(self._merge.open_object(found, name)) as fd:
                self._write(path, kind, fd, self._where(place, name), data)

    def _take(self, path: bytes, name: bytes, found: Found) -> bool:
        """Write a small file without xattrs, so with its own data; returns False for any other one.

        The bytes are those of `_write`, in as few steps as possible: most entries are such files. Raises
        OSError as that does.
        """
        st, (place,) = found
        size, mtime = st.st_size, st.st_mtime_ns
        if size > _SMALL:
            return False
        with Owned(self._merge.open_object(found, name)) as fd:
            try:
                reading = self._merge.gate.reopen(place.layer, fd, _READ)
            except OSError:
                return False
        with Owned(reading):
            try:
                if os.listxattr(reading):
                    return False
            except OSError:
                return False
            data = os.pread(reading, size + 1, 0)
            after = os.fstat(reading)
        if len(data) != size or (after.st_mtime_ns, after.st_ctime_ns, after.st_size) != (
            mtime, st.st_ctime_ns, size,
        ):  # fmt: skip
            return False
        mode = stat.S_IMODE(st.st_mode)
        if (header := self._out.plain_header(path, mode, st.st_uid, st.st_gid, size, mtime)) is not None:
            self._out.add_plain(header, data)
        else:
            self._out.add(_entry(path, FILE, st, NO_XATTRS, size=size), data)
        self.packed.entries += 1
        self.packed.size += size
        self._written.add(path)
        return True

    def _where(self, place: Place, name: bytes) -> bytes:
        return b"/proc/self/fd/%d/%b" % (self._merge.gate.fd(place), name)

    def _write(self, path: bytes, kind: str, fd: int, where: bytes, open_data: Callable[[int], int]) -> None:
        st = os.fstat(fd)
        xattrs = self._xattrs_of(where, path)
        if kind == FILE:
            with Owned(open_data(fd)) as data:
                # The size is that of a metacopy file, too.
                self._file(_entry(path, FILE, st, xattrs, size=st.st_size), data)
        elif kind == SYMLINK:
            link = os.fsencode(os.readlink("", dir_fd=fd))
            self._add(_entry(path, kind, st, xattrs, link=link))
        else:
            rdev = (os.major(st.st_rdev), os.minor(st.st_rdev)) if kind in (CHARACTER, BLOCK) else (0, 0)
            self._add(_entry(path, kind, st, xattrs, rdev=rdev))

    def _data_of_copy(self, where: bytes, of_lower: Callable[[int], int], fd: int) -> int:
        """The data of a copy in the index, which is the lower's if only its metadata was copied."""
        if self._merge.markers.metacopy_value(where) is None:
            return os.open(b"/proc/self/fd/%d" % fd, _READ)
        return of_lower(-1)

    def _open_data(self, parts: Sequence[Place], name: bytes, path: bytes, place: Place, fd: int) -> int:
        """The data of a file; `fd`: an O_PATH fd of it, or -1."""
        try:
            # By name: a path of the fd would be a symlink of procfs, which is not followed.
            data = self._merge.lower_data(parts, place, name, self._where(place, name))
        except OSError as error:
            if len(self._merge.roots) > self._count:
                raise LayerError(
                    f"the data of {quoted(path)} is in a lower (metacopy), where it cannot be found: "
                    f"{reason(error)}; check the lowers and their order."
                ) from error
            raise _refuse(path, "has its data in a lower (metacopy)") from error
        if data is not None:
            return self._merge.open_data(data)
        if fd < 0:
            return os.open(name, _READ | os.O_NOFOLLOW, dir_fd=self._merge.gate.fd(place))
        return self._merge.gate.reopen(place.layer, fd, _READ)

    def _file(self, entry: Entry, fd: int) -> None:
        before = os.fstat(fd)
        seen = entry._replace(mtime=before.st_mtime_ns, ctime=before.st_ctime_ns)
        self._out.begin(entry)
        for _, data in pieces(entry, fd):
            self._out.put(data)
        self._out.end(entry)
        self.packed.entries += 1
        self.packed.size += entry.size
        self._written.add(entry.path)
        if not is_unchanged(seen, fd):
            self.packed.notes.append(f"{quoted(entry.path)} changed while it was read; its data is mixed.")

    def _add(self, entry: Entry) -> None:
        self._out.add(entry)
        self._written.add(entry.path)
        self.packed.entries += 1

    def _mark(self, directory: bytes, name: bytes) -> None:
        path = directory + b"/" + name if directory else name
        self._out.add(Entry(path, FILE, 0, 0, 0, 0, 0))

    # -- xattrs -------------------------------------------------------------------------------------------

    def _xattrs(self, place: Place) -> dict[bytes, bytes]:
        return self._xattrs_of(b"/proc/self/fd/%d/." % self._merge.gate.fd(place), place.name)

    def _xattrs_of(self, where: bytes, path: bytes) -> dict[bytes, bytes]:
        """The user's xattrs, under their own names; not labels and signatures of this host."""
        markers = self._merge.markers

        def is_kept(name: bytes) -> bool:
            if markers.is_private(name):
                return False
            return (
                name.startswith((b"user.", b"trusted."))
                or name == b"security.capability"
                or name in acl.RECORDS
            )

        def failed(name: bytes, error: OSError) -> None:
            if name != ALL or error.errno not in ABSENT:
                code = error.errno or errno.EIO
                raise OSError(code, os.strerror(code), os.fsdecode(path)) from error

        found = read_xattrs(where, is_kept, failed, follow=False)
        return {markers.shown_names([name])[0]: value for name, value in found.items()}

    # -- hard links with names in the lowers --------------------------------------------------------------

    def _refuse_indexed(self, place: Place, name: bytes, path: bytes) -> None:
        """Raise LayerError for a copy whose other names are not known without the index."""
        if not self._may_have_index:
            return
        with suppress(OSError):
            os.getxattr(self._where(place, name), self._merge.markers.nlink, follow_symlinks=False)
            raise LayerError(
                f"{quoted(path)} is a hard link whose other names are in a lower, kept together by an index, "
                "so the upper alone is not a layer; name its lowers by --lower, topmost first, and its work "
                "directory by --work."
            )

    def _other_names(self) -> None:
        """Write the names in the lowers, with their directories, of what is in the tar or the index."""
        for path, name, parts, found in self._lower_files():
            full = path + b"/" + name if path else name
            if full in self._written:
                continue
            st, (place,) = found
            indexed = self._index is not None and self._index.find(name, found) is not None
            if indexed or place.layer.key(st) in self._first:
                self._directories_of(path)
                self._object(parts, name, full, found)

    def _lower_files(self) -> Iterator[tuple[bytes, bytes, list[Place], Found]]:
        """The visible files of the lowers that have several names."""
        stack = [(b"", self._merge.roots)]
        while stack:
            path, parts = stack.pop()
            for name in sorted(self._merge.listing(parts).entries().names()):
                found = self._merge.search(parts, name)
                if found is None:
                    continue
                st, places = found
                if stat.S_ISDIR(st.st_mode):
                    stack.append((path + b"/" + name if path else name, places))
                elif st.st_nlink > 1 and places[0].layer.index >= self._count:
                    yield path, name, parts, found

    def _directories_of(self, path: bytes) -> None:
        parts, done = self._merge.roots, b""
        for name in path.split(b"/") if path else ():
            found = self._merge.search(parts, name)
            assert found is not None
            done = done + b"/" + name if done else name
            st, parts = found
            if done not in self._written:
                self._add(_entry(done, DIRECTORY, st, self._xattrs(parts[0])))


def _entry(
    path: bytes,
    kind: str,
    st: os.stat_result,
    xattrs: Mapping[bytes, bytes],
    *,
    size: int = 0,
    link: bytes = b"",
    rdev: tuple[int, int] = (0, 0),
) -> Entry:
    return Entry(
        path, kind, stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, size, st.st_mtime_ns,
        rdev=rdev, link=link, xattrs=xattrs,
    )  # fmt: skip


def _refuse(path: bytes, cause: str) -> LayerError:
    return LayerError(f"{quoted(path)} {cause}, so the upper alone is not a layer; {_NEEDS_LOWERS}.")
