"""A copy-on-write union filesystem for Linux, served through FUSE."""

__version__ = "0.1.0"
