"""The tests: unit, real mounts, and the comparison with kernel overlayfs."""
