"""INIT: every combination of interacting flags, modes, privileges and settings."""

from __future__ import annotations

import itertools
import mmap
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from protocol_messages import GOLDEN, decode

from unionfs.fuse.protocol import (
    Decision,
    Init,
    IoMode,
    NegotiationRefused,
    Opcode,
    Privileges,
    Settings,
    encode,
    negotiate,
)
from unionfs.fuse.protocol.flags import FOPEN_KEEP_CACHE, FOPEN_NOFLUSH, FOPEN_PASSTHROUGH, since
from unionfs.fuse.protocol.negotiate import MODES
from unionfs.fuse.protocol.requests import InitRequest

ROOT = Privileges(initial_user_namespace=True, sys_admin=True)
ROOTLESS = Privileges(initial_user_namespace=False, sys_admin=True)
NOBODY = Privileges(initial_user_namespace=True, sys_admin=False)
PRIVILEGES = (ROOT, ROOTLESS, NOBODY)

EVERYTHING = (1 << 43) - 1
"""All flags of protocol 7.45."""

TOUCHING = (
    Init.INIT_EXT,
    Init.PASSTHROUGH,
    Init.WRITEBACK_CACHE,
    Init.NO_OPEN_SUPPORT,
    Init.ATOMIC_O_TRUNC,
    Init.HANDLE_KILLPRIV_V2,
    Init.POSIX_ACL,
    Init.DONT_MASK,
)
"""Flags that a rule combines with another flag or a setting."""

WANTED = (
    Init.DO_READDIRPLUS | Init.READDIRPLUS_AUTO | Init.PARALLEL_DIROPS | Init.CACHE_SYMLINKS | Init.MAX_PAGES
    | Init.SETXATTR_EXT | Init.HAS_RESEND | Init.INIT_EXT | Init.HANDLE_KILLPRIV_V2 | Init.NO_OPENDIR_SUPPORT
)  # fmt: skip
"""Agreed whenever offered, in every mode."""

def offer(flags: int, minor: int = 45, readahead: int = 1 << 17) -> InitRequest:
    return InitRequest.of(major=7, minor=minor, max_readahead=readahead, flags=flags)


def check(decision: Decision, offered: InitRequest, settings: Settings, privileges: Privileges) -> None:
    """Every rule of the flag table, stated a second time."""
    agreed, reply = decision.reply.flags, decision.reply
    assert not agreed & ~offered.flags
    assert not agreed & ~sum(Init)
    assert decision.io in MODES
    assert settings.io in (IoMode.AUTO, decision.io)

    passthrough = bool(agreed & Init.PASSTHROUGH)
    zero_message = bool(agreed & Init.NO_OPEN_SUPPORT)
    assert not (zero_message and agreed & (Init.ATOMIC_O_TRUNC | Init.PASSTHROUGH))
    assert (Opcode.OPEN in decision.enosys) == zero_message
    assert (Opcode.OPENDIR in decision.enosys) == bool(agreed & Init.NO_OPENDIR_SUPPORT)
    others_change = settings.bound or settings.live
    assert not (agreed & Init.WRITEBACK_CACHE and (passthrough or others_change or settings.read_only))
    assert not (zero_message and others_change)
    assert (Opcode.LSEEK in decision.enosys) == bool(agreed & Init.WRITEBACK_CACHE)
    assert decision.enosys <= {Opcode.OPEN, Opcode.OPENDIR, Opcode.FLUSH, Opcode.LSEEK}

    if passthrough:
        assert privileges == ROOT
        assert agreed & Init.INIT_EXT
        assert reply.max_stack_depth in (1, 2)
        assert decision.passthrough_open_flags & FOPEN_PASSTHROUGH
        assert not decision.passthrough_open_flags & FOPEN_KEEP_CACHE
        assert decision.io is not IoMode.CACHED
    else:
        assert reply.max_stack_depth == 0
        assert decision.passthrough_open_flags == 0
    assert decision.passthrough_upper == (passthrough and not settings.read_only and not settings.leased)
    if decision.io is IoMode.HYBRID:
        flat = settings.lower_stack_depth <= (0 if settings.read_only else settings.upper_stack_depth)
        assert decision.passthrough_lower == (flat and (settings.read_only or not settings.live))
    else:
        assert decision.passthrough_lower == (decision.io is IoMode.PASSTHROUGH)
    assert decision.lower_programs_only == (decision.io is IoMode.HYBRID and not settings.read_only)
    assert decision.small_lower == (65536 if decision.io is IoMode.HYBRID else -1)
    assert passthrough == (decision.passthrough_upper or decision.passthrough_lower)

    assert bool(agreed & Init.POSIX_ACL) == bool(agreed & Init.DONT_MASK)
    both = Init.POSIX_ACL | Init.DONT_MASK
    assert bool(agreed & Init.POSIX_ACL) == (settings.acl and offered.flags & both == both)
    assert not (agreed & Init.AUTO_INVAL_DATA and agreed & Init.EXPLICIT_INVAL_DATA)
    assert not (agreed & Init.READDIRPLUS_AUTO and not agreed & Init.DO_READDIRPLUS)
    assert not (agreed >> 32 and not agreed & Init.INIT_EXT)

    assert reply.time_gran == 1
    assert reply.major == 7
    assert reply.minor <= offered.minor
    assert reply.max_readahead <= offered.max_readahead
    assert 4096 <= reply.max_write <= max(4096, settings.max_write)
    assert reply.max_write <= (reply.max_pages or 32) * mmap.PAGESIZE
    assert bool(reply.max_pages) == bool(agreed & Init.MAX_PAGES)
    assert 1 <= reply.congestion_threshold <= reply.max_background <= 0xFFFF
    encode.init(1, reply)

    assert set(decision.why_not) == set(MODES) - {decision.io}
    for sentence in (decision.why, *decision.why_not.values(), *decision.missing.values()):
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        assert not (settings.read_only and "upper" in sentence)
    assert not any(agreed & flag for flag in decision.missing)


