"""Describes the changes of a branch: the attributes that differ, renames, and contents."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from unionfs.branches.view import View, kind_of
from unionfs.settings.words import c_quoted
from unionfs.sys.attributes import FileAttributes
from unionfs.sys.fds import Owned
from unionfs.union.diff import Change, Object, in_order
from unionfs.union.merge import path_of

_CHUNK = 1 << 20
_LONGEST_TEXT = 1 << 20
_MOST_LINES = 20_000


@dataclass(frozen=True, slots=True)
class Side:
    """An object on one side of a change."""

    attributes: FileAttributes
    size: int
    target: bytes | None = None
    """Of a symlink."""

    @property
    def kind(self) -> str:
        return kind_of(self.attributes.mode)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; xattrs in hexadecimal."""
        found = self.attributes
        values = {
            "type": self.kind, "mode": f"{stat.S_IMODE(found.mode):04o}", "uid": found.uid, "gid": found.gid,
            "size": self.size, "mtime_ns": found.mtime_ns,
            "xattrs": {os.fsdecode(name): value.hex() for name, value in found.xattrs.items()},
        }  # fmt: skip
        if self.target is not None:
            values["target"] = os.fsdecode(self.target)
        return values


@dataclass(slots=True)
class Difference:
    """One line of `branch diff`."""

    kind: str
    """`A`dded, `C`hanged, `D`eleted, `R`enamed."""
    path: bytes
    """Without a leading slash."""
    new: Side | None
    old: Side | None
    what: tuple[str, ...] = ()
    """The attributes that differ, of two sides: type, content, target, mode, owner, xattrs, times."""
    source: bytes | None = None
    """The former path of a renamed object."""
    change: Change = field(repr=False, default_factory=lambda: Change(None, b""))
    removed: Change | None = field(repr=False, default=None)
    """Of a rename, the change of the former name."""

    def is_below(self, above: bytes) -> None:
        """Make its paths those below the directory that has `above`."""
        self.path = above if self.path == b"." else above + b"/" + self.path
        if self.source is not None:
            self.source = above + b"/" + self.source

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        values: dict[str, Any] = {"change": self.kind, "path": os.fsdecode(self.path)}
        if self.source is not None:
            values["from"] = os.fsdecode(self.source)
        if self.what:
            values["what"] = list(self.what)
        for name, side in (("old", self.old), ("new", self.new)):
            values[name] = None if side is None else side.to_json()
        return values


