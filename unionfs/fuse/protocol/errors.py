"""The errors of this package: one for bytes, one for an INIT that cannot be answered.

Rules:
- For any bytes, decoding raises only `ProtocolError`.
- Encoding takes values of this program: one that does not fit its field is a bug, and raises `struct.error`
  (out of range) or `ValueError` (a violated rule of this package).
- `NegotiationRefused` is for the user: `str(error)` is full sentences with thing, cause and cure.
"""

from __future__ import annotations


class ProtocolError(Exception):
    """Bytes that are not a message of the FUSE protocol.

    `unique` is the request's id if the header was readable, so that the request can be answered with an error
    instead of blocking its caller; else None.
    """

    def __init__(self, message: str, unique: int | None = None) -> None:
        super().__init__(message)
        self.unique = unique


class NegotiationRefused(Exception):
    """An explicit choice is not available on this mount, or the kernel is too old."""
