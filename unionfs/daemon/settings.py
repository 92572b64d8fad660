"""All that is said about one mount before it is made: absolute, complete and unchecked by the host.

`preflight` holds these settings against the host; `live` stores them; `host` and `inspect` show them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from unionfs.daemon.options import Options, parse_options
from unionfs.errors import UserError, quoted

if TYPE_CHECKING:
    from unionfs.fuse.direct.mounting import MountOptions
    from unionfs.storage.specs import Spec, TmpfsOptions

SESSIONS = ("auto", "direct", "pyfuse3")
IO_MODES = ("auto", "hybrid", "passthrough", "cached")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class MountSettings:
    """One mount. Paths are absolute and free of symlinks; names are decoded as by `os.fsdecode`."""

    mountpoint: str
    lowers: tuple[str, ...]
    """Topmost first."""
    upper: str | None
    work: str | None
    read_only: bool
    """No upper, or `ro`."""
    session: str
    """What serves it: `auto` until that is known, then `direct` or `pyfuse3`."""
    io: str
    """How the direct session reads and writes files: one of IO_MODES, `auto` until that is known."""
    fsname: str
    subtype: str
    allow_other: bool
    allow_root: bool
    volatile: bool
    userxattr: bool
    """Whether markers are `user.overlay.*` instead of `trusted.overlay.*`."""
    flags: tuple[str, ...]
    """Mount flags: `dev`, `nosuid`, `noexec` and the like."""
    security: tuple[str, ...]
    log_level: str
    mounted_by: int
    """The user id that made the mount."""
    upper_tmpfs: TmpfsOptions | None = None
    """Upper and work are on a tmpfs of this kind, which no path leads to; `upper` and `work` are None."""
    storage: tuple[Spec, ...] = ()
    """What is mounted into the union, in this order."""
    storage_root: str = ""
    """Where volumes are; empty when there is no storage."""
    lives_with: tuple[int, int] | None = None
    """A process (pid, start time in clock ticks since boot) whose end ends the mount."""

    def mount_options(self) -> MountOptions:
        """What the direct session mounts with."""
        from unionfs.fuse.direct.mounting import MountOptions

        return MountOptions(
            source=self.fsname,
            subtype=self.subtype,
            allow_other=self.allow_other,
            read_only=self.read_only,
            flags=self.flags,
            security=self.security,
        )

    def fuse_options(self) -> list[str]:
        """libfuse's options, each escaped as lib/fuse_opt.c wants it."""
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
        return options + list(self.flags)

    def to_json(self) -> dict[str, Any]:
        """The settings as plain values; `from_json` reads them back."""
        values = asdict(self)
        if self.storage:
            from unionfs.storage.specs import to_json

            values["storage"] = [to_json(spec) for spec in self.storage]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> MountSettings:
        """Raises KeyError or TypeError when the values are not those of `to_json`."""
        plain: dict[str, Any] = {
            item.name: values[item.name]
            for item in fields(cls)
            # a mount of an older version, which knew less, may live still
            if item.name in values or item.default is MISSING
        }
        for name, value in plain.items():
            if isinstance(value, list):
                plain[name] = tuple(value)
        if plain.get("storage") or plain.get("upper_tmpfs"):
            from unionfs.storage.specs import TmpfsOptions, from_json

            plain["storage"] = tuple(from_json(item) for item in plain.get("storage", ()))
            if plain.get("upper_tmpfs") is not None:
                plain["upper_tmpfs"] = TmpfsOptions.from_json(plain["upper_tmpfs"])
        return cls(**plain)


def absolute(path: str) -> str:
    """`path` against the caller's directory, symlinks resolved; missing parts stay as they are."""
    if "\0" in path:
        raise UserError(f"{path!r} holds a zero byte, which no path can.")
    try:
        return os.path.realpath(path)
    except FileNotFoundError as error:  # of getcwd, in a directory that was removed
        raise UserError(
            f"{quoted(path)} is a relative path, but the current directory is gone; give an absolute path."
        ) from error


