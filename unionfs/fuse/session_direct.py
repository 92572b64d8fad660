"""The session that speaks the kernel's protocol itself: all features of FUSE, and the fastest data path.

It mounts, negotiates by `protocol.negotiate`, and runs `direct.loop` with the handlers of `direct.names`,
`direct.listings` and `direct.data`, which drive the same `Operations` as the other session.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import trio

from unionfs.core import listings as core_listings
from unionfs.core import namerequests
from unionfs.core.answers import Answers
from unionfs.core.idling import Idling
from unionfs.core.listings import Lister
from unionfs.core.loop import Channel, new_buffer
from unionfs.core.opens import Opens
from unionfs.core.places import Layer
from unionfs.core.pruning import Pruner
from unionfs.core.reads import Reads
from unionfs.core.setrequests import SetRequests
from unionfs.fuse.direct.data import DataRequests
from unionfs.fuse.direct.device import Device
from unionfs.fuse.direct.former import NO_FORMER, Former
from unionfs.fuse.direct.listings import ListingRequests
from unionfs.fuse.direct.loop import Loop
from unionfs.fuse.direct.mounting import MountOptions, mount, raise_readahead
from unionfs.fuse.direct.names import NameRequests
from unionfs.fuse.direct.nodeio import NodeIos
from unionfs.fuse.direct.nodelimit import NodeLimit
from unionfs.fuse.direct.notices import Notices
from unionfs.fuse.direct.splicing import Splicer
from unionfs.fuse.errors import CUT_OFF, SessionError, SessionUnfit
from unionfs.fuse.operations import Operations
from unionfs.fuse.protocol import (
    Decision,
    Init,
    IoMode,
    NegotiationRefused,
    Opcode,
    Privileges,
    Settings,
    decoder,
    encode,
    negotiate,
    notify,
    receive_buffer_size,
)
from unionfs.fuse.protocol import requests as rq
from unionfs.sys import calls
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability, in_initial_user_namespace
from unionfs.sys.mountinfo import MountEntry, mount_of_id
from unionfs.sys.unmount import unmount

READAHEAD = 4 << 20
"""Readahead in bytes."""
_LARGEST_REQUEST = 1 << 20
_INIT_SECONDS = 20.0
_ALL = (1 << 63) - 1
"""No file is larger."""


@dataclass(frozen=True, slots=True)
class Connection:
    """A mount that can be used."""

    device: int
    """The fd of /dev/fuse."""
    decision: Decision
    mount: MountEntry | None


async def serve(
    operations: Operations,
    mountpoint: str,
    options: MountOptions,
    io: IoMode,
    on_ready: Callable[[Connection], None],
    *,
    cpu_idle: bool = False,
    max_nodes: int = 0,
) -> None:
    """Mount, serve until the mount is gone, and clean up.

    ``on_ready`` is called when the mount is usable. Raises SessionError
    if mounting fails, the requested I/O mode is not available, or the mount is disconnected; SessionUnfit if
    another session may work. ``cpu_idle``: let CPUs become idle between requests. ``max_nodes``: see
    `direct.nodelimit`.
    """
    fd, entry = mount(mountpoint, options)
    device = Device(fd)
    splicer = Splicer(device.fd, operations.latencies.written)
    ready = False
    try:
        decision = await _agree(device, splicer, operations, io)
        if entry is not None and entry.is_fuse:
            raise_readahead(entry.device, decision.max_readahead)
        with _awake(cpu_idle) as idling:
            loop = make_loop(device, splicer, operations, decision, idling, max_nodes=max_nodes)
            ready = True
            on_ready(Connection(device.fd, decision, entry))
            await _run(loop, mountpoint)
    finally:
        splicer.close()
        device.close()
        if not ready:
            found = None if entry is None else mount_of_id(entry.mount_id)
            if found is not None and found.is_fuse:
                with suppress(OSError):
                    unmount(found, lazy=True)


async def resume(
    operations: Operations,
    mountpoint: str,
    connection: Connection,
    former: Former,
    on_ready: Callable[[Connection], None],
    *,
    cpu_idle: bool = False,
    max_nodes: int = 0,
) -> None:
    """Serve a mount whose daemon died, until it is gone. ``former``: what that one had open; requests
    that it did not answer are sent again. As :func:`serve`."""
    device = Device(connection.device)
    splicer = Splicer(device.fd, operations.latencies.written)
    try:
        with _awake(cpu_idle) as idling:
            loop = make_loop(device, splicer, operations, connection.decision, idling, former, max_nodes)
            on_ready(connection)
            device.notify(notify.resend())
            await _run(loop, mountpoint)
    finally:
        splicer.close()
        device.close()


@contextmanager
def _awake(cpu_idle: bool) -> Iterator[Idling | None]:
    idling = None if cpu_idle else Idling()
    try:
        yield idling
    finally:
        if idling is not None:
            idling.close()


async def _run(loop: Loop, mountpoint: str) -> None:
    try:
        await loop.run()
    except* ConnectionAbortedError as group:
        raise SessionError(CUT_OFF.format(mountpoint)) from group


def make_loop(
    device: Device,
    splicer: Splicer,
    operations: Operations,
    decision: Decision,
    idling: Idling | None = None,
    former: Former = NO_FORMER,
    max_nodes: int = 0,
) -> Loop:
    """The loop with all handlers."""
    ios = NodeIos(device.fd, decision, operations.union.state)
    ios.has_registered(former.backing_ids, former.kept_ids)
    names = NameRequests(operations, ios, decision)
    data = DataRequests(operations, ios, names, device, splicer, decision, former)
    union, latencies = operations.union, operations.latencies
    lister = Lister(union.nodes, union.merge, union.number_of_unreachable)
    listings = ListingRequests(operations, lister)
    answers = _make_answers(device, operations, decision, ios, lister)
    channel = Channel(device.fd, answers, lambda: latencies.watched, idling)
    writes_back = bool(decision.flags & Init.WRITEBACK_CACHE)
    operations.refreshing.serve(Notices(device, ios, keeps_sizes=writes_back))
    limit = NodeLimit(device, Pruner(union.nodes), decision, max_nodes) if max_nodes else None
    operations.add_figures(lambda: {
        **({} if limit is None else limit.figures()),
        "requests": _counts(operations.requests, answers),
        **ios.figures(),
        "keeps_cpus_awake": idling is not None and idling.possible,
        "kept_open_files": len(union.files.kept),
        "passthrough": {
            "upper": decision.passthrough_upper,
            "lower": decision.passthrough_lower,
            "lower_programs_only": decision.passthrough_lower and decision.lower_programs_only,
        },
        "cache": {
            "writeback": writes_back,
            "opens_without_request": Opcode.OPEN in decision.enosys,
            "readahead_bytes": decision.max_readahead,
        },
    })  # fmt: skip
    loop = Loop(
        device,
        decision,
        operations.union,
        operations.requests,
        {**names.table, **data.table},
        {**names.waiting, **listings.waiting, **data.waiting},
        operations.latencies,
        channel,
        operations.invalidations,
        operations.asides,
        limit,
        operations.fence,
    )
    operations.snapshots.serve(loop)
    return loop


def _make_answers(
    device: Device, operations: Operations, decision: Decision, ios: NodeIos, lister: Lister
) -> Answers:
    """What answers requests without Python."""
    union, handles = operations.union, operations.files.handles
    running = operations.copy_ups.running
    opens = Opens(
        device.fd, union.nodes, handles, union.files.opener, ios, union.flags, running,
        flags=decision.file_open_flags, small=decision.small_lower if decision.passthrough_lower else _ALL,
    )  # fmt: skip
    names = namerequests.NameRequests(
        union.nodes, operations.changes.entries, handles,
        None if Opcode.OPEN in decision.enosys else ios, masks=bool(decision.flags & Init.DONT_MASK),
    )  # fmt: skip
    sets = SetRequests(union.nodes, union.gate, union.flags, operations.copy_ups.of_attributes, running)
    return Answers(
        device.fd, union.nodes, union, opens, names, sets,
        core_listings.ListingRequests(union.nodes, lister, operations.directories),
        Reads(union.nodes, handles, union.files.opener, union.files.kept),
        acl=union.stack.acl, enosys=decision.enosys, refused=device.answer_refused,
    )  # fmt: skip


def _counts(requests: Counter[str], answers: Answers) -> dict[str, int]:
    """The number of requests by kind."""
    counted = Counter({Opcode(code).name.lower(): count for code, count in answers.counts().items()})
    return dict(sorted((requests + counted).items()))


async def _agree(device: Device, splicer: Splicer, operations: Operations, io: IoMode) -> Decision:
    """Answer the kernel's INIT. Raises SessionError."""
    buffer = new_buffer(receive_buffer_size(_LARGEST_REQUEST))
    with trio.move_on_after(_INIT_SECONDS):
        while True:
            try:
                size = os.readv(device.fd, [buffer])
            except BlockingIOError:
                await trio.lowlevel.wait_readable(device.fd)
                continue
            except OSError as error:
                if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                    raise SessionError("the mount was gone before it could be used") from error
                raise
            request = decoder()(memoryview(buffer), size)
            if isinstance(request, rq.InitRequest):
                break
            device.answer(encode.error(request.unique, errno.EIO))
        settings = _settings(operations, io, splicer.capacity())
        try:
            decision = negotiate(request, settings, _privileges())
        except NegotiationRefused as refusal:
            device.answer(encode.error(request.unique, errno.EPROTO))
            if io is IoMode.AUTO:
                raise SessionUnfit(str(refusal)) from refusal
            raise SessionError(str(refusal)) from refusal
        device.answer(encode.init(request.unique, decision.reply))
        return decision
    raise SessionError(f"the kernel sent no INIT within {_INIT_SECONDS:.0f} seconds")


