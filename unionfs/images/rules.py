"""What an archive of strangers may contain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from unionfs.storage.archive.headers import Malformed

FREE_RATIO: Final = 256 << 20
"""Bytes of content that may be compressed to any size: the ratio says something about large layers only."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The limits of one layer, and what is refused in it unless asked for."""

    size: int = 64 << 30
    """Bytes of the uncompressed tar."""
    entries: int = 4_000_000
    """Names, with directories that the tar does not name."""
    ratio: int = 400
    """Uncompressed bytes per compressed byte, once there are more than FREE_RATIO of them."""
    any_name: bool = False
    """Names with control characters, as line feeds, are accepted."""
    any_platform: bool = False
    """Images for other machines are accepted."""
    skip_devices: bool = False
    """Device files are left out where this user cannot make them."""


DEFAULTS: Final = Rules()


class Refused(Malformed):
    """An archive is refused although it is whole; the text is the cause, `cure` what the user can do."""

    def __init__(self, cause: str, cure: str) -> None:
        super().__init__(cause)
        self.cure = cure
