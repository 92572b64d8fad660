"""The changes in an upper, as shown by ``docker diff``.

Compares two merged trees: *now*, the upper over the lowers, and *before*, the lowers alone. The rules are
those of docker's ``pkg/archive/changes.go``:

- ``A``: the name did not exist before; every name below an added directory is listed too;
- ``D``: the name no longer exists; names below a deleted directory are not listed;
- ``C``: the name exists in both. A non-directory is changed if the upper holds it; a directory if its own
  attributes differ, if it was replaced (opaque), or if a name below it is listed. A change of type is one
  ``C``: names below a directory that became a file are not listed, names below a former file are ``A``.

Contents are never read: a file that was copied up but has its old content is ``C``, as with docker's overlay2
driver. The root is never listed. The order is that of the paths' bytes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from unionfs.core.places import Layer, Place
from unionfs.sys.attributes import ALL, read_xattrs
from unionfs.sys.fds import Files
from unionfs.union.images import is_image, open_image
from unionfs.union.markers import ABSENT, Markers
from unionfs.union.merge import Merge

_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_VANISHED: Final = (FileNotFoundError, NotADirectoryError)


def diff(
    upper: str, lowers: Sequence[str], xattr_prefix: bytes, *, follows_redirects: bool | None = None
) -> Iterator[tuple[str, bytes]]:
    """Yield (``A`` | ``C`` | ``D``, path from the root) for every change, sorted by the bytes of the path.

    ``lowers`` are topmost first; ``xattr_prefix`` is ``trusted.overlay.`` or ``user.overlay.``;
    ``follows_redirects`` as in `Markers`. The upper may be in use: names that vanish during the walk are
    skipped. Raises ``OSError`` if a layer cannot be read.
    """
    markers = Markers(xattr_prefix, follows_redirects=follows_redirects)
    with compared(upper, lowers, markers) as (_, root):
        pass
    for path, change in in_order(root):
        yield change.kind, path


@contextmanager
def compared(
    upper: str, lowers: Sequence[str], markers: Markers, hidden: Collection[Sequence[bytes]] = ()
) -> Iterator[tuple[Merge, Change]]:
    """The root of all changes, and the merge in which their objects are found while the context lasts.

    `hidden`: the names on the paths to directories below which nothing is compared, since the upper hides
    them; those of the lowers need not be readable. Other arguments and errors are those of `diff`.
    """
    with Files() as resources:
        layers = _opened([upper, *lowers], resources)
        merge = Merge(layers, markers, directory_fds=256)
        resources.callback(merge.close)
        yield merge, _Comparison(merge, layers, hidden).run()


def _opened(paths: Sequence[str], resources: Files, first: int = 0) -> list[Layer]:
    """The layers of an upper and its lowers, in this order, with indices from ``first`` on."""
    layers = []
    for position, path in enumerate(paths):
        image = position > 0 and is_image(path)
        fd = open_image(os.path.realpath(path)) if image else os.open(path, _DIRECTORY)
        resources.own(fd)
        layers.append(Layer(first + position, path, fd, is_upper=position == 0))
    return layers


def diff_of_copy(
    copy: str, lowers: Sequence[str], xattr_prefix: bytes, *, follows_redirects: bool | None = None
) -> Iterator[tuple[str, bytes]]:
    """Yield the changes of a directory that began as a copy of the merged ``lowers``, like `diff`.

    An object with the attributes of the original is unchanged: contents are not read here either.
    """
    markers = Markers(xattr_prefix, follows_redirects=follows_redirects)
    with Files() as resources:
        # As in `between`, layers that are not in the merge have indices below its own.
        now, *before = _opened([copy, *lowers], resources, -1 - len(lowers))
        merge = Merge([now], markers, directory_fds=256)
        resources.callback(merge.close)
        root = _OfCopy(merge, [now], before).run()
        for path, change in in_order(root):
            yield change.kind, path


@contextmanager
def between(
    before: Sequence[str], now: Sequence[str], markers: Markers, *, upper: bool
) -> Iterator[tuple[Merge, Change]]:
    """The same for two trees whose layers are given, topmost first; the lowest one is the same. ``upper``:
    whether the first one of ``now`` is an upper in use."""
    common = 0
    while common < min(len(before), len(now)) and before[-1 - common] == now[-1 - common]:
        common += 1
    with Files() as resources:

        def opened(paths: Sequence[str], above: int, *, first_is_upper: bool = False) -> list[Layer]:
            layers = []
            for position, path in enumerate(paths):
                fd = open_image(path) if is_image(path) else os.open(path, _DIRECTORY)
                resources.own(fd)
                index = above - len(paths) + position
                layers.append(Layer(index, path, fd, is_upper=first_is_upper and position == 0))
            return layers

        shared = opened(now[len(now) - common :], common)
        layers = opened(now[: len(now) - common], 0, first_is_upper=upper) + shared
        others = opened(before[: len(before) - common], 0) + shared
        for position, layer in enumerate(shared):
            assert layer.index == position
        merge = Merge(layers, markers, directory_fds=256)
        resources.callback(merge.close)
        yield merge, _Between(merge, layers, others).run()


class Change:
    """A name on the path to a change. It is attached to its parent when it is listed."""

    __slots__ = ("children", "kind", "name", "new", "old", "parent")

    def __init__(
        self, parent: Change | None, name: bytes, new: Object | None = None, old: Object | None = None
    ) -> None:
        self.parent = parent
        self.name = name
        self.kind = ""
        self.children: list[Change] = []
        #: What the name is now, and what it was before.
        self.new, self.old = new, old

    def names(self) -> tuple[bytes, ...]:
        """The names on the path from the root."""
        found, change = [], self
        while change.parent is not None:
            found.append(change.name)
            change = change.parent
        return tuple(reversed(found))

    def report(self, kind: str) -> None:
        """List this name as ``kind``, and as ``C`` every parent directory not listed yet."""
        change: Change | None = self
        while change is not None and change.parent is not None and not change.kind:
            change.kind = kind
            kind = "C"
            change.parent.children.append(change)
            change = change.parent


def in_order(root: Change) -> Iterator[tuple[bytes, Change]]:
    """Every change with its path, which begins with a slash; sorted by the bytes of the path."""
    path = bytearray()
    pending = [(0, _in_order(root))]
    while pending:
        length, steps = pending[-1]
        del path[length:]
        for change, below in steps:
            if below:
                path += b"/" + change.name
                pending.append((len(path), _in_order(change)))
                break
            yield bytes(path) + b"/" + change.name, change
        else:
            pending.pop()


def _in_order(directory: Change) -> Iterator[tuple[Change, bool]]:
    """Each child, and later (True) the names below it: ``/a-b`` sorts between ``/a`` and ``/a/b``."""
    steps = [(child.name, child, False) for child in directory.children]
    steps += [(child.name + b"/", child, True) for child in directory.children if child.children]
    steps.sort(key=lambda step: step[0])
    return iter([(child, below) for _, child, below in steps])


class Object:
    """An object of a merged tree. It has no attributes if the lookup failed: a broken redirect, or an error
    of its layer.
    """

    __slots__ = ("failure", "is_directory", "parts", "st")

    def __init__(self, st: os.stat_result | None, parts: list[Place], failure: int | None = None) -> None:
        self.st = st
        #: The errno of the lookup that failed.
        self.failure = failure
        self.is_directory = st is not None and stat.S_ISDIR(st.st_mode)
        #: The real directories merged into it, topmost first; for a non-directory the one that contains it.
        self.parts = parts


class _Comparison:
    """Walks both merged trees side by side, with a list of pending directories instead of recursion."""

    def __init__(
        self, merge: Merge, layers: Sequence[Layer], hidden: Collection[Sequence[bytes]] = ()
    ) -> None:
        self._merge = merge
        self._layers = layers
        self._hidden = {tuple(names) for names in hidden}
        self._last_hidden = {names[-1] for names in self._hidden}
        self._todo: list[tuple[Change, list[Place], list[Place]]] = []
        #: The places found in the directories being compared, so that equal ones are one object.
        self._places: dict[tuple[Place | None, bytes], Place] = {}

    def run(self) -> Change:
        """The root of all changes."""
        now, before = self._merge.roots, self._roots_before()
        root = Change(None, b"", self._root(now), self._root(before))
        self._todo.append((root, now, before))
        while self._todo:
            change, now, before = self._todo.pop()
            if change.name in self._last_hidden and change.names() in self._hidden:
                continue
            self._places.clear()
            try:
                names = self._candidates(now, before)
            except _VANISHED:
                continue
            for name in names:
                self._compare(Change(change, name), now, before)
        return root

    def _roots_before(self) -> list[Place]:
        return self._merge.named.roots(self._layers[1:])

    def _root(self, parts: list[Place]) -> Object:
        return Object(os.stat(self._merge.gate.fd(parts[0])), parts)

    def _candidates(self, now: list[Place], before: list[Place]) -> Iterable[bytes]:
        """The names that can differ: only those in the upper if the lower parts are the same."""
        same_below = now[0].layer.is_upper and now[1:] == before
        places = now[:1] if same_below else dict.fromkeys(now + before)
        return self._merge.listing(places).entries().names()

    def _compare(self, change: Change, now: list[Place], before: list[Place]) -> None:
        try:
            change.new = new = self._find(now, change.name)
            change.old = old = self._find_before(before, change.name)
            if new is None:
                if old is not None:
                    change.report("D")
                return
            if old is None:
                change.report("A")
            elif new.is_directory is old.is_directory and new.parts == old.parts:
                return
            elif new.is_directory and old.is_directory:
                if self._differ(new, old):
                    change.report("C")
            elif self._replaced(new, old, change.name):
                change.report("C")
        except _VANISHED:
            return
        if new.is_directory:
            self._todo.append((change, new.parts, old.parts if old and old.is_directory else []))

    def _find(self, parts: list[Place], name: bytes) -> Object | None:
        """The object ``name`` in the merged directory of ``parts``."""
        if not parts:
            return None
        try:
            found = self._merge.search(parts, name)
        except _VANISHED:
            raise
        except OSError as error:
            if not parts[0].layer.is_upper or not self._has(parts[0], name):
                parts = parts[1:] if parts[0].layer.is_upper else parts
            return Object(None, parts[:1], error.errno)
        if found is None:
            return None
        st, places = found
        if not stat.S_ISDIR(st.st_mode):
            return Object(st, places)
        return Object(st, [self._places.setdefault((place.parent, place.name), place) for place in places])

    def _find_before(self, parts: list[Place], name: bytes) -> Object | None:
        return self._find(parts, name)

    def _has(self, place: Place, name: bytes) -> bool:
        try:
            os.stat(name, dir_fd=self._merge.gate.fd(place), follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return True

    def _differ(self, new: Object, old: Object) -> bool:
        """Whether a directory itself was changed or replaced."""
        top = new.parts[0]
        replaced = top.layer.is_upper and self._merge.is_opaque(top)
        return replaced or self._attributes(new) != self._attributes(old)

    def _replaced(self, new: Object, old: Object, name: bytes) -> bool:
        """Whether a name has another object that is not a directory, or was one."""
        return True

    def _attributes(self, found: Object) -> tuple[int, int, int, int, dict[bytes, object]]:
        """The compared attributes of a directory: mode, owner, modification time and the user's xattrs.

        An unreadable xattr differs from every other value.
        """
        unreadable: dict[bytes, object] = {}

        def failed(name: bytes, error: OSError) -> None:
            if name != ALL or error.errno not in ABSENT:
                unreadable[name] = object()

        xattrs = read_xattrs(
            b"/proc/self/fd/%d" % self._merge.gate.fd(found.parts[0]),
            lambda name: not self._merge.markers.is_private(name) and name != b"security.selinux",
            failed,
        )
        st = found.st
        assert st is not None
        return st.st_mode, st.st_uid, st.st_gid, st.st_mtime_ns, {**xattrs, **unreadable}


class _Between(_Comparison):
    """Compares two trees that have some layers in common."""

    def __init__(self, merge: Merge, layers: Sequence[Layer], others: Sequence[Layer]) -> None:
        """``others``: the layers of the tree before."""
        super().__init__(merge, layers)
        self._others = others

    def _roots_before(self) -> list[Place]:
        return self._merge.named.roots(self._others)

    def _candidates(self, now: list[Place], before: list[Place]) -> Iterable[bytes]:
        places = [place for place in now if place not in before]
        places += [place for place in before if place not in now]
        return self._merge.listing_of_all(places)

    def _find_before(self, parts: list[Place], name: bytes) -> Object | None:
        with self._merge.other_layers(self._others):
            return self._find(parts, name)

    def _differ(self, new: Object, old: Object) -> bool:
        return new.parts[-1] != old.parts[-1] or self._attributes(new) != self._attributes(old)


class _OfCopy(_Between):
    """Compares a tree with a copy of it, which has objects of its own everywhere."""

    def _differ(self, new: Object, old: Object) -> bool:
        return self._attributes(new) != self._attributes(old)

    def _replaced(self, new: Object, old: Object, name: bytes) -> bool:
        if new.st is None or old.st is None:
            return True
        if _inode(new.st) == _inode(old.st):
            return False  # a snapshot has the same numbers and times
        return _plain(new.st) != _plain(old.st) or self._more(new, name) != self._more(old, name)

    def _more(self, found: Object, name: bytes) -> tuple[bytes, dict[bytes, bytes]]:
        """The target of a symlink, and the xattrs."""
        path = b"/proc/self/fd/%d/%b" % (self._merge.gate.fd(found.parts[0]), name)
        assert found.st is not None
        target = os.readlink(path) if stat.S_ISLNK(found.st.st_mode) else b""
        xattrs = {
            xattr: os.getxattr(path, xattr, follow_symlinks=False)
            for xattr in map(os.fsencode, os.listxattr(path, follow_symlinks=False))
            if not self._merge.markers.is_private(xattr) and xattr != b"security.selinux"
        }
        return target, xattrs


def _inode(st: os.stat_result) -> tuple[int, int, int]:
    return st.st_ino, st.st_ctime_ns, st.st_size


def _plain(st: os.stat_result) -> tuple[int, ...]:
    return st.st_mode, st.st_uid, st.st_gid, st.st_rdev, st.st_size, st.st_mtime_ns
