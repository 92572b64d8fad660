"""How long the kernel may keep what an answer contains: a name, or the attributes of its object.

The rules and their reasons are those of `fuse.direct.nodeio`.
"""

cdef Timeout NEVER = Timeout(0, 0)
# 136 years: converted, it fits the kernel's clock on every machine (fs/fuse/dir.c, time_to_jiffies).
cdef Timeout FOREVER = Timeout(1ull << 32, 0)
cdef Timeout WHILE_WRITING = Timeout(0, 20_000_000)
cdef Timeout AFTER_WRITING = Timeout(1, 0)


cdef Timeout name_validity(Node node) noexcept:
    return FOREVER if node.territory.lasting else NEVER


cdef Timeout attribute_validity(Node node, Attributes attributes) noexcept:
    if not attributes.lasting:
        return NEVER
    if node.use is not None and node.use.written:
        return WHILE_WRITING if node.use.writers else AFTER_WRITING
    return FOREVER


def validity(Node node not None, Attributes attributes not None):
    """The validity of a node's attributes: seconds and nanoseconds."""
    cdef Timeout found = attribute_validity(node, attributes)
    return found.seconds, found.nanoseconds
