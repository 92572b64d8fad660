"""The command `unionfs` as it is installed: it hands what imports most to the launcher, which saves that.

The launcher comes back, as `unionfs --launched-as PROGRAM`, with what must run in a process of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

_LAUNCHER = "fuse-unionfs"


def _launch(program: str, arguments: Sequence[str]) -> None:
    """Become the launcher beside this script, if it is there."""
    path = os.path.join(os.path.dirname(os.path.realpath(sys.argv[0])), _LAUNCHER)
    try:
        os.execv(path, [program, *arguments])
    except OSError:
        return


def main() -> None:
    """The console script `unionfs`."""
    match sys.argv[1:]:
        case ["--resident", name, identity]:
            # For start-up time: everything.
            from unionfs.cli.resident import main as reside

            reside(name, identity)
        case ["--launched-as", program, *arguments]:
            # For start-up time: not for the others.
            from unionfs.cli.common import leave
            from unionfs.cli.programs import run_program

            leave(run_program(program, arguments))
        case arguments:
            program = os.path.basename(sys.argv[0])
            if arguments[:1] == ["mount"] or arguments[:2] == ["branch", "commit"]:
                _launch("unionfs", arguments)
            elif program.startswith("mount."):
                _launch(program, arguments)
            # For start-up time: the launcher does not need it.
            from unionfs.cli.main import main as run_main

            run_main()
