"""Parses the mount options of `-o`.

The syntax is the kernel's (Documentation/filesystems/overlayfs.rst, mount(8)); options of fuse-overlayfs are
known too, so that its callers can use this program instead. An option is either applied, or ignored if the
mount is correct without it, or refused with the reason: a mount that silently showed other owners or let
other users in would be worse than none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from unionfs.errors import UserError, quoted
from unionfs.settings.features import DEFAULTS, VALUES, Features
from unionfs.settings.shown import AS_STORED, Shown, parse_id, parse_ranges

_SECURITY = ("context", "fscontext", "defcontext", "rootcontext")


def _split(text: str, separator: str) -> list[str]:
    """Split at unescaped separators; keep all escapes.

    A separator within the double quotes of an SELinux context does not split, as in the kernel.
    """
    parts, start, position, in_quotes = [], 0, 0, False
    while position < len(text):
        char = text[position]
        if char == "\\":
            position += 1
        elif char == '"' and text[start:position].partition("=")[0] in _SECURITY:
            in_quotes = not in_quotes
        elif char == separator and not in_quotes:
            parts.append(text[start:position])
            start = position + 1
        position += 1
    parts.append(text[start:])
    return parts


def unescape_option(text: str) -> str:
    """Remove one level of backslashes: `\\x` becomes `x`, as in fs/overlayfs/params.c."""
    out, position = [], 0
    while position < len(text):
        if text[position] == "\\" and position + 1 < len(text):
            position += 1
        out.append(text[position])
        position += 1
    return "".join(out)


def split_options(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield the (name, value) pairs of one `-o` argument, values still escaped; empty options are skipped."""
    for option in _split(text, ","):
        name, equals, value = option.partition("=")
        if option:
            yield name, value if equals else None


def split_lowers(value: str) -> list[str]:
    """Split `A:B:C` into paths, topmost first; `\\:` is a colon. Raises UserError for an empty path."""
    parts = _split(value, ":")
    if "" in parts:
        raise UserError(
            f"lowerdir={quoted(value)}: an empty path between colons (kernel overlayfs's `::` for data-only "
            "lowers) is not supported, so give every lower a path."
        )
    return [unescape_option(part) for part in parts]


ATIME = ("atime", "relatime", "noatime", "strictatime")
#: All flags about access times.
ATIME_WORDS = (*ATIME, "nodiratime")
"""When reading a file of the upper changes its access time."""

# Mount flags that are passed on; the last flag of a group wins.
_FLAG_GROUPS: tuple[tuple[str, ...], ...] = (
    ("dev", "nodev"),
    ("suid", "nosuid"),
    ("exec", "noexec"),
    ("ro", "rw"),
    ("sync", "async"),
    ("dirsync",),
    ATIME,
    ("diratime", "nodiratime"),
)
_GROUP_OF = {flag: group for group in _FLAG_GROUPS for flag in group}
_UNCHANGING = ("dev", "suid", "exec", "rw", "async", "atime", "relatime", "diratime")
_SWITCHES = (
    "allow_other", "allow_root", "volatile", "userxattr", "watch_lower", "cpu_idle", "outlive", "debug",
)  # fmt: skip
"""Options without a value, each the attribute of `Options` that it sets."""

# Options without meaning for a union: relatime is the kernel's default, lazytime is up to the kernel, and the
# rest are for fstab and mount(8).
_SKIPPED_WORDS = frozenset({
    "defaults", "auto", "noauto", "user", "nouser", "users", "nousers", "owner", "noowner", "group",
    "nogroup", "nofail", "_netdev", "symfollow",
    "norelatime", "nostrictatime", "lazytime", "nolazytime",
    "iversion", "noiversion", "loud", "silent", "default_permissions", "nonempty", "intr",
    "nointr", "use_ino", "readdir_ino", "big_writes", "large_read", "splice_read", "splice_write",
    "splice_move", "no_splice_read", "no_splice_write", "no_splice_move",
})  # fmt: skip
_SKIPPED_PREFIXES = ("x-", "X-", "comment=", "user=", "helper=", "uhelper=")

# Options of fuse-overlayfs that concern how it works, not the mount's content. podman passes the propagation
# `private` with `-v src:/x:O`, but the mount is made in podman's own namespace.
_SKIPPED_FUSE_OVERLAYFS = frozenset({
    "redirect_dir", "timeout", "threaded", "fsync", "fast_ino", "writeback",
    "private", "rprivate", "slave", "rslave", "shared", "rshared", "clone_fd", "max_idle_threads",
    "max_threads", "kernel_cache", "auto_cache", "entry_timeout", "attr_timeout", "negative_timeout",
    "max_read", "max_write", "max_readahead", "max_background", "congestion_threshold", "noxattrs",
})  # fmt: skip

