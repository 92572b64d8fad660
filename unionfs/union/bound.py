"""Storage that the union shows at one place by itself, where no kernel mount can be made (without root).

A bound directory is served as it is: no merging, no copy-up, no markers. A change goes to the real directory
at once; a character device 0/0 and `trusted.overlay.*` xattrs are plain data in there. What leaves it or
comes in by rename or link is EXDEV, as between two filesystems, and read-only storage is EROFS.

Others change it too, so nothing that is known of it lasts: every lookup asks the real directory, and a name
that has come to stand for another object is another node.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from unionfs.sys import calls
from unionfs.union.places import Place

if TYPE_CHECKING:
    from unionfs.union.attributes import Attributes
    from unionfs.union.nodes import Node
    from unionfs.union.places import Layer
    from unionfs.union.tree import Union


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def bind(union: Union, parent: Node, name: bytes, layer: Layer) -> Node:
    """Show ``layer`` as ``name``, which the union has already, in ``parent``; for the life of the union.

    To be called before anybody has looked the name up.
    """
    st = os.stat(layer.root_fd)
    known = union.nodes.child(parent, name)
    # Nobody has looked the directory up, and without a child the table would let go of it.
    union.nodes.looked_up(parent)
    if known is not None:
        union.nodes.remove_name(known, parent, name)
    node = union.nodes.add(parent, name, st, [layer.root])
    union.nodes.forget(parent, 1)
    if not node.is_dir:
        node.held = os.dup(layer.root_fd)
    union.nodes.looked_up(node)
    return node


def unbind(union: Union, node: Node) -> None:
    """Undo :meth:`bind`, before the union is mounted."""
    union.nodes.forget(node, 1)


def stat_name(union: Union, parent: Node, name: bytes) -> os.stat_result | None:
    """stat(2) of a name in a bound directory, ``None`` when there is none."""
    try:
        return os.stat(name, dir_fd=union.gate.fd(parent.parts[0]), follow_symlinks=False)
    except FileNotFoundError:
        return None


def lookup(union: Union, parent: Node, name: bytes, known: Node | None) -> tuple[Node, Attributes] | None:
    """The node of a name in a bound directory; ``known`` is the one that it stood for until now."""
    if known is not None and known.is_mountpoint:
        return known, union.attributes(known)
    st = stat_name(union, parent, name)
    if known is not None:
        if st is not None and _is_still(known, st):
            return known, union.attributes_of(known, st)
        # Somebody else has removed or replaced it.
        for part in known.parts:
            union.gate.forget(part)
        union.nodes.remove_name(known, parent, name)
    if st is None:
        return None
    place = parent.parts[0]
    where = Place(place.layer, place, name) if stat.S_ISDIR(st.st_mode) else place
    node = union.nodes.add(parent, name, st, [where])
    return node, union.attributes_of(node, st)


def _is_still(node: Node, st: os.stat_result) -> bool:
    return node.identity == (st.st_dev, st.st_ino) and node.kind == stat.S_IFMT(st.st_mode)


def writable(node: Node) -> Place:
    """The real directory of a bound directory that is about to change. Raises EROFS, ENOENT."""
    layer = node.bound
    assert layer is not None
    if layer.read_only:
        raise _error(errno.EROFS)
    if node.unlinked:
        raise _error(errno.ENOENT)
    return node.parts[0]


def same_storage(one: Node, other: Node) -> bool:
    """Whether two nodes are both of the merged layers, or of one bound storage. Else EXDEV is due."""
    return one.bound is other.bound


def rename(
    union: Union, node: Node, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int
) -> None:
    """renameat2(2) within one storage; the real filesystem says what is allowed."""
    places = writable(parent), writable(new_parent)
    found = union.lookup(new_parent, new_name)
    target = None if found is None else found[0]
    old_fd = os.dup(union.gate.fd(places[0]))
    try:
        held = -1 if target is None or flags else union.open_path(target)
        try:
            calls.renameat2(old_fd, name, union.gate.fd(places[1]), new_name, flags)
            if target is node:
                return
            if target is not None and flags != calls.RENAME_EXCHANGE:
                for part in target.parts:
                    union.gate.forget(part)
                union.nodes.remove_name(target, new_parent, new_name)
                if target.held < 0:
                    target.held, held = held, -1
        finally:
            if held >= 0:
                os.close(held)
    finally:
        os.close(old_fd)
    union.nodes.move(node, parent, name, new_parent, new_name)
    if flags == calls.RENAME_EXCHANGE and target is not None:
        union.nodes.move(target, new_parent, new_name, parent, name)


def link(union: Union, node: Node, parent: Node, name: bytes) -> tuple[Node, Attributes]:
    """linkat(2) within one storage: the new name is a node of its own with the same ``st_ino``."""
    target = writable(parent)
    source = union.open_path(node)
    try:
        # By the fd for what has no name (O_TMPFILE).
        path = b"/proc/self/fd/%d" % source
        if node.held < 0 and node.place is not None:
            os.close(source)
            source = os.dup(union.gate.fd(node.place))
            dir_fd = union.gate.fd(target)
            os.link(node.name, name, src_dir_fd=source, dst_dir_fd=dir_fd, follow_symlinks=False)
        else:
            os.link(path, name, dst_dir_fd=union.gate.fd(target), follow_symlinks=True)
    finally:
        os.close(source)
    found = union.lookup(parent, name)
    if found is None:
        raise _error(errno.ENOENT)
    return found
