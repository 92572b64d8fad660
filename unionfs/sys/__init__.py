"""Thin typed wrappers of the system calls Python lacks. No policy."""
