"""The storage root: the directory that holds volumes and containers.

    ROOT/volumes/NAME/_data         a volume's files, in Docker's layout
    ROOT/containers/NAME/           a container's upper and work
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress

from unionfs.daemon.errors import UserError, quoted, reason
from unionfs.sys.capabilities import in_initial_user_namespace

ENVIRONMENT = "UNIONFS_ROOT"
_SYSTEM = "/var/lib/unionfs"
# Others may pass through to what they are allowed to reach, but list nothing, as in /var/lib/docker.
_MODE = 0o711


def storage_root(chosen: str | None = None, environment: Mapping[str, str] | None = None) -> str:
    """The storage root as an absolute path; it need not exist.

    The first of: `chosen` (`--root`), `UNIONFS_ROOT`, /var/lib/unionfs for root, `$XDG_DATA_HOME/unionfs` for
    others (XDG Base Directory Specification: ~/.local/share by default, relative values don't count). Uid 0
    of a user namespace is an ordinary user. Raises UserError when there is no home directory either.
    """
    values = os.environ if environment is None else environment
    if chosen is not None and not chosen:
        raise UserError("--root is given without a directory; name one.")
    path = chosen or values.get(ENVIRONMENT)
    if path:
        try:
            return os.path.abspath(path)
        except FileNotFoundError as error:  # of getcwd
            raise UserError(
                f"the storage root {quoted(path)} is relative, but the current directory is gone; give an "
                "absolute path."
            ) from error
    if os.geteuid() == 0 and in_initial_user_namespace():
        return _SYSTEM
    data = values.get("XDG_DATA_HOME", "")
    if not data.startswith("/"):
        home = values.get("HOME") or os.path.expanduser("~")
        if not home.startswith("/"):
            raise UserError(
                f"there is no home directory for the storage root; set HOME or {ENVIRONMENT}, or give --root."
            )
        data = f"{home}/.local/share"
    return f"{data}/unionfs"


def make_directory(path: str) -> str:
    """Make a directory of the storage root, with those above it, if it is missing. Raises UserError."""
    try:
        # Each with its mode: os.makedirs would make those above with whatever the umask leaves of 0777.
        missing = [path]
        while not os.path.lexists(missing[-1]):
            missing.append(os.path.dirname(missing[-1]))
        for directory in reversed(missing[:-1]):
            with suppress(FileExistsError):
                os.mkdir(directory, _MODE)
                os.chmod(directory, _MODE)
    except OSError as error:
        raise UserError(
            f"{quoted(path)} cannot be made: {reason(error)}; give another storage root by --root or "
            f"{ENVIRONMENT}."
        ) from error
    return path