# Refused options with the reason: ignoring them would change the mount.
_REFUSED: Mapping[str, str] = {
    "uid": "a fixed owner is not supported, and without it files would show other owners",
    "gid": "a fixed owner is not supported, and without it files would show other owners",
    "umask": "a fixed umask is not supported, and without it files would show other modes",
    "remount": "this command makes mounts, so use `mount -o remount,...`",
    "bind": "binding a directory is not a union, so use `mount --bind`",
    "rbind": "binding a directory is not a union, so use `mount --rbind`",
    "move": "moving a mount is not a union, so use `mount --move`",
    "auto_unmount": "it is not supported; `unionfs umount` clears a dead mount, so leave the option out",
    "blkdev": "a union is not made of a block device, so leave the option out",
    "mand": "mandatory locks are gone from the kernel and FUSE never had them, so leave the option out",
    "nosymfollow": "libfuse 3 cannot make such a mount, so leave the option out",
    "verity": "checking of fs-verity digests is not supported, so leave the option out",
    "datadir+": "data-only lowers are not supported, so leave the option out",
    "override_creds": "the caller's rights are always checked by the kernel, so leave the option out",
}

_STORAGE: Mapping[str, str] = {"volume": "[SRC:]TARGET", "tmpfs": "TARGET"}

_RANGES = "STORED:SHOWN:COUNT"
_SHOWN_KEYS = ("uidmapping", "gidmapping", "squash_to_uid", "squash_to_gid", "xattr_permissions")
_SHOWN_WORDS = ("squash_to_root", "static_nlink", "noacl")

WORDS = (*(flag for flag in _GROUP_OF if flag not in _UNCHANGING), *_SWITCHES, *_SHOWN_WORDS)
"""The options without a value that change something."""
KEYS = (
    "lowerdir", "upperdir", "workdir", "fsname", "subtype", "session", "io", "max_nodes",
    *_STORAGE, *_SECURITY, *_SHOWN_KEYS, *VALUES,
)  # fmt: skip
"""The options with a value."""

# Features of kernel overlayfs: values that match this program, and the name of the unsupported feature.
_FEATURES: Mapping[str, tuple[frozenset[str], str]] = {
    "redirect_dir": (frozenset({"on", "off", "follow", "nofollow"}), ""),
    "index": (frozenset({"on", "off"}), ""),
    "metacopy": (frozenset({"on", "off"}), ""),
    "nfs_export": (frozenset({"off"}), "export by file handles"),
    "verity": (frozenset({"off"}), "checking of fs-verity digests"),
    "xino": (frozenset({"on", "off", "auto"}), "another way of making inode numbers"),
    "uuid": (frozenset({"on", "off", "auto", "null"}), "another way of making filesystem ids"),
    "override_creds": (frozenset(), ""),
}


@dataclass(slots=True)
class Options:
    """All `-o` arguments of a call, parsed but not checked against the host."""

    lowers: list[str] = field(default_factory=list)
    upper: str | None = None
    work: str | None = None
    flags: dict[tuple[str, ...], str] = field(default_factory=dict)
    """The last flag of each group that occurred."""
    allow_other: bool = False
    allow_root: bool = False
    fsname: str | None = None
    subtype: str | None = None
    volatile: bool = False
    userxattr: bool = False
    features: Features = DEFAULTS
    shown: Shown = AS_STORED
    squash_to_root: bool = False
    watch_lower: bool = False
    cpu_idle: bool = False
    outlive: bool = False
    max_nodes: int = 0
    debug: bool = False
    session: str | None = None
    io: str | None = None
    storage: list[tuple[str, str]] = field(default_factory=list)
    """Each `volume=` and `tmpfs=`, with its value."""
    security: list[str] = field(default_factory=list)
    """SELinux contexts, as `name=value` of mount(2)."""

    @property
    def read_only(self) -> bool:
        """Whether `ro` was the last of `ro` and `rw`."""
        return "ro" in self.flags.values()


def parse_options(arguments: Iterable[str]) -> Options:
    """Parse all `-o` arguments of a call, in order. Raises UserError that names an invalid option."""
    options = Options()
    lowerdir: str | None = None
    for argument in arguments:
        for name, value in split_options(argument):
            if name == "lowerdir":
                _once("lowerdir", lowerdir, value)
                lowerdir = _needed(name, value)
            elif name == "lowerdir+":
                options.lowers.append(unescape_option(_needed(name, value)))
            else:
                _take(options, name, value)
    if lowerdir is not None:
        if options.lowers:
            raise UserError("lowerdir= and lowerdir+= mean the same, so use one of the two.")
        options.lowers = split_lowers(lowerdir)
    if options.squash_to_root:  # the others take precedence, as in fuse-overlayfs
        shown = options.shown
        options.shown = replace(shown, uid=shown.uid or 0, gid=shown.gid or 0)
    return options


