"""The changes in the upper of a live mount."""

from __future__ import annotations

from collections.abc import Iterable

from unionfs.daemon.live import LiveMount
from unionfs.errors import UserError, quoted
from unionfs.settings.mount import MountSettings
from unionfs.union.diff import diff


def changes_of(mount: LiveMount) -> Iterable[tuple[str, bytes]]:
    """Return the changes as `diff` does; none without an upper. Raises UserError and OSError."""
    settings = mount.settings
    upper = settings.upper
    if settings.upper_tmpfs is not None:
        upper = upper_in_memory(mount)
    if upper is None:
        return ()
    prefix = b"user.overlay." if settings.userxattr else b"trusted.overlay."
    return diff(upper, settings.lowers, prefix, follows_redirects=follows_redirects(settings))


def follows_redirects(settings: MountSettings) -> bool:
    """Return whether the redirects in the layers of a mount are to be read."""
    # None, the default of layers in trusted.* xattrs, is only known to the daemon; redirects are then read.
    redirects = settings.features.redirect_dir
    return redirects in ("on", "follow") if settings.userxattr else redirects != "nofollow"


def upper_in_memory(mount: LiveMount) -> str:
    """Return a path to an upper in memory, through its daemon's fd. Raises UserError."""
    answer = mount.ask()
    number = None if answer is None else answer.get("upper_fd")
    if not isinstance(number, int):
        raise UserError(
            f"the daemon of {quoted(mount.settings.mountpoint)} (pid {mount.pid}) does not answer, and "
            "only it can reach an upper in memory; try again later."
        )
    return f"/proc/{mount.pid}/fd/{number}"