def possible(mode: IoMode, offered: InitRequest, privileges: Privileges) -> bool:
    """The table of I/O modes, stated a second time (layers on ordinary filesystems)."""
    both = Init.PASSTHROUGH | Init.INIT_EXT
    return mode in (IoMode.AUTO, IoMode.CACHED) or (privileges == ROOT and offered.flags & both == both)


SWITCHES = [
    {"bound": bound, "live": live, "acl": acl, "read_only": read_only, "leased": leased}
    for bound, live, acl, read_only, leased in itertools.product((False, True), repeat=5)
    if not (read_only and leased)
]


@pytest.mark.parametrize("io", list(IoMode))
@pytest.mark.parametrize("privileges", PRIVILEGES, ids=["root", "rootless", "nobody"])
def test_every_combination(io: IoMode, privileges: Privileges) -> None:
    rest = EVERYTHING & ~sum(TOUCHING)
    offers = [
        offer(rest | sum(flags))
        for count in range(len(TOUCHING) + 1)
        for flags in itertools.combinations(TOUCHING, count)
    ]
    assert len(offers) == 256
    for switches in SWITCHES:
        settings = Settings(io=io, **switches)
        for offered in offers:
            if possible(io, offered, privileges):
                check(negotiate(offered, settings, privileges), offered, settings, privileges)
            else:
                with pytest.raises(NegotiationRefused):
                    negotiate(offered, settings, privileges)


SETTINGS = st.builds(
    Settings,
    io=st.just(IoMode.AUTO),
    read_only=st.booleans(),
    bound=st.booleans(),
    live=st.booleans(),
    acl=st.booleans(),
    upper_stack_depth=st.integers(0, 3),
    lower_stack_depth=st.integers(0, 3),
    max_write=st.integers(0, 1 << 32),
    max_readahead=st.integers(0, (1 << 32) - 1),
)


@given(
    flags=st.integers(0, (1 << 64) - 1) | st.just(EVERYTHING),
    minor=st.integers(23, 99),
    readahead=st.integers(0, (1 << 32) - 1),
    settings=SETTINGS,
    privileges=st.sampled_from(PRIVILEGES),
)
def test_auto_is_never_refused(
    flags: int, minor: int, readahead: int, settings: Settings, privileges: Privileges
) -> None:
    """For every kernel offer, even unknown flags."""
    offered = offer(flags, minor, readahead)
    decision = negotiate(offered, settings, privileges)
    check(decision, offered, settings, privileges)
    assert decision == negotiate(offered, settings, privileges), "pure"


@pytest.mark.parametrize("io", MODES)
def test_what_is_wanted_is_agreed(io: IoMode) -> None:
    decision = negotiate(offer(EVERYTHING), Settings(io=io), ROOT)
    assert decision.flags & WANTED == WANTED
    assert decision.flags & Init.EXPLICIT_INVAL_DATA
    assert Opcode.FLUSH in decision.enosys
    assert decision.file_open_flags == FOPEN_KEEP_CACHE | FOPEN_NOFLUSH


