"""What nodes know of a layer when another one is put on top of it; see `union.stacking`."""

from unionfs.core.node cimport Node, Rare
from unionfs.core.nodes cimport NodeTable
from unionfs.core.places cimport Layer, Place


def linked(NodeTable nodes not None):
    """The nodes of objects with several hard links."""
    return list(dict.fromkeys(nodes.by_inode.values()))


def mapped(NodeTable nodes not None):
    """The nodes that may be mapped to write although they are not open."""
    cdef Node node
    found = []
    for node in nodes.by_id.nodes():
        if node.use is not None and node.use.mapped and not node.use.handles:
            found.append(node)
    return found


def nameless(NodeTable nodes not None, Layer layer not None):
    """The nodes of a layer's objects that have no name."""
    cdef Node node
    found = []
    for node in nodes.by_id.nodes():
        if node.unlinked and node.place is not None and node.place.layer is layer:
            found.append(node)
    return found


def unlink(NodeTable nodes not None, Node node not None):
    """Forget which objects a node is: the next lookup of one of them makes another node."""
    for key in nodes.inodes_of.pop(node.id, ()):
        if nodes.by_inode.get(key) is node:
            del nodes.by_inode[key]


def becomes_lower(Node node not None, Layer layer not None):
    """Record that the layer of a node's object, which may have been the copy in the index, is a lower now: the object is
    found by each of its names, all of which the layer has."""
    cdef Rare rare = node.rare
    node.place = part_in(node.parent, layer, node.place)
    if rare is None:
        return
    rare.entry, rare.more_links, rare.lower_links = None, 0, 0
    if rare.links is not None:
        rare.links = [(parent, name, part_in(parent, layer, place)) for parent, name, place in rare.links]


cdef Place part_in(Node directory, Layer layer, Place otherwise):
    """The part of a directory that is in a layer."""
    cdef Place part
    if directory is not None:
        for part in directory.parts:
            if part.layer is layer:
                return part
    return otherwise
