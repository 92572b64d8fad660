"""The changes of a branch: both trees opened, and the objects in them.

*Now* is the branch over what lies below it, *before* is what lies below it, as it is at this moment.
Objects are read from the layers, so nothing needs to be mounted.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from unionfs.branches.covered import hidden_in
from unionfs.branches.ids import overflow
from unionfs.branches.store import Branch, may_own
from unionfs.core.places import Place
from unionfs.errors import UserError, quoted, reason_at
from unionfs.images.indexed import Copy, Index, opened_index
from unionfs.sys.attributes import ALL, FileAttributes, attributes, read_xattrs
from unionfs.sys.fds import Owned, open_for_listing
from unionfs.union.diff import Change, Object, compared
from unionfs.union.markers import ABSENT, Markers
from unionfs.union.merge import Merge

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_NLINK = re.compile(rb"U([+-]\d{1,9})")


@dataclass(slots=True)
class Entry:
    """An object that is not a directory, open."""

    st: os.stat_result
    fd: int
    """O_PATH."""
    where: bytes
    """A path for calls about xattrs, not to be followed."""
    indexed: bool = False
    """Whether it is a copy in the index, which the lower's name shows."""


class View:
    """The two trees of one branch."""

    def __init__(
        self,
        merge: Merge,
        root: Change,
        index: Index | None,
        hidden: Sequence[Sequence[bytes]] = (),
        others: tuple[int, int] | None = None,
    ) -> None:
        """`hidden`: the ways to directories that the branch hides, whose changes do not count. `others`: the
        owner and group of what belongs to no id of this user namespace, which is shown as uid 0's.
        """
        self.merge = merge
        self._others = others
        self.root = root
        for names in hidden:
            self._leave_out(names)
        self._index = index
        #: The paths of lowers' names that show a copy of the index, with a leading slash.
        self.linked: list[bytes] = []
        if index is not None and self._lacks_names(index):
            self._find_linked(index)

    def _leave_out(self, names: Sequence[bytes]) -> None:
        """Forget the change of the directory at the end of a way, and those on it that are none by that."""
        way = [self.root]
        for name in names:
            below = next((child for child in way[-1].children if child.name == name), None)
            if below is None:
                return
            way.append(below)
        for change, parent in zip(reversed(way[1:]), reversed(way[:-1]), strict=True):
            is_end = change is way[-1]
            if is_end or (not change.children and not self.differs(change)):
                parent.children.remove(change)

    def differs(self, change: Change) -> bool:
        """Whether a directory has other attributes than the one below, besides times. Raises OSError."""
        new, old = change.new, change.old
        if new is None or old is None or not (new.is_directory and old.is_directory):
            return True
        now, before = self.both_of(change)
        return now._replace(atime_ns=0, mtime_ns=0) != before._replace(atime_ns=0, mtime_ns=0)

    def index_entries(self) -> dict[tuple[int, int], bytes]:
        """The copies in the index: their names there by device and inode number. Raises OSError."""
        if self._index is None:
            return {}
        with Owned(open_for_listing(self._index.fd)) as listing:
            names = os.listdir(listing)
            found = [os.stat(name, dir_fd=listing, follow_symlinks=False) for name in names]
        return {(st.st_dev, st.st_ino): os.fsencode(name) for name, st in zip(names, found, strict=True)}

    @property
    def root_differs(self) -> bool:
        """Whether the root has other attributes than the one below, besides times. Raises OSError."""
        return self.differs(self.root)

    @property
    def is_empty(self) -> bool:
        """Whether the branch changes nothing. Raises OSError."""
        return not self.root.children and not self.root_differs

    # -- objects ------------------------------------------------------------------------------------------

    @contextmanager
    def entry(self, name: bytes, found: Object, *, old: bool = False) -> Iterator[Entry]:
        """Open the non-directory `name` as the branch shows it, or with `old` as below it. Raises OSError."""
        st, place = found.st, found.parts[0]
        if st is None:
            code = errno.EIO if found.failure is None else found.failure
            raise OSError(code, f"it cannot be read in its layer ({os.strerror(code)})", os.fsdecode(name))
        copy = None if old else self._copy(name, found)
        if copy is not None and self._index is not None:
            where = b"/proc/self/fd/%d/%b" % (self._index.fd, copy.entry)
            with Owned(os.open(where, _PATH)) as fd:
                yield Entry(os.fstat(fd), fd, where, indexed=True)
            return
        where = b"/proc/self/fd/%d/%b" % (self.merge.gate.fd(place), name)
        with Owned(self.merge.open_object((st, found.parts), name)) as fd:
            yield Entry(os.fstat(fd), fd, where)

    def _copy(self, name: bytes, found: Object) -> Copy | None:
        """The copy in the index that a lower's name shows."""
        if self._index is None or found.st is None or found.parts[0].layer.is_upper:
            return None
        return self._index.find(name, (found.st, found.parts))

    def attributes_of(self, entry: Entry) -> FileAttributes:
        """Raises OSError."""
        return self._shown(attributes(entry.st, self.xattrs(entry.where)))

    def of_directory(self, found: Object) -> FileAttributes:
        """The attributes of a directory. Raises OSError."""
        st = os.stat(self.merge.gate.fd(found.parts[0]))
        where = b"/proc/self/fd/%d/." % self.merge.gate.fd(found.parts[0])
        return self._shown(attributes(st, self.xattrs(where)))

    def _shown(self, found: FileAttributes) -> FileAttributes:
        if self._others is None:
            return found
        uid, gid = self._others
        return found._replace(
            uid=0 if found.uid == uid else found.uid, gid=0 if found.gid == gid else found.gid
        )

    @property
    def is_mapped(self) -> bool:
        """Whether the branch is used in a user namespace with subordinate ids."""
        return self._others is not None

    def has_shown_owner(self, st: os.stat_result) -> bool:
        """Whether owner and group are shown as they are stored."""
        return self._others is None or (st.st_uid != self._others[0] and st.st_gid != self._others[1])

    def has_subordinate_owner(self, st: os.stat_result) -> bool:
        """Whether owner or group is one of the other ids of the branch's user namespace."""
        if self._others is None:
            return False
        uid, gid = self._others
        return st.st_uid not in (0, uid) or st.st_gid not in (0, gid)

    def is_anothers(self, found: Object) -> bool:
        """Whether an object belongs to a user whose objects this one may not change. Raises OSError."""
        owner = (found.st or os.stat(self.merge.gate.fd(found.parts[0]))).st_uid
        if self._others is not None:
            return owner == self._others[0]
        return os.geteuid() not in (0, owner)

    def both_of(self, change: Change) -> tuple[FileAttributes, FileAttributes]:
        """The attributes of a directory that stays, now and before, for comparison.

        An ordinary user's copy of a directory has another owner where that cannot be set, which is not a
        change. Raises OSError.
        """
        assert change.new is not None
        assert change.old is not None
        return self.compared(change.new, change.old)

    def compared(self, new: Object, old: Object) -> tuple[FileAttributes, FileAttributes]:
        """As `both_of`, for two directories."""
        now, before = self.of_directory(new), self.of_directory(old)
        if not may_own(before.uid, before.gid):
            now = now._replace(uid=before.uid, gid=before.gid)
        return now, before

    def xattrs(self, where: bytes) -> Mapping[bytes, bytes]:
        """The xattrs as users see them, without this host's labels. Raises OSError."""
        markers = self.merge.markers

        def failed(name: bytes, error: OSError) -> None:
            if name != ALL or error.errno not in ABSENT:
                raise error

        found = read_xattrs(
            where, lambda name: not markers.is_private(name) and name != b"security.selinux", failed,
            follow=False,
        )  # fmt: skip
        return {markers.shown_names([name])[0]: value for name, value in found.items()}

    def open_data(self, above: Sequence[Place], name: bytes, found: Object, entry: Entry) -> int:
        """An fd of the data of a regular file, for reading; `above`: the parts of its directory.

        Raises OSError.
        """
        place = found.parts[0]
        if not entry.indexed:
            data = self.merge.lower_data(above, place, name, entry.where)
            if data is not None:
                return self.merge.open_data(data)
        elif self.merge.markers.metacopy_value(entry.where) is not None:
            # Only the metadata was copied, so the data is the lower's.
            return os.open(name, _READ | os.O_NOFOLLOW, dir_fd=self.merge.gate.fd(place))
        return self.merge.gate.reopen(place.layer, entry.fd, _READ)

    def names(self, found: Object) -> list[bytes]:
        """The names in a directory, sorted. Raises OSError."""
        return sorted(self.merge.listing(found.parts).entries().names())

    def child(self, found: Object, name: bytes) -> Object | None:
        """The object `name` of a directory. Raises OSError."""
        result = self.merge.search(found.parts, name)
        return None if result is None else Object(*result)

    def is_replaced(self, change: Change) -> bool:
        """Whether a directory is another one than before, so that nothing below it is merged."""
        assert change.new is not None
        assert change.old is not None
        top = change.new.parts[0]
        if not top.layer.is_upper:
            return change.new.parts != change.old.parts
        return self.merge.is_opaque(top) or change.new.parts[1:] != change.old.parts

    def stays(self, change: Change) -> bool:
        """Whether a directory stays, and its entries are changed one by one."""
        new, old = change.new, change.old
        if new is None or old is None or not (new.is_directory and old.is_directory):
            return False
        return not self.is_replaced(change)

    # -- hard links whose other names only a lower has ------------------------------------------------------

    def _lacks_names(self, index: Index) -> bool:
        """Whether a copy in the index has names that are not in the upper."""
        with Owned(open_for_listing(index.fd)) as listing:
            for name in map(os.fsencode, os.listdir(listing)):
                where = b"/proc/self/fd/%d/%b" % (index.fd, name)
                try:
                    found = _NLINK.fullmatch(
                        os.getxattr(where, self.merge.markers.nlink, follow_symlinks=False)
                    )
                except OSError as error:
                    if error.errno not in ABSENT:
                        raise
                    continue
                if found is None or int(found[1]) >= 0:
                    return True
        return False

    def _find_linked(self, index: Index) -> None:
        """List the names in lowers that show a copy in the index, of which the upper has no entry."""
        root = self.root.new
        assert root is not None
        waiting: list[tuple[bytes, Change, Object]] = [(b"", self.root, root)]
        while waiting:
            path, above, directory = waiting.pop()
            known = {child.name: child for child in above.children}
            for name in self.names(directory):
                found = self.child(directory, name)
                if found is None:
                    continue
                change = known.get(name) or Change(above, name, found, found)
                if found.is_directory:
                    waiting.append((path + b"/" + name, change, found))
                elif self._copy(name, found) is not None:
                    # In a renamed directory it is listed already, as added.
                    change.report("C")
                    self.linked.append(path + b"/" + name)


