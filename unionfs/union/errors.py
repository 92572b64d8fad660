"""Errors that are sentences for the user, as opposed to ``OSError`` for a request."""


class LayerError(Exception):
    """A layer cannot be used; ``str()`` is one sentence with the thing, the cause and the cure."""
