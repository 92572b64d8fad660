"""The settings of one mount: absolute and complete, not checked against the host (see `daemon.preflight`)."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from unionfs.settings.features import DEFAULTS, Features
from unionfs.settings.shown import AS_STORED, Shown

if TYPE_CHECKING:
    from unionfs.settings.specs import Spec, TmpfsOptions

SESSIONS = ("auto", "direct", "pyfuse3")
IO_MODES = ("auto", "hybrid", "passthrough", "cached")
LOG_LEVELS = ("debug", "info", "warning", "error")
NOT_FOR_LIBFUSE = frozenset({"strictatime", "nodiratime"})
"""Mount flags that libfuse and fusermount3 refuse. FUSE itself changes no access times (fs/fuse/inode.c)."""


@dataclass(frozen=True, slots=True)
class MountSettings:
    """One mount. Paths are absolute, without symlinks, and decoded by `os.fsdecode`."""

    mountpoint: str
    lowers: tuple[str, ...]
    """Topmost first."""
    upper: str | None
    work: str | None
    read_only: bool
    """No upper, or `ro`."""
    session: str
    """`auto` until chosen, then `direct` or `pyfuse3`."""
    io: str
    """The I/O mode of the direct session: one of IO_MODES, `auto` until chosen."""
    fsname: str
    subtype: str
    allow_other: bool
    allow_root: bool
    volatile: bool
    userxattr: bool
    """Whether markers are `user.overlay.*` instead of `trusted.overlay.*`."""
    flags: tuple[str, ...]
    """Mount flags such as `dev`, `nosuid` and `noexec`."""
    security: tuple[str, ...]
    log_level: str
    mounted_by: int
    """The uid of the mounting user."""
    features: Features = DEFAULTS
    shown: Shown = AS_STORED
    upper_tmpfs: TmpfsOptions | None = None
    """Options of a detached tmpfs for upper and work; then `upper` and `work` are None."""
    storage: tuple[Spec, ...] = ()
    """The storage of the union, in mount order."""
    storage_root: str = ""
    """The directory of the volumes; empty without storage."""
    watch_lower: bool = False
    """Whether changes that others make to the lowers are shown."""
    cpu_idle: bool = False
    """Let CPUs become idle between requests."""
    outlive: bool = False
    """Whether the mount outlives its daemon: a holder starts another one."""
    max_nodes: int = 0
    """The number of nodes above which the kernel is asked to give some back; 0: no limit."""
    lives_with: tuple[int, int] | None = None
    """A process (pid, start time in clock ticks since boot) whose end ends the mount."""

    def fuse_options(self) -> list[str]:
        """Return libfuse's options, escaped for lib/fuse_opt.c."""
        named = [f"fsname={self.fsname}", *self.security]
        if self.subtype:
            named.append(f"subtype={self.subtype}")
        options = [text.replace("\\", "\\\\").replace(",", "\\,") for text in named]
        if self.allow_other:
            options.append("allow_other")
        elif self.allow_root:
            options.append("allow_root")
        if self.read_only:
            options.append("ro")
        return options + [flag for flag in self.flags if flag not in NOT_FOR_LIBFUSE]

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain values, for `from_json`."""
        values = asdict(self)
        if self.storage:
            # For start-up time: most mounts have no storage.
            from unionfs.settings.specs import to_json

            values["storage"] = [to_json(spec) for spec in self.storage]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> MountSettings:
        """Read the values of `to_json`. Raises KeyError or TypeError for other values."""
        plain: dict[str, Any] = {
            item.name: values[item.name]
            for item in fields(cls)
            # An older daemon may have fewer settings.
            if item.name in values or item.default is MISSING
        }
        for name, value in plain.items():
            if isinstance(value, list):
                plain[name] = tuple(value)
        if "shown" in plain:
            plain["shown"] = Shown.from_json(plain["shown"])
        if "features" in plain:
            plain["features"] = Features.from_json(plain["features"])
        if plain.get("storage") or plain.get("upper_tmpfs"):
            # For start-up time: most mounts have no storage.
            from unionfs.settings.specs import TmpfsOptions, from_json

            plain["storage"] = tuple(from_json(item) for item in plain.get("storage", ()))
            if plain.get("upper_tmpfs") is not None:
                plain["upper_tmpfs"] = TmpfsOptions.from_json(plain["upper_tmpfs"])
        return cls(**plain)
