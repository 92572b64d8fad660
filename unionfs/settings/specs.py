"""What is to be mounted into a union, as plain values that go through JSON and back.

`parsing` makes them out of `-v`, `--mount` and `--tmpfs`; `attach` mounts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

PROPAGATIONS = ("private", "rprivate", "slave", "rslave", "shared", "rshared")
TMPFS_FLAGS = ("nosuid", "nodev", "noexec")
"""What Docker's tmpfs mounts have unless the contrary is asked for."""


@dataclass(frozen=True, slots=True)
class TmpfsOptions:
    """What a tmpfs is made with; tmpfs(5). None: the kernel's own default."""

    size: str | None = None
    """Bytes as a decimal number, or `50%` of the memory; `0` is no limit."""
    mode: int | None = None
    """Of the root directory."""
    nr_inodes: str | None = None
    uid: int | None = None
    gid: int | None = None
    swap: bool | None = None
    """None: kept out of swap if the kernel can do that (`noswap`, Linux 6.4). False: that or a refusal."""
    more: tuple[tuple[str, str], ...] = ()
    """Further options of tmpfs, such as `huge`; a flag has an empty value."""

    def parameters(self) -> list[tuple[str, str]]:
        """Names and values for fsconfig(2), without `noswap`."""
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
        """Raises KeyError or TypeError when the values are not those of `asdict`."""
        return cls(**{**values, "more": tuple((str(name), str(value)) for name, value in values["more"])})


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    """A named or anonymous volume."""

    kind: ClassVar[str] = "volume"

    target: str
    name: str | None = None
    """None: an anonymous one, not made yet."""
    read_only: bool = False
    anonymous: bool = False
    driver: str = "local"
    options: tuple[tuple[str, str], ...] = ()
    """For the driver."""
    copy: bool = True
    """An empty volume is filled with what the union has at the target."""
    subpath: str = ""
    """A directory or file in the volume to mount instead of all of it."""

    @property
    def source(self) -> str:
        """What a sentence calls it."""
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
    """A missing source is made, as a directory."""
    recursive: bool = True
    """With what is mounted below the source."""
    read_only_below: bool = True
    """`read_only` is true of what is mounted below, too."""

    @property
    def source(self) -> str:
        """What a sentence calls it."""
        return self.path


@dataclass(frozen=True, slots=True)
class TmpfsSpec:
    """A tmpfs of its own, gone with the union."""

    kind: ClassVar[str] = "tmpfs"

    target: str
    options: TmpfsOptions = field(default_factory=TmpfsOptions)
    read_only: bool = False
    flags: tuple[str, ...] = TMPFS_FLAGS

    @property
    def source(self) -> str:
        """What a sentence calls it."""
        return "a tmpfs"


Spec = VolumeSpec | BindSpec | TmpfsSpec


def to_json(spec: Spec) -> dict[str, Any]:
    """A spec as plain values; `from_json` reads them back."""
    return {"type": spec.kind, **asdict(spec)}


def from_json(values: Mapping[str, Any]) -> Spec:
    """Raises KeyError or TypeError when the values are not those of `to_json`."""
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
