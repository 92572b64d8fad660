"""Gives a union that is in use other layers: a new, empty upper over some of its lowers and others.

Known objects of layers that stay are found again by a refresh; the others lose their names. Those who have
them open go on with the old ones, as with removed files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from unionfs.core import stacking
from unionfs.core.files import Handle
from unionfs.core.places import Layer
from unionfs.union.newupper import new_upper
from unionfs.union.refreshing import Outdated
from unionfs.union.tree import Union


def relayer(
    union: Union,
    handles: Sequence[Handle],
    fd: int,
    path: str,
    lowers: Sequence[Layer | tuple[str, int]],
    commit: Callable[[], None],
) -> Outdated:
    """Put the empty directory ``fd`` over ``lowers``, topmost first: layers of the union, and paths with an
    fd each, which lie above these; ``commit`` makes it so on disk. ``handles``: the open files. Run a
    `Refresh` after it.

    Returns what is outdated besides. Raises what ``commit`` raises, ``OSError``, ``LayerError``; then nothing
    has changed.
    """
    former = set(union.stack.layers)
    layers: list[Layer] = []
    for lower in reversed(lowers):
        if not isinstance(lower, Layer):
            lower = Layer(layers[0].index - 1, *lower, is_upper=False, quiet=True)
        layers.insert(0, lower)
    for layer in layers:
        marks = union.markers.directory(layer.root_fd)
        layer.root.marked(impure=marks.impure, copied=False)
    root = union.nodes.root
    with new_upper(union, fd, path, layers) as index:
        names = root.territory.listing(root).names()
        commit()
    union.files.kept.clear()
    gone = former - set(union.stack.layers)
    for handle in handles:
        if handle.node.place is not None and handle.node.place.layer in gone:
            union.files.keep_object(handle.node)
    outdated = _lose_linked(union, gone)
    union.has_index(index)
    root.know_flags(None)
    root.changes()
    outdated.add(root)
    known = root.children or {}
    outdated.names.extend((root.id, name) for name in names if name not in known)
    return outdated


def _lose_linked(union: Union, gone: set[Layer]) -> Outdated:
    """Take the names from objects with several hard links in layers that are gone."""
    outdated, nodes = Outdated(), union.nodes
    for node in stacking.linked(nodes):
        if node.place is None or node.place.layer not in gone:
            continue
        for parent, name in node.names():
            nodes.lose(node, parent, name)
            outdated.names.append((parent.id, name))
        stacking.unlink(nodes, node)
        if node.unlinked:
            union.files.keep_object(node)
    return outdated