def test_hybrid() -> None:
    decision = negotiate(offer(EVERYTHING), Settings(), ROOT)
    assert decision.io is IoMode.HYBRID
    assert decision.flags & Init.PASSTHROUGH
    assert decision.flags & Init.ATOMIC_O_TRUNC
    assert decision.enosys == {Opcode.OPENDIR, Opcode.FLUSH}
    assert (decision.passthrough_upper, decision.passthrough_lower) == (True, True)
    assert decision.lower_programs_only
    assert decision.reply.max_stack_depth == 1
    assert "programs and libraries of the lowers (ELF files of more than 64 KiB)" in decision.why
    assert "old data, with hybrid only programs do" in decision.why_not[IoMode.PASSTHROUGH]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"live": True}, "watched"),
        ({"lower_stack_depth": 1}, "stacked"),
        ({"lower_stack_depth": 2}, "stacked"),
    ],
)
def test_hybrid_without_programs(changed: dict[str, int], reason: str) -> None:
    """Where others change the lowers, and where the mount would become deeper than by the upper's files."""
    decision = negotiate(offer(EVERYTHING), replace(Settings(), **changed), ROOT)
    assert decision.io is IoMode.HYBRID
    assert (decision.passthrough_upper, decision.passthrough_lower) == (True, False)
    assert decision.reply.max_stack_depth == 1
    assert reason in decision.why
    assert "which hybrid avoids" in decision.why_not[IoMode.PASSTHROUGH]


@pytest.mark.parametrize("io", [IoMode.HYBRID, IoMode.PASSTHROUGH])
def test_an_upper_that_another_host_may_take(io: IoMode) -> None:
    """What goes kernel to kernel cannot be stopped."""
    decision = negotiate(offer(EVERYTHING), Settings(io=io, leased=True), ROOT)
    assert decision.io is io
    assert (decision.passthrough_upper, decision.passthrough_lower) == (False, True)
    assert "upper files go through the daemon" in decision.why


def test_hybrid_without_an_upper() -> None:
    """There is no copy-up, so large files are passed through, unless the mount becomes too deep."""
    decision = negotiate(offer(EVERYTHING), Settings(read_only=True), ROOT)
    assert decision.io is IoMode.HYBRID
    assert (decision.passthrough_upper, decision.passthrough_lower) == (False, True)
    assert not decision.lower_programs_only
    assert decision.reply.max_stack_depth == 1
    assert "64 KiB" in decision.why
    assert "old data" not in " ".join([decision.why, *decision.why_not.values()])

    stacked = negotiate(offer(EVERYTHING), Settings(read_only=True, lower_stack_depth=1), ROOT)
    assert stacked.io is IoMode.HYBRID
    assert not stacked.flags & Init.PASSTHROUGH
    assert "stacked" in stacked.why


def test_cached() -> None:
    decision = negotiate(offer(EVERYTHING), Settings(io=IoMode.CACHED), ROOT)
    assert decision.flags & Init.WRITEBACK_CACHE
    assert not decision.flags & (Init.ATOMIC_O_TRUNC | Init.PASSTHROUGH)
    assert decision.enosys == {Opcode.OPEN, Opcode.OPENDIR, Opcode.FLUSH, Opcode.LSEEK}
    assert decision.missing == {}


def test_without_zero_message_opens_o_trunc_can_be_atomic() -> None:
    decision = negotiate(offer(EVERYTHING & ~Init.NO_OPEN_SUPPORT), Settings(io=IoMode.CACHED), ROOT)
    assert decision.flags & Init.ATOMIC_O_TRUNC
    assert Opcode.OPEN not in decision.enosys


@pytest.mark.parametrize(
    ("flags", "privileges", "depth", "reason"),
    [
        (EVERYTHING & ~Init.PASSTHROUGH, ROOT, 0, "Linux 6.9"),
        (EVERYTHING & ~Init.INIT_EXT, ROOT, 0, "Linux 6.9"),
        (EVERYTHING, ROOTLESS, 0, "user namespace"),
        (EVERYTHING, NOBODY, 0, "root"),
        (EVERYTHING, ROOT, 2, "stacks no third"),
    ],
)
@pytest.mark.parametrize("io", [IoMode.HYBRID, IoMode.PASSTHROUGH])
def test_refusals_say_why(flags: int, privileges: Privileges, depth: int, reason: str, io: IoMode) -> None:
    settings = Settings(io=io, upper_stack_depth=depth, lower_stack_depth=depth)
    with pytest.raises(NegotiationRefused, match=reason) as caught:
        negotiate(offer(flags), settings, privileges)
    assert f"--io {io} cannot be had" in str(caught.value)
    assert "--io auto" in str(caught.value)
    decision = negotiate(offer(flags), replace(settings, io=IoMode.AUTO), privileges)
    assert decision.io is IoMode.CACHED
    assert reason in decision.why_not[io]


