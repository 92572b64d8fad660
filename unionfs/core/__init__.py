"""What every request passes through, compiled by Cython. It imports nothing of the rest.

    stats      struct stat, and what is made of it: os.stat_result, fuse_attr
    places     real directories in layers, and the one gate from a directory to an fd
    node       nodes, the objects of a union's tree
    nodes      the node table
    idtable    its hash table
    search     the merge of names over the layers

Each has a `.pyx` (the code), a `.pxd` (what other compiled modules use of it) and a `.pyi` (its types, for
the rest).

It relies on the interpreter lock. Its modules do not declare that they need none, so a free-threaded Python
switches the lock on when it imports them, with a warning.
"""
