"""Errors of a session, as sentences for the user."""

from __future__ import annotations

from typing import Final

CUT_OFF: Final = (
    "the mount at {} was cut off from outside, by /sys/fs/fuse/connections/*/abort or umount --force; "
    "unmount it and mount it again"
)


class SessionError(Exception):
    """The union could not be mounted, or could not be served on; ``str()`` says why, without a full stop."""


class SessionUnfit(SessionError):
    """This kind of session does not work on this host; another kind may."""
