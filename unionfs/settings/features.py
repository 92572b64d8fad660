"""Features of the disk format, with the names and values of kernel overlayfs's mount options.

Documentation/filesystems/overlayfs.rst describes each. None stands for the default, which depends on the
layers: `union.layers` decides when it has opened them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

#: The features that are options, with their values.
VALUES: Final = {
    "redirect_dir": ("on", "off", "follow", "nofollow"),
    "index": ("on", "off"),
    "metacopy": ("on", "off"),
    "xino": ("on", "off", "auto"),
}


@dataclass(frozen=True, slots=True)
class Features:
    """The chosen value of each feature; None: the default."""

    redirect_dir: str | None = None
    """Whether renames of directories with lower parts write redirects, and redirects are followed."""
    index: str | None = None
    """Whether hard links of lowers outlive copy-up, by an index in the work directory."""
    metacopy: str | None = None
    """Whether changes of metadata alone copy up metadata alone."""
    xino: str | None = None
    """How inode numbers of several filesystems are kept apart."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Features:
        """Read the values of `dataclasses.asdict`. Raises TypeError for others."""
        return cls(**values)


DEFAULTS: Final = Features()