class Describer:
    """Describes the changes of one branch."""

    def __init__(self, view: View) -> None:
        self._view = view

    def differences(self) -> list[Difference]:
        """All of them, sorted by path. Raises OSError."""
        found = []
        if self._view.root_differs and (item := self.difference(b".", self._view.root)) is not None:
            found.append(item)
        for path, change in in_order(self._view.root):
            item = self.difference(path[1:], change)
            if item is not None:
                found.append(item)
        return self._with_renames(found)

    def difference(self, path: bytes, change: Change) -> Difference | None:
        """Describe a change; None if no attribute differs. Raises OSError."""
        new, old = self._side(change, change.new), self._side(change, change.old, old=True)
        if new is None or old is None:
            return Difference("D" if new is None else "A", path, new, old, change=change)
        if new.kind == old.kind == "directory":
            new = Side(self._view.both_of(change)[0], 0)
        what = tuple(self._what(change, new, old))
        if not what or (what == ("times",) and new.kind == "directory"):
            return None
        return Difference("C", path, new, old, what, change=change)

    def _side(self, change: Change, found: Object | None, *, old: bool = False) -> Side | None:
        if found is None:
            return None
        if found.is_directory:
            return Side(self._view.of_directory(found), 0)
        # A name that shows a copy of the index has the same object on both sides.
        with self._view.entry(change.name, found, old=old) as entry:
            target = os.readlink(b"", dir_fd=entry.fd) if stat.S_ISLNK(entry.st.st_mode) else None
            return Side(self._view.attributes_of(entry), entry.st.st_size, target)

    def _what(self, change: Change, new: Side, old: Side) -> Iterator[str]:
        if new.kind != old.kind:
            yield "type"
        elif new.kind == "file" and not self.same_content(change, new, old):
            yield "content"
        elif new.target != old.target:
            yield "target"
        yield from _attributes(new.attributes, old.attributes)

    def _carried(self, item: Difference) -> tuple[str, ...]:
        """The attributes of a renamed object that differ. Raises OSError."""
        assert item.new is not None
        assert item.old is not None
        now, before = item.new.attributes, item.old.attributes
        if item.new.kind == "directory" and item.removed is not None:
            assert item.change.new is not None
            assert item.removed.old is not None
            now, before = self._view.compared(item.change.new, item.removed.old)
            now = now._replace(mtime_ns=before.mtime_ns)
        return tuple(_attributes(now, before))

    # -- contents -----------------------------------------------------------------------------------------

    def same_content(self, change: Change, new: Side, old: Side) -> bool:
        """Whether a file has the same data on both sides."""
        # What is empty need not be read, which a user may not be allowed to.
        return new.size == old.size and (not new.size or self._same_data((change, True), (change, False)))

    def _same_data(self, one: tuple[Change, bool], other: tuple[Change, bool]) -> bool:
        with ExitStack() as files:
            fds = [files.enter_context(Owned(self._open(*side))) for side in (one, other)]
            if os.path.sameopenfile(*fds):
                return True  # it is the lower's: only metadata was copied, or a directory was renamed
            while True:
                first, second = (os.read(fd, _CHUNK) for fd in fds)
                if first != second:
                    return False
                if not first:
                    return True

    def _open(self, change: Change, is_new: bool) -> int:
        """An fd of the data of a file on one side."""
        assert change.parent is not None
        found, above = change.old, change.parent.old
        if is_new:
            found, above = change.new, change.parent.new
        assert found is not None
        assert above is not None
        with self._view.entry(change.name, found, old=not is_new) as entry:
            return self._view.open_data(above.parts, change.name, found, entry)

    def data(self, item: Difference, *, new: bool) -> bytes | None:
        """The content of a file on one side; None if it is none, too large for a text, or unreadable for this
        user."""
        side = item.new if new else item.old
        change = item.removed if not new and item.removed is not None else item.change
        if side is None or side.kind != "file" or side.size > _LONGEST_TEXT:
            return None
        if not side.size:
            return b""
        try:
            with open(self._open(change, new), "rb") as file:
                return file.read()
        except PermissionError:
            return None

    def digest(self, item: Difference, *, new: bool) -> str:
        """The SHA-256 of a file on one side, or that this user may not read it."""
        # For start-up time: only binary files need it.
        import hashlib

        change = item.removed if not new and item.removed is not None else item.change
        total = hashlib.sha256()
        try:
            with Owned(self._open(change, new)) as fd:
                while data := os.read(fd, _CHUNK):
                    total.update(data)
        except PermissionError:
            return "unreadable"
        return total.hexdigest()

    def unified(self, item: Difference) -> list[str] | None:
        """The lines of a unified diff of a text file, without newlines; None of anything else."""
        # For start-up time: only contents need it.
        import difflib

        texts: list[list[str]] = []
        for new, side in ((False, item.old), (True, item.new)):
            if side is None or side.kind != "file":
                texts.append([])
                continue
            data = self.data(item, new=new)
            if data is None or b"\0" in data:
                return None
            lines = data.decode("utf-8", "surrogateescape").split("\n")
            if not lines[-1]:
                texts.append(lines[:-1])
            else:
                texts.append([*lines[:-1], lines[-1] + "\n\\ No newline at end of file"])
        if not any(side is not None and side.kind == "file" for side in (item.old, item.new)):
            return None
        if sum(map(len, texts)) > _MOST_LINES:
            return None
        before = "/dev/null" if item.old is None else _header(b"a/" + (item.source or item.path))
        after = "/dev/null" if item.new is None else _header(b"b/" + item.path)
        return list(difflib.unified_diff(texts[0], texts[1], fromfile=before, tofile=after, lineterm=""))

    # -- renames ------------------------------------------------------------------------------------------

    def _with_renames(self, found: list[Difference]) -> list[Difference]:
        """Make one of a removed and an added name of the same object."""
        removed = {item.path: item for item in found if item.kind == "D"}
        by_look: dict[tuple[int, int, int], list[Difference]] = {}
        for item in removed.values():
            if item.old is not None and item.old.kind == "file" and item.old.size:
                by_look.setdefault(_look(item.old), []).append(item)
        gone: set[bytes] = set()
        moved, inside = [], []
        for item in found:
            if item.kind != "A" or item.new is None:
                continue
            former = self._former(item, removed, by_look, gone)
            if former is not None:
                gone.add(former.path)
                item.kind, item.source, item.old, item.removed = "R", former.path, former.old, former.change
                item.what = self._carried(item)
                moved.append(item)
                if item.new.kind == "directory":
                    inside.append(item.path + b"/")
        if not moved:
            return found
        return [
            item for item in found
            if item.path not in gone and not (item.path.startswith(tuple(inside)) and _comes_along(item))
        ]  # fmt: skip

    def _former(
        self,
        item: Difference,
        removed: dict[bytes, Difference],
        by_look: dict[tuple[int, int, int], list[Difference]],
        gone: set[bytes],
    ) -> Difference | None:
        assert item.new is not None
        new = item.change.new
        assert new is not None
        if item.new.kind == "directory":
            if len(new.parts) < 2:
                return None
            other = removed.get(path_of(new.parts[1]))
            return other if other is not None and other.path not in gone else None
        if item.new.kind != "file":
            return None
        for other in by_look.get(_look(item.new), ()):
            if other.path not in gone and self._same_data((item.change, True), (other.change, False)):
                return other
        return None


def _attributes(now: FileAttributes, before: FileAttributes) -> Iterator[str]:
    if stat.S_IMODE(now.mode) != stat.S_IMODE(before.mode):
        yield "mode"
    if (now.uid, now.gid) != (before.uid, before.gid):
        yield "owner"
    if now.xattrs != before.xattrs:
        yield "xattrs"
    if now.mtime_ns != before.mtime_ns:
        yield "times"


def _header(name: bytes) -> str:
    """A name in a line of `---` or `+++`: without a tab patch(1) takes it to end at a space."""
    return c_quoted(name) + ("\t" if b" " in name else "")


def _look(side: Side) -> tuple[int, int, int]:
    return side.size, side.attributes.mtime_ns, side.attributes.mode


def _comes_along(item: Difference) -> bool:
    """Whether something below a renamed directory is as it was."""
    return item.kind == "A" and item.change.new is not None and not item.change.new.parts[0].layer.is_upper
