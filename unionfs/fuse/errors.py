"""Errors of a session, as sentences for the user."""

from __future__ import annotations

from typing import Final

CUT_OFF: Final = (
    "the mount at {} was cut off from outside, by /sys/fs/fuse/connections/*/abort or umount --force; "
    "unmount it and mount it again"
)


class SessionError(Exception):
    """Mounting or serving failed; ``str()`` is the reason, without a full stop."""


class SessionUnfit(SessionError):
    """This type of session does not work on this host; another may."""
