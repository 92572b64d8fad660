"""A layer's tar as a directory in kernel overlayfs's format (OCI image-spec, layer.md).

`.wh.NAME` becomes a whiteout and `.wh..wh..opq` an opaque directory, wherever in the tar they are: both hide
only what the layers below have. A root with `.wh..wh..opq` keeps that file, which unions read: overlayfs
ignores an opaque root. Other names that begin with `.wh..wh.` are AUFS's own, and left out, as by docker.

A layer is not trusted. A name that is absolute or has `..`, a name or hard link below or to something that is
not a directory of this layer, a second entry of a name, a whiteout's device node and names with control
characters are refused. xattrs with the prefix of overlayfs's own are stored as a user's.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from unionfs.core.search import PREFIX
from unionfs.errors import UserError, quoted
from unionfs.images.rules import Refused, Rules
from unionfs.storage.archive import acl
from unionfs.storage.archive.entry import (
    BLOCK,
    CHARACTER,
    DIRECTORY,
    FILE,
    HARDLINK,
    SPARSE,
    SYMLINK,
    Entry,
)
from unionfs.storage.archive.extract import Extractor
from unionfs.storage.archive.foreign import ForeignReader
from unionfs.storage.archive.headers import Malformed
from unionfs.storage.archive.progress import UNSEEN, Progress
from unionfs.sys.capabilities import may_use_trusted_xattrs
from unionfs.sys.fds import Owned
from unionfs.union.markers import Markers
from unionfs.union.named import INTERNAL, OPAQUE

_MOST_NANOSECONDS = 1 << 63
_HOLE = 1 << 16
_ZEROS = bytes(1 << 20)
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class Contents:
    """What a layer has."""

    entries: int = 0
    size: int = 0
    """Bytes of its files."""
    whiteouts: int = 0
    opaque: int = 0
    root_opaque: bool = False
    """Whether it hides everything in the layers below."""
    notes: list[str] = field(default_factory=list)
    """Sentences about what was left out."""


def unpack(
    reader: ForeignReader, target: str, markers: Markers, rules: Rules, progress: Progress = UNSEEN
) -> Contents:
    """Fill the empty directory `target` with a layer, to its end.

    `progress` goes on from where it is. Raises Malformed, UserError for what this user or filesystem cannot
    make, and OSError.
    """
    contents = Contents()
    with LayerExtractor(target, markers, rules, contents) as extractor:
        before = (progress.entries, progress.size)
        for entry in reader.entries():
            content = reader.content()
            progress(before[0] + contents.entries, before[1] + contents.size)
            content = progress.along(content)
            extractor.add_member(entry, content)
        extractor.finish()
        progress(before[0] + contents.entries, before[1] + contents.size)
    return contents


class LayerExtractor(Extractor):
    """Makes the entries of one layer."""

    filesystem = "this filesystem"
    elsewhere = "into a directory (--root) on another filesystem"

    def __init__(self, root: str, markers: Markers, rules: Rules, contents: Contents) -> None:
        super().__init__(root, contents.notes.append)
        self._markers = markers
        self._rules = rules
        self._contents = contents
        self._trusted = may_use_trusted_xattrs()
        self._remember(Entry(b"", DIRECTORY, 0o755, 0, 0, 0, 0))

    def add_member(self, member: Entry, content: Iterable[tuple[int, bytes]]) -> None:
        """Make the entry of a tar's member, whose `path` and hard link are as in the tar."""
        self._count()
        entry = self._checked(member)
        above, _, name = entry.path.rpartition(b"/")
        if any(part.startswith(PREFIX) for part in above.split(b"/")):
            raise Malformed(f"its entry {quoted(entry.path)} lies below a whiteout")
        if not name.startswith(PREFIX):
            self._add(entry, content)
        elif name == OPAQUE:
            self._make_opaque(above, entry)
        elif not name.startswith(INTERNAL):
            self._white_out(entry, above, name[len(PREFIX) :])

    def _count(self) -> None:
        self._contents.entries += 1
        if self._contents.entries > self._rules.entries:
            raise Refused(
                f"it has more than {self._rules.entries} entries",
                "if you trust it, raise the limit by --max-entries of `import`",
            )

    def _checked(self, member: Entry) -> Entry:
        path = self._path(member.path, "the entry")
        link, xattrs = member.link, member.xattrs
        if member.kind == HARDLINK:
            link = self._path(link, f"the hard link {quoted(path)} to")
            if link == path:
                raise Malformed(f"the hard link {quoted(path)} leads to itself")
        elif not link and member.kind == SYMLINK:
            raise Malformed(f"the symlink {quoted(path)} leads nowhere")
        if b"\0" in link:
            raise Malformed(f"the target of the link {quoted(path)} has a zero byte")
        if not -_MOST_NANOSECONDS <= member.mtime < _MOST_NANOSECONDS:
            raise Malformed(f"the time of {quoted(path)} is out of range")
        if xattrs:
            xattrs = self._kept(xattrs)
        return member._replace(path=path, link=link, xattrs=xattrs)

    def _path(self, name: bytes, what: str) -> bytes:
        """A name in a tar as a path below the layer."""
        if name.startswith(b"/"):
            raise Malformed(f"{what} {quoted(name)} is absolute")
        parts = [part for part in name.split(b"/") if part not in (b"", b".")]
        if b".." in parts:
            raise Malformed(f"{what} {quoted(name)} leads out of the layer")
        if b"\0" in name:
            raise Malformed(f"{what} {quoted(name)} has a zero byte")
        if not self._rules.any_name and any(byte < 32 or byte == 127 for byte in name):
            raise Refused(
                f"{what} {quoted(name)} has control characters in its name",
                "if you trust it, allow them by --any-name of `import`",
            )
        return b"/".join(parts)

    def _kept(self, xattrs: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
        """Those that this user can set, under the names that store them.

        Labels and signatures of the host it was made on (security.selinux, ima) are not the layer's.
        """
        kept = {}
        for name, value in xattrs.items():
            if name.startswith(b"user.") or name in acl.RECORDS or name == b"security.capability":
                kept[self._stored(name)] = value
            elif name.startswith(b"trusted."):
                if self._trusted:
                    kept[self._stored(name)] = value
                else:
                    self._say_once("trusted xattrs need root; they were left out.")
        return kept

    def _stored(self, name: bytes) -> bytes:
        try:
            return self._markers.stored_name(name)
        except OSError:
            raise Malformed(f"the xattr {quoted(name)} has a name that cannot be stored") from None

    # -- entries ------------------------------------------------------------------------------------------

    def _add(self, entry: Entry, content: Iterable[tuple[int, bytes]]) -> None:
        if entry.kind in (CHARACTER, BLOCK):
            if entry.kind == CHARACTER and entry.rdev == (0, 0):
                raise Malformed(
                    f"{quoted(entry.path)} is a character device 0/0, by which overlayfs marks a removed name"
                )
            if not (self._is_root and self._trusted):
                if self._rules.skip_devices:
                    self._say_once(f"device files were left out, as {quoted(entry.path)}.")
                    return
                raise Refused(
                    f"{quoted(entry.path)} is a device file, which only root can make",
                    "run this as root, or leave device files out by --skip-devices of `import`",
                )
        if entry.kind in (FILE, SPARSE):
            self._contents.size += entry.size
        self.add(entry, content)

    def _enter(self, at: int, name: bytes, path: bytes) -> int:
        """A directory that the tar does not name yet is made, as by docker."""
        try:
            if not self._is_whiteout(at, name):
                return self._open_directory(at, name, path)
        except FileNotFoundError:
            pass
        self._count()
        self._mkdir(at, name)
        self._remember(Entry(b"/".join([*self._parts, name]), DIRECTORY, 0o755, 0, 0, 0, 0))
        return self._open_directory(at, name, path)

    def _mkdir(self, at: int, name: bytes) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=at)
        except FileExistsError:
            if stat.S_ISDIR(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode):
                return  # some programs name directories more than once
            self._clear(at, name)
            os.mkdir(name, 0o700, dir_fd=at)
            with Owned(os.open(name, _DIRECTORY, dir_fd=at)) as fd:
                self._markers.set_opaque(fd)

    def _clear(self, at: int, name: bytes) -> None:
        """Remove a whiteout for an entry of the same name. Raises Malformed for anything else."""
        if not self._is_whiteout(at, name):
            raise Malformed(f"it has two entries with the name {quoted(name)} in one directory")
        os.unlink(name, dir_fd=at)

    def _is_whiteout(self, at: int, name: bytes) -> bool:
        return self._markers.is_whiteout(os.stat(name, dir_fd=at, follow_symlinks=False), at, name)

    def _link(self, at: int, name: bytes, entry: Entry) -> None:
        above, first = self._open_once(entry.link)
        with Owned(above) as fd, suppress(FileNotFoundError):
            if first.startswith(PREFIX) or self._is_whiteout(fd, first):
                raise Malformed(f"the hard link {quoted(entry.path)} leads to a whiteout")
        super()._link(at, name, entry)

    def _fill(self, fd: int, entry: Entry, content: Iterable[tuple[int, bytes]]) -> None:
        """Layers have no holes, so that zeros are not written."""
        os.ftruncate(fd, entry.size)
        for offset, data in content:
            if len(data) < _HOLE or data != _ZEROS[: len(data)]:
                super()._fill(fd, entry._replace(kind=FILE), ((offset, data),))

    # -- whiteouts ----------------------------------------------------------------------------------------

    def _white_out(self, entry: Entry, above: bytes, hidden: bytes) -> None:
        if hidden in (b"", b".", b".."):
            raise Malformed(f"the whiteout {quoted(entry.path)} hides nothing")
        path = above + b"/" + hidden if above else hidden
        at, name = self._place(path)
        self._contents.whiteouts += 1
        try:
            self._markers.make_whiteout(at, name, (at, self._root))
        except FileExistsError:
            if self._is_whiteout(at, name):
                raise Malformed(f"it has two whiteouts of {quoted(path)}") from None
            # What stands beside its whiteout stays, and hides the layers' below as a whole.
            with suppress(NotADirectoryError), Owned(os.open(name, _DIRECTORY, dir_fd=at)) as fd:
                self._markers.set_opaque(fd)
        except OSError as error:
            raise UserError(
                f"{quoted(path)} cannot be marked as removed ({error.strerror}); restore {self.elsewhere}."
            ) from error

    def _make_opaque(self, above: bytes, entry: Entry) -> None:
        self._contents.opaque += 1
        if not above:
            self._contents.root_opaque = True
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(OPAQUE, flags, 0o600, dir_fd=self._root))
            return
        at, _ = self._place(entry.path)
        try:
            self._markers.set_opaque(at)
        except OSError as error:
            raise UserError(
                f"{quoted(above)} cannot be marked as opaque ({error.strerror}); restore {self.elsewhere}."
            ) from error
