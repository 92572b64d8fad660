"""Errors: sentences for the user, and ``OSError`` for a request."""

from __future__ import annotations

import os


class LayerError(Exception):
    """A layer cannot be used; ``str()`` is one sentence with the thing, the cause and the cure."""


def os_error(code: int) -> OSError:
    """The ``OSError`` of an errno."""
    return OSError(code, os.strerror(code))