def settle(
    mountpoint: str,
    *,
    lowers: Sequence[str] = (),
    upper: str | None = None,
    work: str | None = None,
    options: Iterable[str] = (),
    session: str = "auto",
    io: str = "auto",
    log_level: str = "info",
    source: str | None = None,
    trusted_xattrs: bool | None = None,
    storage: Sequence[Spec] = (),
    storage_root: str | None = None,
) -> MountSettings:
    """Make one whole of a call's words. Changes and looks at nothing but symlinks and the caller's ids.

    `source` is mount(8)'s first word and becomes `fsname` unless `-o` names one. `trusted_xattrs` says
    whether `trusted.*` may be written (None: find out). `storage_root` is `--root`, which counts only when
    there is `storage`. Raises UserError.
    """
    parsed = parse_options(options)
    chosen_lowers = list(_either("lower", "-l", "lowerdir=", tuple(lowers), tuple(parsed.lowers)))
    chosen_upper = _either("upper", "-u", "upperdir=", upper, parsed.upper)
    chosen_work = _either("work", "-w", "workdir=", work, parsed.work)
    if not chosen_lowers:
        raise UserError("no lower is given; add -l DIR for each one, topmost first, or -o lowerdir=DIR:DIR.")
    if "" in (*chosen_lowers, chosen_upper, chosen_work, mountpoint):
        raise UserError("an empty path is given; name a directory.")
    upper_tmpfs = None
    if chosen_upper is not None and chosen_upper.startswith("tmpfs"):
        from unionfs.storage.parsing import is_tmpfs_upper, parse_tmpfs_upper

        if is_tmpfs_upper(chosen_upper):
            upper_tmpfs = parse_tmpfs_upper(chosen_upper)
            if chosen_work is not None:
                raise UserError(
                    f"work {quoted(chosen_work)} is given, but with upper {quoted(chosen_upper)} the work "
                    "directory is on the tmpfs too; leave --work out."
                )
            chosen_upper = None
    if chosen_upper is not None and chosen_work is None:
        raise UserError(
            f"upper {quoted(chosen_upper)} is given without a work directory; add --work DIR, an empty "
            "directory on the same filesystem."
        )
    if chosen_work is not None and chosen_upper is None:
        raise UserError(
            f"work {quoted(chosen_work)} is given without an upper; add --upper DIR, or leave the work "
            "directory out for a read-only union."
        )
    if parsed.allow_other and parsed.allow_root:
        raise UserError("allow_other and allow_root exclude each other; allow_other lets root in too.")
    session = _chosen("session", session, parsed.session, SESSIONS)
    io = _chosen("io", io, parsed.io, IO_MODES)
    if session == "pyfuse3" and io != "auto":
        raise UserError(
            f"--io {io} needs --session direct: with pyfuse3 all data goes through the page cache and the "
            "daemon. Leave one of the two out."
        )
    if trusted_xattrs is None:
        from unionfs.sys.capabilities import may_use_trusted_xattrs

        trusted_xattrs = may_use_trusted_xattrs()
    is_root = os.geteuid() == 0
    return MountSettings(
        mountpoint=absolute_mountpoint(mountpoint),
        lowers=tuple(absolute(path) for path in chosen_lowers),
        upper=None if chosen_upper is None else absolute(chosen_upper),
        work=None if chosen_work is None else absolute(chosen_work),
        read_only=(chosen_upper is None and upper_tmpfs is None) or parsed.read_only,
        session=session,
        io=io,
        fsname=parsed.fsname or source or "unionfs",
        subtype="unionfs" if parsed.subtype is None else parsed.subtype,
        # Root's mounts are for everybody, as those of the kernel are; permissions are checked by the kernel.
        allow_other=parsed.allow_other or (is_root and not parsed.allow_root),
        allow_root=parsed.allow_root,
        volatile=parsed.volatile,
        userxattr=parsed.userxattr or not trusted_xattrs,
        flags=_flags(parsed, is_root),
        security=tuple(parsed.security),
        log_level="debug" if parsed.debug else log_level,
        mounted_by=os.getuid(),
        upper_tmpfs=upper_tmpfs,
        storage=tuple(storage),
        storage_root=_storage_root(storage_root) if storage else "",
    )


def _storage_root(chosen: str | None) -> str:
    from unionfs.storage.root import storage_root

    return storage_root(chosen)


def absolute_mountpoint(path: str) -> str:
    """As `absolute`, but asks nothing of what is mounted there, whose daemon may be dead or hang."""
    from unionfs.sys.mountinfo import read_mountinfo

    mountpoints = {entry.mountpoint for entry in read_mountinfo()}
    for _ in range(40):  # as many symlinks as the kernel follows
        parent, name = os.path.split(path.rstrip("/"))
        if name in ("", ".", ".."):
            break
        place = os.path.join(absolute(parent or "."), name)
        if place in mountpoints:
            return place
        try:
            path = os.path.join(os.path.dirname(place), os.readlink(place))
        except OSError:
            break
    return absolute(path)


def _chosen(name: str, by_letter: str, by_option: str | None, values: Sequence[str]) -> str:
    if by_option is None:
        return by_letter
    if by_option not in values:
        raise UserError(f"option {name}={quoted(by_option)}: it is one of {', '.join(values)}.")
    if by_letter not in ("auto", by_option):
        raise UserError(f"--{name} {by_letter} and -o {name}={by_option} differ; use one of the two.")
    return by_option


_T = TypeVar("_T")


def _either(thing: str, letter: str, option: str, by_letter: _T, by_option: _T) -> _T:
    if by_letter and by_option and by_letter != by_option:
        raise UserError(f"the {thing} is given both by {letter} and by -o {option}; use one of the two.")
    return by_letter or by_option


def _flags(options: Options, is_root: bool) -> tuple[str, ...]:
    chosen = {flag for flag in options.flags.values() if flag not in ("ro", "rw")}
    # "Nothing special", which libfuse would pass on to fusermount3 for nothing (and some of it in vain).
    chosen -= {"exec", "async", "atime", "diratime"}
    if is_root:
        # libfuse starts from nosuid,nodev; a root tree needs both to be of use (/dev, sudo, ping).
        chosen |= {"suid"} if "nosuid" not in chosen else set()
        chosen |= {"dev"} if "nodev" not in chosen else set()
    else:
        # fusermount3 forces them on a user's mount, and says so on stderr when asked for the contrary.
        chosen = chosen - {"suid", "dev"} | {"nosuid", "nodev"}
    return tuple(sorted(chosen))
