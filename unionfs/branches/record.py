"""The record of one branch: its base or parent, its maker and time, and the command that ran in it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from unionfs.branches.ids import Ids

VERSION = 1
WHOLE = "/"
"""The base of a branch that is the whole system."""


@dataclass(frozen=True, slots=True)
class Record:
    """Times are nanoseconds since the epoch."""

    base: str
    """The directory at the bottom: an absolute path without symlinks."""
    base_inode: int
    """Its inode number: another directory of that name is not the base."""
    created: int
    uid: int
    parent: str | None = None
    """The branch below, None if the base is directly below."""
    session: int = 0
    """When the branch was last mounted, 0 if never: the base's later changes are conflicts."""
    command: tuple[str, ...] = ()
    """The last command that ran in it by `try`."""
    exit_code: int | None = None
    """Of that command; None if none has ended."""
    ended: int | None = None
    """When that command ended."""
    userxattr: bool = False
    """Whether markers are `user.overlay.*`."""
    ids: Ids | None = None
    """Those of the user namespace in which it is used; None: it is used in its user's own."""
    whole: str | None = None
    """The base of the branch of which this is a part: see `parts`."""
    filesystem: str | None = None
    """Of a part: as of `filesystem_identity`."""
    flags: tuple[str, ...] = ()
    """Of a part: mount flags of its filesystem that its mount has, too."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for `from_json`."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, values: Any) -> Record:
        """Read the values of `to_json`. Raises ValueError, KeyError or TypeError for others."""
        if values["version"] != VERSION:
            raise ValueError(f"its version is {values['version']!r}, and this program reads {VERSION}")
        known = {item.name: values[item.name] for item in fields(cls) if item.name in values}
        for name in ("command", "flags"):
            known[name] = tuple(known.get(name, ()))
        if known.get("ids") is not None:
            known["ids"] = Ids.from_json(known["ids"])
        record = cls(**known)
        if not os.path.isabs(record.base):
            raise ValueError("its base is not an absolute path")
        return record

    def started(self, command: tuple[str, ...]) -> Record:
        """The record while a command runs."""
        return replace(self, command=command, exit_code=None, ended=None)

    def finished(self, code: int, moment: int) -> Record:
        """The record when the command has ended."""
        return replace(self, exit_code=code, ended=moment)
