"""INIT: from the kernel's offer, the settings and the privileges to a decision. A pure function.

Rules for combinations (fs/fuse/inode.c, process_init_reply, Linux 6.18; rules marked * were found by breaking
them):
- NO_OPEN (ENOSYS to OPEN) never with ATOMIC_O_TRUNC*: O_TRUNC would be lost. Never with PASSTHROUGH, which
  is part of the answer to OPEN.
- WRITEBACK_CACHE never with PASSTHROUGH (the kernel then drops passthrough, and registering a backing file is
  EPERM*), and never with bound storage or watched lowers: the kernel would ignore the sizes the daemon
  reports. With these NO_OPEN neither: an open file stays the same when another one gets its name.
- LSEEK (ENOSYS) never with WRITEBACK_CACHE*: data that is only in the page cache would look like a hole, and
  copying programs would skip it. After ENOSYS the kernel reports everything as data.
- PASSTHROUGH needs INIT_EXT, a max_stack_depth of 1 or 2, and CAP_SYS_ADMIN in the initial user namespace
  (fs/fuse/backing.c). Depth 2 only if a file to pass through is on a stacked filesystem itself: a mount of
  depth 2 cannot be a lower.
- A lower file that is passed through is read from the lower while it is open, even after its copy-up. So
  with an upper hybrid does it only to programs and libraries, which are not changed in place while they are
  used, and not with watched lowers, where others may do just that.
- HANDLE_KILLPRIV_V2 with PASSTHROUGH: before a write that must clear suid and sgid the kernel sends a SETATTR
  without changes*, and leaves the clearing to the daemon. Without V2 it requests the file's capabilities
  before every write, and sends a SETATTR for the mode. V1 is never agreed.
- Modes kept in xattrs: no V2, and no passthrough to the upper, whose files have no setuid and setgid to
  clear.
- ALLOW_IDMAP only on request, never with a policy on the caller's uid (it is blank except on creation), and
  only under default_permissions: without, the kernel ends the connection.
- POSIX_ACL and DONT_MASK both or neither, when every layer has ACLs.
- EXPLICIT_INVAL_DATA, except with bound storage, which others change too: then AUTO_INVAL_DATA (the kernel
  prefers AUTO if it gets both). Its opens must be sent: read-only storage refuses some.
- READDIRPLUS_AUTO only with DO_READDIRPLUS. NO_OPENDIR and cached directories need stable directory cookies
  for a node, which the node table guarantees.
- Flags from bit 32 on need INIT_EXT.
- Locks stay with the kernel, so FLUSH, which would drop POSIX locks, does nothing.

`_obstacle` returns why an I/O mode is not available, `_choose` selects the mode, `_RULES` is the flag table,
one row a flag. An explicit choice that is not available raises NegotiationRefused; `auto` never does.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from unionfs.fuse.protocol.encode import InitReply
from unionfs.fuse.protocol.errors import NegotiationRefused
from unionfs.fuse.protocol.flags import (
    FOPEN_KEEP_CACHE,
    FOPEN_NOFLUSH,
    FOPEN_PASSTHROUGH,
    KERNEL_MINOR_VERSION,
    KERNEL_VERSION,
    LINUX,
    Init,
    Opcode,
    since,
)
from unionfs.fuse.protocol.requests import InitRequest

MIN_MINOR: Final = 23
"""Oldest supported protocol, Linux 3.15: since then every structure sent has its present length."""

_NOFLUSH_MINOR: Final = 35
_MAX_BACKGROUND: Final = 64
_DEFAULT_MAX_PAGES: Final = 32  # FUSE_DEFAULT_MAX_PAGES_PER_REQ, without MAX_PAGES
_MAX_STACK_DEPTH: Final = 2  # FILESYSTEM_MAX_STACK_DEPTH, include/linux/fs.h

SMALL_FILE: Final = 64 << 10
"""Lower files up to this many bytes are put into the page cache of the mount at their first open, which is
cheaper than registering them for passthrough."""


class IoMode(StrEnum):
    """Ways of I/O, as on the command line."""

    AUTO = "auto"
    HYBRID = "hybrid"
    PASSTHROUGH = "passthrough"
    CACHED = "cached"


MODES: Final = (IoMode.HYBRID, IoMode.PASSTHROUGH, IoMode.CACHED)


@dataclass(frozen=True, slots=True)
class Settings:
    """The requested mode, and facts about the layers. Sizes in bytes."""

    io: IoMode = IoMode.AUTO
    read_only: bool = False
    """No upper: the union is read-only."""
    bound: bool = False
    """Bound storage is served, which others change too, and which may be read-only while the union is not."""
    live: bool = False
    """The lowers are watched: others change them."""
    leased: bool = False
    """Another host may take the upper over: then the daemon must stop all writes to it."""
    acl: bool = False
    """Every layer has POSIX ACLs."""
    permissions: bool = False
    """Modes are kept in xattrs, so that the daemon must clear setuid, setgid and file capabilities."""
    upper_stack_depth: int = 0
    """0: the upper is on an ordinary filesystem. 1: on overlayfs, or a mount with passthrough. 2: deeper."""
    lower_stack_depth: int = 0
    """The maximum of the lowers."""
    max_write: int = 1 << 20
    max_readahead: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Privileges:
    """The privileges of the daemon."""

    initial_user_namespace: bool
    sys_admin: bool
    """CAP_SYS_ADMIN is effective (in the daemon's user namespace)."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer to INIT, and its consequences for the session. Texts are full sentences for the user."""

    reply: InitReply
    io: IoMode
    """Never AUTO."""
    why: str
    why_not: Mapping[IoMode, str]
    """For each of the other two modes, the reason against it."""
    missing: Mapping[Init, str]
    """Wanted flags that the kernel does not offer, with a sentence for each."""
    enosys: frozenset[Opcode]
    """Requests to answer with ENOSYS; the kernel sends each only once."""
    passthrough_upper: bool
    """Upper files are opened with a backing file."""
    passthrough_lower: bool
    """Lower files larger than `small_lower` are opened with one too."""
    lower_programs_only: bool
    """Of these, only programs and libraries (ELF files)."""
    small_lower: int
    """Lower files up to this many bytes use the page cache of the mount anyway; -1 for none."""
    file_open_flags: int
    """FOPEN_* for a file opened through the page cache."""
    passthrough_open_flags: int
    """FOPEN_* for a file opened with a backing file; 0 if there are none."""
    max_readahead: int
    """The readahead in bytes. INIT can only lower the kernel's 128 KiB: root raises it afterwards in
    /sys/class/bdi/MAJOR:MINOR/read_ahead_kb."""

    @property
    def flags(self) -> Init:
        """The agreed flags."""
        return Init(self.reply.flags)


class _Facts(NamedTuple):
    offered: InitRequest
    settings: Settings
    privileges: Privileges
    mode: IoMode


class _Rule(NamedTuple):
    """One row: `flag` is agreed if wanted, offered with its `needs`, and no `never_with` is agreed.

    The masks are plain integers: `IntFlag` arithmetic is slow, and tests try every combination.
    """

    flag: int
    wanted: Callable[[_Facts], bool]
    needs: int
    never_with: int


def _rule(
    flag: Init,
    wanted: Callable[[_Facts], bool] = lambda facts: True,
    needs: Init | None = None,
    never_with: Init | None = None,
) -> _Rule:
    # Bits from 32 on are in flags2, which the kernel reads only with INIT_EXT.
    extended = Init.INIT_EXT if flag >> 32 else 0
    return _Rule(int(flag), wanted, int(needs or 0) | extended, int(never_with or 0))


def _others_change(settings: Settings) -> bool:
    """Whether others change files that the union serves."""
    return settings.bound or settings.live


def _passes_lowers(mode: IoMode, settings: Settings) -> bool:
    if mode is not IoMode.HYBRID:
        return mode is IoMode.PASSTHROUGH
    # Not if the mount then cannot be a lower.
    if settings.read_only:
        return settings.lower_stack_depth == 0
    deep = settings.lower_stack_depth > settings.upper_stack_depth
    return not settings.live and not deep and settings.upper_stack_depth < _MAX_STACK_DEPTH


def _passes_uppers(mode: IoMode, settings: Settings) -> bool:
    return mode is not IoMode.CACHED and not settings.read_only and not settings.leased


_RULES: Final[tuple[_Rule, ...]] = (
    _rule(Init.INIT_EXT),
    _rule(
        Init.PASSTHROUGH,
        lambda facts: (
            _passes_uppers(facts.mode, facts.settings) or _passes_lowers(facts.mode, facts.settings)
        ),
    ),
    _rule(
        Init.NO_OPEN_SUPPORT,
        lambda facts: facts.mode is IoMode.CACHED and not _others_change(facts.settings),
        never_with=Init.PASSTHROUGH,
    ),
    _rule(Init.ATOMIC_O_TRUNC, never_with=Init.NO_OPEN_SUPPORT),
    _rule(
        Init.WRITEBACK_CACHE,
        lambda facts: (
            facts.mode is IoMode.CACHED
            and not facts.settings.read_only
            and not _others_change(facts.settings)
        ),
        never_with=Init.PASSTHROUGH,
    ),
    _rule(Init.NO_OPENDIR_SUPPORT),
    _rule(Init.HANDLE_KILLPRIV_V2, lambda facts: not facts.settings.permissions),
    _rule(Init.POSIX_ACL, lambda facts: facts.settings.acl, needs=Init.DONT_MASK),
    _rule(Init.DONT_MASK, lambda facts: facts.settings.acl, needs=Init.POSIX_ACL),
    _rule(Init.AUTO_INVAL_DATA, lambda facts: facts.settings.bound),
    _rule(Init.EXPLICIT_INVAL_DATA, lambda facts: not facts.settings.bound),
    _rule(Init.DO_READDIRPLUS),
    _rule(Init.READDIRPLUS_AUTO, needs=Init.DO_READDIRPLUS),
    _rule(Init.PARALLEL_DIROPS),
    _rule(Init.CACHE_SYMLINKS),
    _rule(Init.MAX_PAGES),
    _rule(Init.SETXATTR_EXT),
    _rule(Init.ASYNC_READ),
    _rule(Init.ASYNC_DIO),
    _rule(Init.BIG_WRITES),
    _rule(Init.ABORT_ERROR),
    _rule(Init.HAS_RESEND),
)


_LEASED: Final = (
    "upper files go through the daemon, which can stop all writes when another host has taken the upper"
)


def _good(mode: IoMode, settings: Settings) -> str:
    """The advantage of the mode, as a clause."""
    if mode is IoMode.PASSTHROUGH and settings.leased:
        return f"files of the lowers are read kernel to kernel, {_LEASED}"
    if mode is IoMode.PASSTHROUGH:
        return f"all files are read {'' if settings.read_only else 'and written '}kernel to kernel"
    if mode is IoMode.CACHED:
        opening = "no message"
        if settings.bound:
            opening = "a message, because storage is served here that the host changes too"
        elif settings.live:
            opening = "a message, because lowers are watched that others change"
        return f"all files come from the page cache, and opening one costs {opening}"
    if not settings.read_only:
        uppers = _LEASED if settings.leased else "upper files are read and written kernel to kernel"
        if _passes_lowers(mode, settings):
            return (
                f"{uppers}, and programs and libraries of the lowers (ELF files of more than "
                f"{SMALL_FILE >> 10} KiB) are read so; other lower files come from the page cache"
            )
        why = "lowers are watched, which others change"
        if not settings.live:
            why = "a lower lies on a stacked filesystem"
        return f"{uppers}, lower files come from the page cache, programs too, because {why}"
    if _passes_lowers(mode, settings):
        return (
            f"files of more than {SMALL_FILE >> 10} KiB are read kernel to kernel, "
            "smaller ones come from the page cache"
        )
    return "all files come from the page cache, because a lower lies on a stacked filesystem"


def _drawback(chosen: IoMode, other: IoMode, settings: Settings) -> str:
    """The drawback of another available mode, as a clause."""
    if chosen is IoMode.CACHED:
        against = "every open would cost a message"
        if other is IoMode.PASSTHROUGH and not settings.read_only:
            against += ", and a lower file held open while copied up would keep its old data"
        return against
    if other is IoMode.CACHED:
        if settings.leased:
            return "writes would be reported when the server has not got them yet"
        if chosen is IoMode.PASSTHROUGH:
            return "files would be copied through the daemon"
        if not settings.read_only:
            return "upper files can go kernel to kernel here, which is faster"
        if _passes_lowers(chosen, settings):
            return "large files can go kernel to kernel here, which is faster"
        return "hybrid is told of every open, so that a file is closed when nobody uses it any more"
    if chosen is IoMode.PASSTHROUGH:
        which = "small" if _passes_lowers(other, settings) else "lower"
        return f"{which} files would be copied through the daemon once"
    if not settings.read_only:
        return "a lower file held open while it is copied up would keep its old data, " + (
            "with hybrid only programs do" if _passes_lowers(chosen, settings) else "which hybrid avoids"
        )
    if _passes_lowers(chosen, settings):
        return "registering a small file costs more than to read it, and hybrid passes the large ones through"
    return "the union could not be a lower of another one"


def _obstacle(mode: IoMode, offered: InitRequest, settings: Settings, privileges: Privileges) -> str | None:
    """Why `mode` is not available, as a clause to follow "because"; None if it is."""
    if mode is IoMode.CACHED:
        return None
    both = Init.PASSTHROUGH | Init.INIT_EXT
    if offered.flags & both != both:
        return (
            f"this kernel does not offer passthrough, which needs {since(Init.PASSTHROUGH)} built with "
            "CONFIG_FUSE_PASSTHROUGH"
        )
    if settings.permissions and not settings.read_only:
        return "with xattr_permissions a write may have to clear setuid in an xattr, which the kernel cannot"
    if not privileges.initial_user_namespace:
        return "the kernel lets no process in a user namespace register the files to pass through"
    if not privileges.sys_admin:
        return "registering the files to pass through needs root (CAP_SYS_ADMIN)"
    if _stack_depth(mode, settings) is None:
        return "the layers lie on two stacked filesystems already, and the kernel stacks no third"
    return None


def _stack_depth(mode: IoMode, settings: Settings) -> int | None:
    """max_stack_depth for every layer whose files are to pass through; 0 if none, None if impossible.

    The files of a layer that is too deep fall back one by one: registering them is ELOOP (fs/fuse/backing.c).
    """
    depths = [settings.upper_stack_depth] if _passes_uppers(mode, settings) else []
    if _passes_lowers(mode, settings):
        depths.append(settings.lower_stack_depth)
    if not depths:
        return 0
    return max((depth + 1 for depth in depths if depth < _MAX_STACK_DEPTH), default=None)


def _choose(
    offered: InitRequest, settings: Settings, privileges: Privileges
) -> tuple[IoMode, str, dict[IoMode, str]]:
    """The mode, the reason, and the reasons against the others. Raises NegotiationRefused."""
    obstacles = {mode: _obstacle(mode, offered, settings, privileges) for mode in MODES}
    if settings.io is IoMode.AUTO:
        mode = IoMode.HYBRID if obstacles[IoMode.HYBRID] is None else IoMode.CACHED
        how = "chosen"
    else:
        mode, how = settings.io, "asked for"
        obstacle = obstacles[mode]
        if obstacle is not None:
            raise NegotiationRefused(
                f"--io {mode} cannot be had, because {obstacle}. Use --io cached, or let --io auto choose."
            )
    why = f"I/O is {mode}, as {how}: {_good(mode, settings)}."
    why_not = {}
    for other in MODES:
        if other is not mode:
            obstacle = obstacles[other]
            reason = f"it cannot be had, because {obstacle}" if obstacle else _drawback(mode, other, settings)
            why_not[other] = f"Not {other}: {reason}."
    return mode, why, why_not


def _check(offered: InitRequest) -> None:
    """Raise NegotiationRefused for a kernel that no mode supports."""
    if offered.major != KERNEL_VERSION or offered.minor < MIN_MINOR:
        raise NegotiationRefused(
            f"This kernel speaks FUSE {offered.major}.{offered.minor}; the direct session needs "
            f"{KERNEL_VERSION}.{MIN_MINOR} (Linux {LINUX[MIN_MINOR]}) or later. Use --session pyfuse3."
        )


def _agree(facts: _Facts) -> tuple[int, dict[Init, str]]:
    """The agreed flags, by the table, and the wanted flags that are not offered."""
    agreed, missing = 0, {}
    offered = int(facts.offered.flags)
    for rule in _RULES:
        if not rule.wanted(facts):
            continue
        lacking = (rule.flag | rule.needs) & ~offered
        if lacking:
            names = " and ".join(f"{flag.name} ({since(flag)})" for flag in Init(lacking))
            missing[Init(rule.flag)] = f"The kernel does not offer {names}."
        elif not agreed & rule.never_with:
            agreed |= rule.flag
    return agreed, missing


def negotiate(offered: InitRequest, settings: Settings, privileges: Privileges) -> Decision:
    """Decide how to serve this mount. Raises NegotiationRefused with sentences for the user.

    Pure: the decision depends only on the arguments.
    """
    _check(offered)
    mode, why, why_not = _choose(offered, settings, privileges)
    agreed, missing = _agree(_Facts(offered, settings, privileges, mode))

    max_write = max(4096, settings.max_write)
    pages = _DEFAULT_MAX_PAGES
    if agreed & Init.MAX_PAGES:
        pages = min(-(-max_write // mmap.PAGESIZE), 0xFFFF)
    passthrough = bool(agreed & Init.PASSTHROUGH)
    reply = InitReply(
        major=KERNEL_VERSION,
        minor=min(offered.minor, KERNEL_MINOR_VERSION),
        max_readahead=min(offered.max_readahead, settings.max_readahead),
        flags=agreed,
        max_background=_MAX_BACKGROUND,
        congestion_threshold=_MAX_BACKGROUND * 3 // 4,  # as in FUSE_DEFAULT_CONGESTION_THRESHOLD
        max_write=min(max_write, pages * mmap.PAGESIZE),
        time_gran=1,
        max_pages=pages if agreed & Init.MAX_PAGES else 0,
        max_stack_depth=(_stack_depth(mode, settings) or 0) if passthrough else 0,
    )

    noflush = FOPEN_NOFLUSH if offered.minor >= _NOFLUSH_MINOR else 0
    enosys = {
        Opcode.OPEN: bool(agreed & Init.NO_OPEN_SUPPORT),
        Opcode.OPENDIR: bool(agreed & Init.NO_OPENDIR_SUPPORT),
        Opcode.FLUSH: True,
        Opcode.LSEEK: bool(agreed & Init.WRITEBACK_CACHE),
    }
    return Decision(
        reply=reply,
        io=mode,
        why=why,
        why_not=why_not,
        missing=missing,
        enosys=frozenset(opcode for opcode, wanted in enosys.items() if wanted),
        passthrough_upper=passthrough and _passes_uppers(mode, settings),
        passthrough_lower=passthrough and _passes_lowers(mode, settings),
        lower_programs_only=mode is IoMode.HYBRID and not settings.read_only,
        small_lower=SMALL_FILE if mode is IoMode.HYBRID else -1,
        file_open_flags=FOPEN_KEEP_CACHE | noflush,
        passthrough_open_flags=FOPEN_PASSTHROUGH | noflush if passthrough else 0,
        max_readahead=settings.max_readahead,
    )
