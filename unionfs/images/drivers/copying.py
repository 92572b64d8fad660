"""Copies of the merged lowers, for drivers that have no layers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress

from unionfs.core.places import Layer
from unionfs.daemon.caller import CALLER
from unionfs.errors import on_failure, quoted
from unionfs.images.drivers import uppers
from unionfs.images.drivers.base import Writable
from unionfs.storage.copying import Copier, size_of
from unionfs.sys.fds import Owned, directory
from unionfs.union.diff import diff_of_copy
from unionfs.union.images import is_image, open_image
from unionfs.union.markers import Markers
from unionfs.union.merge import Merge

_PATH = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def copy_lowers(layer: Writable, target: str, called: str = "") -> None:
    """Copy what the lowers have together into an empty directory. Raises UserError.

    `called`: what an error message calls the target, if its path says nothing to a user.
    """
    with (
        on_failure(f"the lowers cannot be copied to {called or quoted(target)}", "make room there"),
        ExitStack() as resources,
    ):
        layers = []
        for index, path in enumerate(originals(layer)):
            fd = open_image(os.path.realpath(path)) if is_image(path) else os.open(path, _PATH)
            resources.enter_context(Owned(fd))
            layers.append(Layer(index, path, fd, is_upper=False))
        markers = Markers(uppers.prefix(), follows_redirects=uppers.follows_redirects())
        merge = Merge(layers, markers, directory_fds=256)
        resources.callback(merge.close)
        with directory(target) as root, CALLER.shown("copying the lowers") as progress:
            progress.measures(lambda: _size(layers, markers))
            Copier(merge, root, "the container", progress).tree(merge.roots)


def _size(layers: Sequence[Layer], markers: Markers) -> int:
    """The bytes of what is copied. Has a merge of its own, for a thread."""
    with closing(Merge(layers, markers, directory_fds=256)) as merge:
        return size_of(merge, merge.roots)


def originals(layer: Writable) -> Sequence[str]:
    """The lowers, below a directory that hides the storage root if one of them has it."""
    hiding = f"{layer.path}/hiding"
    return [hiding, *layer.lowers] if uppers.hide_storage(layer, hiding) else layer.lowers


def changes_since(tree: str, before: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """The changes of a directory that began as a copy or a snapshot of these, merged."""
    return diff_of_copy(tree, before, uppers.prefix(), follows_redirects=uppers.follows_redirects())


def size_of_changes(tree: str, before: Sequence[str]) -> int:
    """The bytes of files that were added or changed, without holes."""
    total = 0
    for kind, path in changes_since(tree, before):
        with suppress(OSError):
            st = os.lstat(os.fsencode(tree) + path)
            if kind != "D" and not os.path.isdir(os.fsencode(tree) + path):
                total += min(st.st_size, st.st_blocks * 512)
    return total
