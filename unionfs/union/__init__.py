"""What the merged tree is: layers, lookup, listing, copy-up, changes and the node table.

No FUSE and no trio in here; every function works on directory fds and names.
"""
