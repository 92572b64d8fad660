"""`unionfs --resident`, which the launcher starts: imports what mounts and commits need, and serves calls."""

from __future__ import annotations

import importlib
import os

from unionfs.cli.programs import run_program
from unionfs.daemon.resident import reside

_NEEDED = (
    "unionfs.cli.fuse_unionfs", "unionfs.cli.main", "unionfs.cli.mount", "unionfs.daemon.service",
    "unionfs.cli.branch.making", "unionfs.cli.branch.committing", "unionfs.branches.commit",
)  # fmt: skip
_SYSLOG = "/dev/log"


def main(name: str, identity: str) -> None:
    """Serve calls until nobody needs it any more."""
    for module in _NEEDED:
        importlib.import_module(module)
    if os.path.exists(_SYSLOG):
        importlib.import_module("logging.handlers")
    reside(name, identity, run_program)
