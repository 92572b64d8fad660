"""Specifications of a union's storage, as plain values with a JSON form.

`parsing` makes them from `-v`, `--mount` and `--tmpfs`; `attach` mounts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

PROPAGATIONS = ("private", "rprivate", "slave", "rslave", "shared", "rshared")
TMPFS_FLAGS = ("nosuid", "nodev", "noexec")
"""Default flags of Docker's tmpfs mounts."""


@dataclass(frozen=True, slots=True)
class TmpfsOptions:
    """Options of a tmpfs; tmpfs(5). None: the kernel's default."""

    size: str | None = None
    """Decimal bytes, or `50%` of memory; `0` means no limit."""
    mode: int | None = None
    """Mode of the root directory."""
    nr_inodes: str | None = None
    uid: int | None = None
    gid: int | None = None
    swap: bool | None = None
    """None: `noswap` if the kernel supports it (Linux 6.4). False: `noswap`, or an error."""
    more: tuple[tuple[str, str], ...] = ()
    """Other options of tmpfs, such as `huge`; a flag has an empty value."""

    def parameters(self) -> list[tuple[str, str]]:
        """Return names and values for fsconfig(2), without `noswap`."""
        given = {
            "size": self.size,
            "mode": None if self.mode is None else f"{self.mode:o}",
            "nr_inodes": self.nr_inodes,
            "uid": None if self.uid is None else str(self.uid),
            "gid": None if self.gid is None else str(self.gid),
        }
        return [(name, value) for name, value in given.items() if value is not None] + list(self.more)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TmpfsOptions:
        """Read the values of `asdict`. Raises KeyError or TypeError for other values."""
        return cls(**{**values, "more": tuple((str(name), str(value)) for name, value in values["more"])})


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    kind: ClassVar[str] = "volume"

    target: str
    name: str | None = None
    """None: an anonymous volume, not created yet."""
    read_only: bool = False
    anonymous: bool = False
    driver: str = "local"
    options: tuple[tuple[str, str], ...] = ()
    """Options of the driver."""
    copy: bool = True
    """Fill an empty volume with the union's content at the target."""
    subpath: str = ""
    """A directory or file in the volume to mount instead of the whole volume."""

    @property
    def source(self) -> str:
        return f"volume {self.name}" if self.name and not self.anonymous else "an anonymous volume"


@dataclass(frozen=True, slots=True)
class BindSpec:
    """A directory or file of the host."""

    kind: ClassVar[str] = "bind"

    target: str
    path: str
    """On the host; absolute."""
    read_only: bool = False
    propagation: str = "rprivate"
    create: bool = False
    """Create a missing source as a directory."""
    recursive: bool = True
    """Include the mounts below the source."""
    read_only_below: bool = True
    """Apply `read_only` to the mounts below, too."""

    @property
    def source(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class TmpfsSpec:
    """A private tmpfs that ends with the union."""

    kind: ClassVar[str] = "tmpfs"

    target: str
    options: TmpfsOptions = field(default_factory=TmpfsOptions)
    read_only: bool = False
    flags: tuple[str, ...] = TMPFS_FLAGS

    @property
    def source(self) -> str:
        return "a tmpfs"


Spec = VolumeSpec | BindSpec | TmpfsSpec


def to_json(spec: Spec) -> dict[str, Any]:
    """Return a spec as plain values, for `from_json`."""
    return {"type": spec.kind, **asdict(spec)}


def from_json(values: Mapping[str, Any]) -> Spec:
    """Read the values of `to_json`. Raises KeyError or TypeError for other values."""
    given = {name: value for name, value in values.items() if name != "type"}
    match values["type"]:
        case "volume":
            pairs = tuple((str(name), str(value)) for name, value in given["options"])
            return VolumeSpec(**{**_known(VolumeSpec, given), "options": pairs})
        case "bind":
            return BindSpec(**_known(BindSpec, given))
        case "tmpfs":
            given["options"] = TmpfsOptions.from_json(given["options"])
            given["flags"] = tuple(given["flags"])
            return TmpfsSpec(**_known(TmpfsSpec, given))
        case other:
            raise KeyError(other)


def _known(kind: type[Spec], values: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: values[item.name] for item in fields(kind) if item.name in values}