def _given(name: str, value: str | None, what: str) -> str:
    if value is None:
        raise UserError(f"option {name} has no value, so write {name}={what} or leave it out.")
    return value


def _needed(name: str, value: str | None, what: str = "DIR") -> str:
    return _given(name, value or None, what)


def _count(name: str, value: str | None) -> int:
    text = _needed(name, value, "NUMBER")
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text)):
        raise UserError(f"option {name}={quoted(text)}: not a number of files; write one such as 1000000.")
    return int(text)


def _once(name: str, old: str | None, new: str | None) -> None:
    if old is not None and old != new:
        raise UserError(f"option {name} is given twice, as {quoted(old)} and {quoted(new or '')}; keep one.")


def _take(options: Options, name: str, value: str | None) -> None:
    if name == "upperdir":
        new = unescape_option(_needed(name, value))
        _once(name, options.upper, new)
        options.upper = new
    elif name == "workdir":
        new = unescape_option(_needed(name, value))
        _once(name, options.work, new)
        options.work = new
    elif name == "fsname":
        options.fsname = unescape_option(_given(name, value, "NAME"))
    elif name == "subtype":
        options.subtype = unescape_option(_given(name, value, "NAME"))
    elif name in ("session", "io"):
        new = _needed(name, value, "auto")
        _once(name, getattr(options, name), new)
        setattr(options, name, new)
    elif name == "max_nodes":
        options.max_nodes = _count(name, value)
    elif name in _STORAGE:
        options.storage.append((name, unescape_option(_needed(name, value, _STORAGE[name]))))
    elif name in _SECURITY:
        options.security.append(f"{name}={unescape_option(_needed(name, value, 'LABEL'))}")
    elif name in _FEATURES and value is not None:
        _feature(options, name, value)
    elif name in _SHOWN_KEYS or name in _SHOWN_WORDS:
        _show(options, name, value)
    elif name == "plugins":
        if value:
            raise UserError(f"option plugins={quoted(value)}: plugins are not supported, so leave it out.")
    elif name in _REFUSED:
        raise UserError(f"option {name}: {_REFUSED[name]}.")
    elif value is None and _word(options, name):
        return
    elif name not in _SKIPPED_FUSE_OVERLAYFS and not f"{name}={value}".startswith(_SKIPPED_PREFIXES):
        option = name if value is None else f"{name}={value}"
        raise UserError(f"unknown option {quoted(option)}; `unionfs mount --help` lists the known ones.")


def _show(options: Options, name: str, value: str | None) -> None:
    """Apply an option of fuse-overlayfs about what is shown."""
    shown = options.shown
    match name:
        case "uidmapping":
            ranges = parse_ranges(name, _needed(name, value, _RANGES))
            options.shown = replace(shown, uids=ranges)
        case "gidmapping":
            ranges = parse_ranges(name, _needed(name, value, _RANGES))
            options.shown = replace(shown, gids=ranges)
        case "squash_to_uid":
            options.shown = replace(shown, uid=parse_id(name, _needed(name, value, "UID")))
        case "squash_to_gid":
            options.shown = replace(shown, gid=parse_id(name, _needed(name, value, "GID")))
        case "squash_to_root":
            options.squash_to_root = value != "0"
        case "static_nlink":
            options.shown = replace(shown, static_nlink=True)
        case "noacl":
            options.shown = replace(shown, acl=False)
        case "xattr_permissions":
            level = _needed(name, value, "2")
            if level not in ("0", "1", "2"):
                raise UserError(
                    f"option xattr_permissions={quoted(level)}: not a known kind of xattr; write 1 for "
                    "security.* or 2 for user.*."
                )
            options.shown = replace(shown, permissions=int(level))


def _feature(options: Options, name: str, value: str) -> None:
    accepted, lacking = _FEATURES[name]
    if value in accepted:
        if name in VALUES:
            chosen: dict[str, str] = {name: value}
            options.features = replace(options.features, **chosen)
        return
    if not accepted:
        raise UserError(f"option {name}: {_REFUSED[name]}.")
    if value == "on":
        raise UserError(
            f"option {name}=on: {lacking} is not supported, so leave the option out or write {name}=off."
        )
    raise UserError(f"option {name}={value}: the value is not one of {', '.join(sorted(accepted))}.")


def _word(options: Options, name: str) -> bool:
    """Apply an option without a value. Returns False if it is unknown."""
    if name in _SWITCHES:
        setattr(options, name, True)
    elif name in _GROUP_OF:
        options.flags[_GROUP_OF[name]] = name
    else:
        return name in _SKIPPED_WORDS
    return True
