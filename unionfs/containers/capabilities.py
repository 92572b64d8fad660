"""Root's capabilities in a container: Docker's default set, changed by --cap-add and --cap-drop."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence

from unionfs.errors import UserError, quoted
from unionfs.sys.capabilities import NAMES, has_capability

#: Root's capabilities in Docker's containers (moby, daemon/pkg/oci/caps/defaults.go).
DEFAULT = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
    "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL",
    "CAP_AUDIT_WRITE",
)  # fmt: skip

_NAMES = tuple(f"CAP_{name}" for name in NAMES)
_ALL = "ALL"


def settle(add: Sequence[str], drop: Sequence[str], *, privileged: bool) -> tuple[str, ...]:
    """Return a container's capabilities, in the kernel's order; none for an ordinary user. Raises UserError.

    As in Docker: an added ALL is reduced by the dropped ones; with ALL dropped, the added ones stay.
    Defaults that this process lacks are left out.
    """
    added, dropped = _read("--cap-add", add), _read("--cap-drop", drop)
    if os.geteuid() != 0:
        if added or privileged:
            option = "--privileged" if privileged else f"--cap-add {quoted(add[0])}"
            raise UserError(
                f"{option} is refused: the command of an ordinary user has no capabilities; run it as root."
            )
        return ()
    held = {name for number, name in enumerate(_NAMES) if has_capability(number)}
    for name in sorted(added - {_ALL} - held):
        raise UserError(f"--cap-add {name} is refused: this process does not have it; omit it.")
    if privileged:
        return tuple(name for name in _NAMES if name in held)
    if _ALL in added:
        wanted = held - dropped
    elif _ALL in dropped:
        wanted = added
    else:
        wanted = set(DEFAULT) - dropped | added
    return tuple(name for name in _NAMES if name in wanted & held)


def _read(option: str, given: Sequence[str]) -> set[str]:
    found = set()
    for text in given:
        name = text.upper()
        if name != _ALL:
            name = f"CAP_{name.removeprefix('CAP_')}"
            if name not in _NAMES:
                near = difflib.get_close_matches(name, _NAMES, n=1, cutoff=0.7)
                cure = f"the nearest one is {near[0].removeprefix('CAP_')}" if near else "see capabilities(7)"
                raise UserError(f"{option} {quoted(text)}: unknown capability; {cure}.")
        found.add(name)
    return found
