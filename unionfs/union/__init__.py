"""The merged tree: layers, lookup, listing, copy-up, changes and the node table.

This package does not use FUSE or trio; functions work on directory fds and names.
"""
