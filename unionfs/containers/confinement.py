"""The confinement of a command, from the options of `unionfs run`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from unionfs.containers import capabilities
from unionfs.containers.description import Confinement
from unionfs.containers.seccomp import BUILT_IN, compile_profile
from unionfs.errors import UserError, quoted

_NO_NEW_PRIVILEGES = ("no-new-privileges", "no-new-privileges=true", "no-new-privileges:true")


def settle_confinement(
    add: Sequence[str], drop: Sequence[str], security: Sequence[str], *, privileged: bool
) -> Confinement:
    """Return the confinement for --cap-add, --cap-drop, --security-opt and --privileged. Raises UserError.

    An explicit profile applies to a privileged container, too, as in Docker.
    """
    kept = capabilities.settle(add, drop, privileged=privileged)
    profile = None if privileged else BUILT_IN
    for text in security:
        key, _, value = text.partition("=")
        if key == "seccomp" and value:
            profile = {"unconfined": None, "builtin": BUILT_IN}.get(value, os.path.abspath(value))
        elif text not in _NO_NEW_PRIVILEGES:
            raise UserError(
                f"--security-opt {quoted(text)} is not supported; write seccomp=FILE, seccomp=unconfined, or "
                "no-new-privileges (which always holds)."
            )
    program = None if profile is None else compile_profile(profile, kept)
    return Confinement(kept, program, privileged)
