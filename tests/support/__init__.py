"""Shared parts of the tests: mounts, layer areas, workers with another identity, snapshots of trees."""
