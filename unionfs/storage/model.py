"""Plain values that describe a volume and its users."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import quote, unquote

from unionfs.errors import quoted
from unionfs.storage.holds import Engine, Hold
from unionfs.sys.process import is_alive, pid_and_start

_CONTAINER = "container "
ANONYMOUS_LABEL = "com.docker.volume.anonymous"
"""Docker marks anonymous volumes with this label; its value is empty."""


@dataclass(frozen=True, slots=True)
class Volume:
    name: str
    driver: str
    mountpoint: str
    """The absolute path of its data when mounted; empty until a plugin reports it."""
    anonymous: bool
    options: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    created: float = 0.0
    """Seconds since the epoch."""
    scope: str = "local"
    """`local`, or `global` for a driver with the same volumes on every host."""
    directory: str = ""
    """ROOT/volumes/NAME, where the driver may store its state."""
    recorded: bool = field(default=True, compare=False)
    """Whether these values come from its record; else the volume is only a directory with `_data`."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for the record beside the data."""
        values = asdict(self)
        del values["directory"], values["recorded"]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any], directory: str) -> Volume:
        """Raises KeyError, TypeError or ValueError for values that `to_json` cannot return."""
        options, labels = dict(values["options"]), dict(values["labels"])
        if not all(isinstance(text, str) for part in (options, labels) for text in (*part, *part.values())):
            raise TypeError("options and labels must be strings")
        texts = (str(values[key]) for key in ("name", "driver", "mountpoint", "scope"))
        name, driver, mountpoint, scope = texts
        anonymous, created = bool(values["anonymous"]), float(values["created"])
        return cls(name, driver, mountpoint, anonymous, options, labels, created, scope, directory)


@dataclass(frozen=True, slots=True)
class VolumeUser:
    """A user of a volume: a text `KIND:PID:STARTTIME:WHAT`, with the start time in clock ticks since boot.

    A user ends with its process (when proc_pid_stat(5) no longer shows this pid and start time). A user with
    a text of another form stays until `detach`; one with a hold, which an engine mounted, until it is void.
    """

    text: str
    path: str
    """The path of the volume's data for this user."""
    hold: Hold | None = None

    @classmethod
    def of_this_process(cls, kind: str, what: str = "") -> str:
        """Returns the text for this process."""
        return cls.of_process(kind, *pid_and_start(os.getpid()), what)

    @classmethod
    def of_process(cls, kind: str, pid: int, started: int, what: str) -> str:
        """Returns the text for a process."""
        return f"{kind}:{pid}:{started}:{what}"

    @classmethod
    def of_engine(cls, mount_id: str) -> str:
        """Returns the text for an ID by which a container engine mounts volumes."""
        return f"{_CONTAINER}{quote(mount_id, safe='')}"

    @property
    def stored_text(self) -> str:
        """The text with the hold after a line break: versions without holds take it for another form."""
        return self.text if self.hold is None else f"{self.text}\n{self.hold.to_text()}"

    @classmethod
    def from_stored(cls, text: str, path: str) -> VolumeUser:
        """Raises ValueError for an invalid hold."""
        if not text.startswith(_CONTAINER):
            return cls(text, path)
        text, _, hold = text.partition("\n")
        return cls(text, path, Hold.from_text(hold))

    def _process(self) -> tuple[int, int] | None:
        parts = self.text.split(":", 3)
        if len(parts) >= 3 and parts[1].isdigit() and parts[2].isdigit():
            return int(parts[1]), int(parts[2])
        return None

    @property
    def is_gone(self) -> bool:
        if self.hold is not None:
            return self.hold.is_void(self.path)
        process = self._process()
        return process is not None and not is_alive(*process)

    def is_unused(self, engine: Engine | None = None) -> bool:
        """Whether it can be detached when `engine` removes the volume or begins the hold anew: it is gone, or
        a hold that was probably forgotten.
        """
        return self.is_gone or (self.hold is not None and self.hold.is_unused(self.path, engine))

    def __str__(self) -> str:
        """The user as a sentence fragment."""
        if self.hold is not None:
            mount_id = unquote(self.text.partition(" ")[2])
            return f"containers of {quoted(self.hold.engine.name)} (ID {quoted(mount_id[:12])})"
        process = self._process()
        if process is None:
            return quoted(self.text)
        kind, what = self.text.split(":", 1)[0], self.text.split(":", 3)[3:]
        # The part after "#" only makes the text unique.
        what = what if what and not what[0].startswith("#") else []
        named = f"the {kind} {quoted(what[0])}" if what and what[0] else f"a {kind}"
        return f"{named} (pid {process[0]})"
