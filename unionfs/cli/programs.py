"""The programs of this package by their names: what a caller, the launcher or the resident runs."""

from __future__ import annotations

from collections.abc import Sequence


def run_program(program: str, arguments: Sequence[str]) -> int:
    """Run `unionfs`, `mount.TYPE` or, by any other name, `fuse-unionfs` here. Returns the exit code."""
    # For start-up time: most of it is only needed here.
    from unionfs.cli import fuse_unionfs, main

    if program == "unionfs" or program.startswith("mount."):
        return main.run_here(arguments, program)
    return fuse_unionfs.run_here(arguments, program)