@contextmanager
def viewed(branch: Branch) -> Iterator[View]:
    """The changes of a branch. Raises UserError if a layer cannot be read."""
    record = branch.record()
    # As in an ordinary user's own mount.
    markers = Markers(
        b"user.overlay." if record.userxattr else b"trusted.overlay.",
        follows_redirects=True if os.geteuid() != 0 else None,
    )
    with ExitStack() as resources:
        try:
            hidden = [[*map(os.fsencode, names)] for names in hidden_in(record, branch.store.root)]
            merge, root = resources.enter_context(compared(branch.upper, branch.lowers(), markers, hidden))
            index = resources.enter_context(opened_index(branch.work, merge))
            others = None if record.ids is None else (overflow("uid"), overflow("gid"))
            view = View(merge, root, index, hidden, others)
        except OSError as error:
            raise UserError(
                f"branch {quoted(branch.name)} cannot be read: {reason_at(error)}; check its base "
                f"{quoted(record.base)} and its layer {quoted(branch.upper)}."
            ) from error
        yield view


def kind_of(mode: int) -> str:
    """The type of an object, as a word."""
    return {
        stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo",
        stat.S_IFSOCK: "socket", stat.S_IFCHR: "character device", stat.S_IFBLK: "block device",
    }.get(stat.S_IFMT(mode), "object")  # fmt: skip
