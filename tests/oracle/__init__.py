"""The same operations on a union and on kernel overlayfs, results compared."""