@pytest.mark.parametrize(
    ("io", "upper", "lower", "read_only", "expected"),
    [
        (IoMode.HYBRID, 0, 1, False, 1),
        (IoMode.HYBRID, 1, 0, False, 2),
        (IoMode.HYBRID, 1, 1, False, 2),
        (IoMode.HYBRID, 1, 2, False, 2),
        (IoMode.HYBRID, 0, 0, True, 1),
        (IoMode.HYBRID, 0, 1, True, 0),
        (IoMode.HYBRID, 0, 2, True, 0),
        (IoMode.PASSTHROUGH, 0, 0, False, 1),
        (IoMode.PASSTHROUGH, 0, 1, False, 2),
        (IoMode.PASSTHROUGH, 1, 2, False, 2),
        (IoMode.PASSTHROUGH, 0, 2, False, 1),
        (IoMode.PASSTHROUGH, 2, 0, True, 1),
    ],
)
def test_stack_depth(io: IoMode, upper: int, lower: int, read_only: bool, expected: int) -> None:
    settings = Settings(io=io, upper_stack_depth=upper, lower_stack_depth=lower, read_only=read_only)
    assert negotiate(offer(EVERYTHING), settings, ROOT).reply.max_stack_depth == expected


def test_bound_storage() -> None:
    decision = negotiate(offer(EVERYTHING), Settings(io=IoMode.CACHED, bound=True), ROOT)
    assert not decision.flags & (Init.WRITEBACK_CACHE | Init.EXPLICIT_INVAL_DATA)
    assert decision.flags & Init.AUTO_INVAL_DATA


def test_watched_lowers() -> None:
    """Data and sizes change by the daemon's notices alone, and an open file is known to the daemon."""
    decision = negotiate(offer(EVERYTHING), Settings(io=IoMode.CACHED, live=True), ROOT)
    assert not decision.flags & (Init.WRITEBACK_CACHE | Init.NO_OPEN_SUPPORT)
    assert decision.flags & Init.EXPLICIT_INVAL_DATA
    assert "watched" in decision.why


@pytest.mark.parametrize(
    ("max_write", "page_size", "flags", "pages", "expected"),
    [
        (1 << 20, 4096, EVERYTHING, 256, 1 << 20),
        (1 << 20, 65536, EVERYTHING, 16, 1 << 20),
        (1 << 20, 4096, EVERYTHING & ~Init.MAX_PAGES, 0, 128 << 10),
        (5000, 4096, EVERYTHING, 2, 5000),
        (0, 4096, EVERYTHING, 1, 4096),
    ],
)
def test_sizes(
    monkeypatch: pytest.MonkeyPatch, max_write: int, page_size: int, flags: int, pages: int, expected: int
) -> None:
    monkeypatch.setattr(mmap, "PAGESIZE", page_size)
    reply = negotiate(offer(flags), Settings(max_write=max_write), ROOT).reply
    assert (reply.max_pages, reply.max_write) == (pages, expected)


@pytest.mark.parametrize(
    ("settings", "wanted"), [(Settings(), 1 << 20), (Settings(max_readahead=4 << 20), 4 << 20)]
)
def test_readahead(settings: Settings, wanted: int) -> None:
    """INIT can only lower the kernel's; the rest is set elsewhere."""
    for offered in (1 << 17, wanted, 8 << 20):
        decision = negotiate(offer(EVERYTHING, readahead=offered), settings, ROOT)
        assert decision.reply.max_readahead == min(offered, wanted)
        assert decision.max_readahead == wanted


@pytest.mark.parametrize(("major", "minor"), [(7, 22), (6, 45), (8, 0)])
def test_kernels_that_cannot_be_served(major: int, minor: int) -> None:
    with pytest.raises(NegotiationRefused, match="pyfuse3"):
        negotiate(InitRequest.of(major=major, minor=minor), Settings(), ROOT)


def test_older_and_newer_kernels() -> None:
    assert negotiate(offer(EVERYTHING, minor=99), Settings(), ROOT).reply.minor == 45
    old = negotiate(offer(Init.NO_OPEN_SUPPORT, minor=23), Settings(), ROOT)
    assert old.reply.minor == 23
    assert old.io is IoMode.CACHED
    assert not old.file_open_flags & FOPEN_NOFLUSH


@pytest.mark.parametrize(
    ("flag", "release"),
    [
        (Init.ASYNC_READ, "before 3.15"), (Init.WRITEBACK_CACHE, "3.15"), (Init.POSIX_ACL, "4.9"),
        (Init.MAX_PAGES, "4.20"), (Init.NO_OPENDIR_SUPPORT, "5.1"), (Init.HANDLE_KILLPRIV_V2, "5.11"),
        (Init.INIT_EXT, "5.17"), (Init.PASSTHROUGH, "6.9"),
    ],
)  # fmt: skip
def test_what_is_missing_names_its_release(flag: Init, release: str) -> None:
    """The first one that has it, as its own history says."""
    assert since(flag) == f"Linux {release}"


def test_the_offer_of_linux_6_18() -> None:
    offered = decode(GOLDEN["InitRequest"])
    assert isinstance(offered, InitRequest)
    decision = negotiate(offered, Settings(acl=True), ROOT)
    assert decision.io is IoMode.HYBRID
    assert decision.missing == {}
    assert decision.flags & WANTED == WANTED
