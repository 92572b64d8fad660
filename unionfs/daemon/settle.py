"""Turns command-line arguments into settings: precedence, defaults, absolute paths."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from unionfs.daemon.silent import await_layers, layers_of
from unionfs.errors import UserError, on_failure, quoted
from unionfs.settings.configuration import Configuration
from unionfs.settings.features import Features
from unionfs.settings.mount import IO_MODES, SESSIONS, MountSettings
from unionfs.settings.options import Options, parse_options
from unionfs.storage.configured import configuration
from unionfs.storage.root import storage_root as find_storage_root
from unionfs.sys.capabilities import may_use_trusted_xattrs
from unionfs.sys.fds import exists
from unionfs.sys.mountinfo import read_mountinfo

if TYPE_CHECKING:
    from unionfs.settings.specs import Spec, TmpfsOptions

_MOST_LINKS = 40  # MAXSYMLINKS, include/linux/namei.h
_T = TypeVar("_T")


def settle(
    mountpoint: str,
    *,
    lowers: Sequence[str] = (),
    upper: str | None = None,
    work: str | None = None,
    options: Iterable[str] = (),
    session: str | None = None,
    io: str | None = None,
    log_level: str | None = None,
    source: str | None = None,
    trusted_xattrs: bool | None = None,
    watch_lower: bool = False,
    storage: Sequence[Spec] = (),
    storage_root: str | None = None,
) -> MountSettings:
    """Return the settings for a call, when its layers answer. Changes nothing. Raises UserError.

    `source` is mount(8)'s first argument, the default of `fsname`. `trusted_xattrs`: whether `trusted.*` may
    be written (None: find out). `storage_root` is `--root`, ignored without `storage`. `session`, `io`,
    `log_level`: None for the configuration's.
    """
    parsed = parse_options(options)
    _refuse_both(parsed)
    chosen_lowers = _either("lower", "-l", "lowerdir=", tuple(lowers), tuple(parsed.lowers))
    chosen_upper = _either("upper", "-u", "upperdir=", upper, parsed.upper)
    chosen_work = _either("work", "-w", "workdir=", work, parsed.work)
    _check_paths(chosen_lowers, chosen_upper, chosen_work, mountpoint)
    chosen_upper, upper_tmpfs = _writable_layer(chosen_upper, chosen_work)
    await_layers(layers_of(chosen_lowers, chosen_upper, chosen_work))
    storage = _with_options(storage, parsed.storage)
    session, io = _session_and_io(parsed, session, io, configured := configuration())
    upper_path = None if chosen_upper is None else absolute(chosen_upper)
    trusted_xattrs = may_use_trusted_xattrs() if trusted_xattrs is None else trusted_xattrs
    is_root, userxattr = os.geteuid() == 0, parsed.userxattr or not trusted_xattrs
    return MountSettings(
        mountpoint=absolute_mountpoint(mountpoint),
        lowers=_with_snapshots(upper_path, tuple(map(absolute, chosen_lowers))),
        upper=upper_path,
        work=None if chosen_work is None else absolute(chosen_work),
        read_only=(chosen_upper is None and upper_tmpfs is None) or parsed.read_only,
        session=session, io=io,
        fsname=parsed.fsname or source or "unionfs",
        subtype="unionfs" if parsed.subtype is None else parsed.subtype,
        # As with kernel filesystems, all users may access root's mounts; the kernel checks permissions.
        allow_other=parsed.allow_other or (is_root and not parsed.allow_root),
        allow_root=parsed.allow_root,
        volatile=parsed.volatile,
        userxattr=userxattr,
        features=_features(parsed, userxattr, is_root),
        shown=parsed.shown,
        flags=_flags(parsed, is_root),
        security=tuple(parsed.security),
        log_level="debug" if parsed.debug else log_level or configured.get("log-level"),
        mounted_by=os.getuid(),
        upper_tmpfs=upper_tmpfs,
        storage=tuple(storage), storage_root=find_storage_root(storage_root) if storage else "",
        watch_lower=watch_lower or parsed.watch_lower,
        cpu_idle=parsed.cpu_idle, outlive=parsed.outlive, max_nodes=parsed.max_nodes,
    )


def _with_snapshots(upper: str | None, lowers: tuple[str, ...]) -> tuple[str, ...]:
    """The lowers, and above them the snapshots that the upper lies on. Raises UserError."""
    if upper is None:
        return lowers
    with on_failure(f"upper {quoted(upper)}: its snapshots cannot be looked for", "check its disk"):
        if not exists(upper + ".snapshots"):
            return lowers
    # For start-up time: most uppers have no snapshots.
    from unionfs.storage.snapshots import with_snapshots

    return with_snapshots(upper, lowers)


def _with_options(storage: Sequence[Spec], options: Sequence[tuple[str, str]]) -> Sequence[Spec]:
    """The storage, and that of the options `volume` and `tmpfs`, in mount order. Raises UserError."""
    if not options:
        return storage
    # For start-up time: most mounts have no storage.
    from unionfs.settings.parsing import in_order, parse_storage_option

    return in_order([*storage, *(parse_storage_option(*given) for given in options)])


def _refuse_both(parsed: Options) -> None:
    if parsed.allow_other and parsed.allow_root:
        raise UserError("allow_other and allow_root exclude each other; allow_other lets root in too.")


def _check_paths(lowers: Sequence[str], *others: str | None) -> None:
    if not lowers:
        raise UserError("no lower is given; add -l DIR for each one, topmost first, or -o lowerdir=DIR:DIR.")
    if "" in (*lowers, *others):
        raise UserError("an empty path is given; name a directory.")


def _features(parsed: Options, userxattr: bool, is_root: bool) -> Features:
    """The features that these settings allow. Raises UserError.

    A redirect bypasses the permission checks on the way to a directory, and anybody who may write to a
    directory can set its ``user.*`` xattrs. So overlayfs refuses redirects with ``userxattr`` (params.c). In
    a mount that only one ordinary user can reach, they show that user only what that user may read anyway.
    """
    chosen, redirects = parsed.features, parsed.features.redirect_dir
    if parsed.shown.permissions:
        for name in ("metacopy", "index"):
            if getattr(chosen, name) == "on":
                raise UserError(
                    f"{name}=on conflicts with xattr_permissions, whose stores have no {name}; leave one of "
                    "the two out."
                )
        chosen = replace(chosen, metacopy="off", index="off")
        if redirects is None and not (userxattr and (is_root or parsed.allow_other or parsed.allow_root)):
            redirects = "follow"  # fuse-overlayfs does not find what is renamed by one
            chosen = replace(chosen, redirect_dir=redirects)
    if chosen.metacopy == "on" and redirects not in (None, "on"):
        raise UserError(
            f"metacopy=on needs redirects for renamed files, and conflicts with redirect_dir={redirects}; "
            "leave one of the two out."
        )
    if chosen.metacopy == "on" and userxattr:
        raise UserError(
            "metacopy=on conflicts with markers in user.* xattrs, which any user can set to read the data of "
            "others; leave metacopy=on out, or mount as root without userxattr."
        )
    if not userxattr:
        return chosen
    if not (is_root or parsed.allow_other or parsed.allow_root):
        return replace(chosen, redirect_dir={None: "on", "off": "follow"}.get(redirects, redirects))
    if redirects in ("on", "follow"):
        raise UserError(
            f"redirect_dir={redirects} conflicts with markers in user.* xattrs, which any user can set, in a "
            "mount of root's or with allow_other or allow_root; leave one of the two out."
        )
    return chosen


def _either(thing: str, letter: str, option: str, by_letter: _T, by_option: _T) -> _T:
    given = [value for value in (by_letter, by_option) if value is not None and value != ()]
    if len(given) == 2 and given[0] != given[1]:
        raise UserError(f"the {thing} is given both by {letter} and by -o {option}; use one of the two.")
    return given[0] if given else by_letter  # also an empty path, which is refused


def _writable_layer(upper: str | None, work: str | None) -> tuple[str | None, TmpfsOptions | None]:
    """Return the upper directory, or the options of a tmpfs in its place. Checks `work` against it."""
    if upper is not None and upper.startswith("tmpfs"):
        # For start-up time: most uppers are directories.
        from unionfs.settings.tmpfs import is_tmpfs_upper, parse_tmpfs_upper

        if is_tmpfs_upper(upper):
            if work is not None:
                raise UserError(
                    f"work {quoted(work)} is given, but with upper {quoted(upper)} the work directory is on "
                    "the tmpfs too; leave --work out."
                )
            return None, parse_tmpfs_upper(upper)
    if upper is not None and work is None:
        raise UserError(
            f"upper {quoted(upper)} is given without a work directory; add --work DIR, an empty directory on "
            "the same filesystem."
        )
    if work is not None and upper is None:
        raise UserError(
            f"work {quoted(work)} is given without an upper; add --upper DIR, or leave the work directory "
            "out for a read-only union."
        )
    return upper, None


def _session_and_io(
    parsed: Options, session: str | None, io: str | None, configured: Configuration
) -> tuple[str, str]:
    given = io or parsed.io
    chosen_session = _chosen("session", session, parsed.session, SESSIONS) or configured.get("session")
    chosen_io = _chosen("io", io, parsed.io, IO_MODES) or configured.get("io")
    if chosen_session == "pyfuse3" and chosen_io != "auto":
        if given is None:
            return chosen_session, "auto"
        raise UserError(
            f"--io {chosen_io} needs --session direct: with pyfuse3 all data goes through the page cache and "
            "the daemon. Leave one of the two out."
        )
    return chosen_session, chosen_io


def _chosen(name: str, by_letter: str | None, by_option: str | None, values: Sequence[str]) -> str | None:
    if by_option is None:
        return by_letter
    if by_option not in values:
        raise UserError(f"option {name}={quoted(by_option)}: write one of {', '.join(values)}.")
    if by_letter not in (None, "auto", by_option):
        raise UserError(f"--{name} {by_letter} and -o {name}={by_option} differ; use one of the two.")
    return by_option


def _flags(options: Options, is_root: bool) -> tuple[str, ...]:
    chosen = {flag for flag in options.flags.values() if flag not in ("ro", "rw")}
    # Defaults; libfuse would pass them on to fusermount3, which refuses some of them.
    chosen -= {"exec", "async", "atime", "relatime", "diratime"}
    if is_root:
        # libfuse defaults to nosuid,nodev; a root tree needs suid and dev (/dev, sudo, ping).
        chosen |= {"suid"} if "nosuid" not in chosen else set()
        chosen |= {"dev"} if "nodev" not in chosen else set()
    else:
        # fusermount3 forces these for ordinary users, and warns on stderr about the opposite.
        chosen = chosen - {"suid", "dev"} | {"nosuid", "nodev"}
    return tuple(sorted(chosen))


def absolute(path: str) -> str:
    """Return `path` as an absolute path with symlinks resolved; missing parts stay as they are."""
    if "\0" in path:
        raise UserError(f"{path!r} contains a zero byte, which a path cannot.")
    try:
        return os.path.realpath(path)
    except FileNotFoundError as error:  # of getcwd, in a directory that was removed
        raise UserError(
            f"{quoted(path)} is a relative path, but the current directory is gone; give an absolute path."
        ) from error


def absolute_mountpoint(path: str) -> str:
    """Like `absolute`, but sends no request to a mount at `path`, whose daemon may be dead or hang."""
    mountpoints = {entry.mountpoint for entry in read_mountinfo()}
    for _ in range(_MOST_LINKS):
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