def _settings(operations: Operations, io: IoMode, spliceable: int) -> Settings:
    stack = operations.union.stack
    uppers = [layer for layer in stack.layers if layer.is_upper]
    lowers = [layer for layer in stack.layers if not layer.is_upper]
    return Settings(
        io=io,
        # A read-only mount with an upper may become writable later (mount -o remount,rw).
        read_only=stack.upper is None,
        bound=bool(stack.bound),
        live=operations.union.watches is not None,
        acl=stack.acl,
        permissions=stack.keeps_permissions,
        leased=stack.lease is not None,
        upper_stack_depth=max(map(_stack_depth, uppers), default=0),
        lower_stack_depth=max(map(_stack_depth, lowers), default=0),
        max_readahead=READAHEAD,
        # Large reads are answered by splicing, so they should fit into a pipe.
        max_write=min(_LARGEST_REQUEST, spliceable),
    )


def _stack_depth(layer: Layer) -> int:
    """The number of visible stacked filesystems below a layer."""
    stacked = (calls.OVERLAYFS_MAGIC, calls.FUSE_MAGIC)
    return 1 if calls.filesystem_magic(layer.root_fd) in stacked else 0


def _privileges() -> Privileges:
    return Privileges(
        initial_user_namespace=in_initial_user_namespace(), sys_admin=has_capability(CAP_SYS_ADMIN)
    )
