"""An upper in the container's directory: of the drivers union and overlay2, which have one format."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress

from unionfs.errors import on_failure, quoted
from unionfs.images.drivers.base import Driver, Writable
from unionfs.storage.usage import size_of_tree
from unionfs.sys.capabilities import may_use_trusted_xattrs
from unionfs.union.diff import diff as changes
from unionfs.union.hiding import hide, parts_below
from unionfs.union.resting import TRUSTED, USER


def upper_of(layer: Writable) -> str:
    return f"{layer.path}/upper"


def work_of(layer: Writable) -> str:
    return f"{layer.path}/work"


def make_like(path: str, lower: str) -> None:
    """Make a directory with the owner and mode of another one, if it is missing."""
    if os.path.isdir(path):
        return
    st = os.stat(lower)
    os.mkdir(path, 0o700)
    with suppress(PermissionError):
        os.chown(path, st.st_uid, st.st_gid)
    os.chmod(path, stat.S_IMODE(st.st_mode))


def hide_storage(layer: Writable, upper: str | None = None) -> bool:
    """Hide the storage root, which contains the upper, from the container if a lower has it.

    `upper`: an upper that hides it in place of the container's own. Returns whether a lower has it. Raises
    UserError.
    """
    root, found = os.path.realpath(layer.root), False
    for lower in layer.lowers:
        parts = parts_below(lower, root)
        if parts is not None and os.path.isdir(lower):
            with on_failure(
                f"{quoted(root)} cannot be hidden from the container, whose lower {quoted(lower)} has it",
                "give a --root elsewhere, or -u tmpfs",
            ):
                if upper is not None:
                    make_like(upper, layer.lowers[0])
                hide(upper or upper_of(layer), lower, parts, userxattr=not may_use_trusted_xattrs())
            found = True
    return found


def prefix() -> bytes:
    """The prefix of the markers that this process reads and writes."""
    return TRUSTED if may_use_trusted_xattrs() else USER


def follows_redirects() -> bool | None:
    """Whether redirects are followed, as in a mount of this user's own; None: the default."""
    return True if os.geteuid() != 0 else None


class UpperDriver(Driver):
    """A driver whose layer is an upper and its work directory; how they are mounted is its own."""

    def create(self, layer: Writable) -> None:
        make_like(upper_of(layer), layer.lowers[0])
        with suppress(FileExistsError):
            os.mkdir(work_of(layer), 0o700)

    def diff(self, layer: Writable) -> Iterator[tuple[str, bytes]]:
        """Without the hidden directories, which were never part of the container."""
        root = os.path.realpath(layer.root)
        hidden = [parts_below(lower, root) for lower in layer.lowers]
        tops = [os.fsencode(f"/{'/'.join(parts)}/") for parts in hidden if parts is not None]
        found = changes(upper_of(layer), layer.lowers, prefix(), follows_redirects=follows_redirects())
        for kind, path in found:
            if kind != "D" or not any(path.startswith(top) for top in tops):
                yield kind, path

    def size(self, layer: Writable) -> int:
        try:
            return size_of_tree(upper_of(layer))
        except FileNotFoundError:  # the caller's own upper, or memory
            return 0
