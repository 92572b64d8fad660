"""Applies a journal, and reverts it.

Every operation is one rename, or two where a filesystem cannot exchange names; repeating it changes nothing.
A replaced object is kept, in `new` after an exchange, else in `old`, so all operations can be reverted.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from unionfs.branches.beneath import Beneath, inode, rename, status
from unionfs.branches.journal import Journal, Move
from unionfs.errors import UserError, quoted
from unionfs.sys import attributes
from unionfs.sys.calls import RENAME_EXCHANGE, RENAME_NOREPLACE
from unionfs.sys.fds import Owned, open_for_listing
from unionfs.union.markers import ABSENT

_NO_FLAGS = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)

_hook: Callable[[str], None] | None = None


def set_hook(hook: Callable[[str], None] | None) -> None:
    """Call `hook` with the name of each step before it, so that a test can fail or end the process there."""
    global _hook
    _hook = hook


def step(name: str) -> None:
    """Call the hook, if one is set, with the name of the next step."""
    if _hook is not None:
        _hook(name)


class ChangedError(UserError):
    """Something else changed the base while a commit was being applied."""


class Application:
    """A journal, its tree, and fds of `new` and `old`."""

    def __init__(
        self, journal: Journal, tree: Beneath, new: int, old: int, layer: Beneath | None
    ) -> None:
        """`layer`: that of the branch, unless it is gone."""
        self._journal = journal
        self._tree = tree
        self._new = new
        self._old = old
        self._layer = layer
        self._ctimes = True
        # Of a rename two directories of the tree are needed.
        self._from = Beneath(tree.fd)

    def forward(self, *, again: bool = False) -> None:
        """Apply the operations that are not yet applied. Raises ChangedError, OSError.

        `again`: some were applied and reverted, which sets ctimes.
        """
        self._ctimes = not again
        try:
            for move in self._journal.moves:
                step(f"move {move.path}")
                try:
                    self._do(move)
                except OSError as error:
                    raise at_path(move.path, error) from error
        finally:
            self._from.close()
        for setting in self._journal.settings:
            step(f"set {setting.path}")
            try:
                self._set(setting.path, setting.new, setting.old)
            except OSError as error:
                raise at_path(setting.path, error) from error
        step("all done")

    def backward(self) -> None:
        """Revert the operations that are applied. Raises OSError."""
        try:
            for move in reversed(self._journal.moves):
                step(f"unmove {move.path}")
                self._take_back(move)
        finally:
            self._from.close()
        for setting in self._journal.settings:
            step(f"unset {setting.former}")
            self._set(setting.former, setting.old, setting.new)
        step("all taken back")

    # -- names --------------------------------------------------------------------------------------------

    def _do(self, move: Move) -> None:
        at, name = self._tree.parent(os.fsencode(move.path))
        number, here = b"%d" % move.number, status(at, name)
        if move.source is not None:
            self._rename(move, here, at, name)
            return
        if move.new is None:
            if inode(self._old, number) is None:
                self._expect(move, here)
                _rename_to_free(at, name, self._old, number)
                if inode(self._old, number) != move.old:
                    _rename_to_free(self._old, number, at, name)
                    raise _changed(move)
            return
        if here is None or here.st_ino != move.new:
            if here is None and inode(self._old, number) is not None:
                _rename_to_free(*self._staged(move), at, name)
            elif inode(*self._staged(move)) != move.new:
                return  # it was put there, and others have replaced or removed it since
            else:
                self._expect(move, here)
                self._put(move, at, name, number)
        self._mode(move, at, name)

    def _expect(self, move: Move, here: os.stat_result | None) -> None:
        """Raise ChangedError if the object at a name is another one than at the begin of the commit."""
        if here is None and move.old is None:
            return
        if here is None or here.st_ino != move.old:
            raise _changed(move)
        now, seen = look(here), move.seen
        if now != seen and (self._ctimes or now is None or seen is None or now[:-1] != seen[:-1]):
            raise _changed(move)

    def _rename(self, move: Move, here: os.stat_result | None, at: int, name: bytes) -> None:
        assert move.source is not None
        if here is not None and here.st_ino == move.new:
            return
        former, old = self._from.parent(os.fsencode(move.source))
        if here is not None or inode(former, old) != move.new:
            raise _changed(move)
        _rename_to_free(former, old, at, name)
        if inode(at, name) != move.new:
            _rename_to_free(at, name, former, old)
            raise _changed(move)

    def _staged(self, move: Move) -> tuple[int, bytes]:
        """The place of the new object before the move, and of the replaced one after it. Raises OSError."""
        if not move.own:
            return self._new, b"%d" % move.number
        if self._layer is None:
            raise FileNotFoundError(errno.ENOENT, "its branch is gone", move.path)
        return self._layer.parent(os.fsencode(move.path))

    def _put(self, move: Move, at: int, name: bytes, number: bytes) -> None:
        staged = self._staged(move)
        if move.old is None:
            _rename_to_free(*staged, at, name)
            return
        try:
            rename(*staged, at, name, RENAME_EXCHANGE)
        except OSError as error:
            if error.errno not in _NO_FLAGS:
                raise
            _rename_to_free(at, name, self._old, number)
            step(f"between {move.path}")
            _rename_to_free(*staged, at, name)
            return
        if inode(*staged) != move.old:
            rename(*staged, at, name, RENAME_EXCHANGE)
            raise _changed(move)

    def _mode(self, move: Move, at: int, name: bytes) -> None:
        """Give a directory, which is in place, the mode that it had to lack for the rename."""
        if move.mode is not None:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            with Owned(os.open(name, flags, dir_fd=at)) as fd:
                if stat.S_IMODE(os.fstat(fd).st_mode) != stat.S_IMODE(move.mode):
                    os.chmod(b"/proc/self/fd/%d/." % fd, stat.S_IMODE(move.mode))

    def _take_back(self, move: Move) -> None:
        number = b"%d" % move.number
        try:
            at, name = self._tree.parent(os.fsencode(move.path))
        except FileNotFoundError:
            if self._is_renamed_back(move):
                return
            raise
        here, old = inode(at, name), inode(self._old, number)
        if move.source is not None:
            if here == move.new:
                _rename_to_free(at, name, *self._from.parent(os.fsencode(move.source)))
            return
        if move.new is not None and here == move.new:
            if move.old is None or old is not None:
                _rename_to_free(at, name, *self._staged(move))
            else:
                rename(*self._staged(move), at, name, RENAME_EXCHANGE)
        if old is not None and inode(at, name) is None:
            _rename_to_free(self._old, number, at, name)

    def _is_renamed_back(self, move: Move) -> bool:
        """Whether a path is in a directory that has its former name, so that nothing is done there."""
        for other in self._journal.moves:
            if other.source is not None and move.path.startswith(f"{other.path}/"):
                return inode(*self._from.parent(os.fsencode(other.source))) == other.new
        return False

    # -- attributes of directories ------------------------------------------------------------------------

    def _set(
        self, path: str, new: attributes.FileAttributes, old: attributes.FileAttributes
    ) -> None:
        with Owned(self._tree.directory(os.fsencode(path))) as found, Owned(_accessible(found)) as fd:
            for name in old.xattrs:
                if name not in new.xattrs:
                    try:
                        os.removexattr(fd, name)
                    except OSError as error:
                        if error.errno not in ABSENT:
                            raise
            attributes.write(fd, None, new, attributes.unsupported)


def _accessible(path: int) -> int:
    """An fd for reading of a directory, whose mode may exclude its owner until it is set."""
    try:
        return open_for_listing(path)
    except PermissionError:
        os.chmod(b"/proc/self/fd/%d" % path, stat.S_IRWXU)
        return open_for_listing(path)


def _rename_to_free(old_at: int, old: bytes, new_at: int, new: bytes) -> None:
    """Rename to a name that does not exist. Raises OSError."""
    try:
        rename(old_at, old, new_at, new, RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in _NO_FLAGS:
            raise
        if inode(new_at, new) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fsdecode(new)) from error
        rename(old_at, old, new_at, new)


def look(st: os.stat_result) -> list[int] | None:
    """What `Move.seen` is of an object; None of a directory, which changes with the names in it."""
    if stat.S_ISDIR(st.st_mode):
        return None
    # A file with several names gets another ctime when one of the others comes or goes.
    return [st.st_size, st.st_mtime_ns, st.st_ctime_ns if st.st_nlink == 1 else 0]


def at_path(path: str, error: OSError) -> OSError:
    """The error, with the path in the base."""
    return OSError(error.errno, os.strerror(error.errno or 0), path[1:] or ".")


def _changed(move: Move) -> ChangedError:
    return ChangedError(
        f"{quoted(move.path[1:])} was changed in the base while it was committed; everything was put "
        "back. Try "
        "again."
    )
