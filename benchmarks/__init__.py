"""Benchmarks. Nothing here asserts a time: figures depend on the machine."""
