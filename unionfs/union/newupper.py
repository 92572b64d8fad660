"""Puts a new, empty upper on top of the layers of a union that is in use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from unionfs.core.places import Layer
from unionfs.sys import attributes
from unionfs.sys.fds import Owned
from unionfs.union.index import Index, open_index
from unionfs.union.tree import Union
from unionfs.union.xattrs import copied_xattrs


@contextmanager
def new_upper(union: Union, fd: int, path: str, lowers: Sequence[Layer]) -> Iterator[Index | None]:
    """Make the empty directory ``fd`` (O_PATH, on the mount of upper and work) the upper over ``lowers``, and
    yield its empty index, if the union has one, which the caller passes to the union. The present upper may
    be the topmost of the lowers.

    An error of the context puts layers and index back; at its end the former index is removed. Raises
    ``OSError``, ``LayerError``.
    """
    stack, former, upper = union.stack, list(union.stack.layers), union.require_upper()
    quiet, stays = upper.quiet, upper in lowers
    _copy_root_attributes(union, lowers[0].root_fd, fd)
    layer = Layer(lowers[0].index - 1, path, fd, is_upper=True, quiet=quiet)
    layer.root.knows_named(some=False)
    try:
        if stays:
            upper.becomes_lower()
        stack.has_layers([layer, *lowers])
        union.merge.has_layers(stack.layers)
        if union.index is None:
            yield None
            return
        with _empty_index(union):
            yield open_index(stack, union.origins)
    except BaseException:
        if stays:
            upper.becomes_upper_again(quiet=quiet)
        stack.has_layers(former)
        union.merge.has_layers(former)
        raise


@contextmanager
def _empty_index(union: Union) -> Iterator[None]:
    """Keep the index in work during the context, with an empty one in its place; after an error it is put
    back, else removed."""
    with union.work.temporary() as aside:
        os.mkdir(aside.name, 0o700, dir_fd=union.work.fd)
        union.stack.exchange_index(*aside.at)
        try:
            yield
        except BaseException:
            union.stack.exchange_index(*aside.at)
            raise


def _copy_root_attributes(union: Union, source: int, fd: int) -> None:
    """Give an empty directory the attributes of the root of a layer that was an upper (both O_PATH)."""
    markers = union.markers
    path = b"/proc/self/fd/%d" % fd
    with Owned(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as target:
        st = os.stat(source)
        xattrs = copied_xattrs(markers, union.gate.rights, source, path_only=True)
        for name in (markers.uuid, markers.protattr):
            with suppress(OSError):  # if it has one
                xattrs[name] = os.getxattr(b"/proc/self/fd/%d" % source, name)
        owner = not union.identity.owns(st)
        attributes.write(target, None, attributes.attributes(st, xattrs), attributes.unsupported, owner=owner)
