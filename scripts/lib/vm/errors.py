"""Errors that a user of the virtual machines sees, as one sentence."""


class VmError(Exception):
    """Something is missing or went wrong; the text is one sentence that names it and the cure."""
