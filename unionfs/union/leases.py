"""The lease of an upper that other hosts can reach: a second mount of it is refused, wherever it is made.

flock(2) on a directory reaches the processes of one kernel, also on NFS. So where another kernel may see the
upper (`core.places.SHARED`), a mount has a lease, too:

    UPPER.lease/1.SEQUENCE.TOKEN.SECONDS.PID.DEVICE.BOOT.HOST

It lies beside the upper, which alone identifies it: another host may use another work directory, and tools
none at all. The file is empty; its name says everything, and its owner renames it to the next SEQUENCE every
few seconds. rename(2) compares and swaps, at the server: it fails if the name is not there any more. Hence

- who takes a lease over renames the very name that did not change for SECONDS. Of several hosts that do so
  one succeeds, none if the owner was faster, and an owner that comes back fails at its next renewal;
- nothing that a client has cached is trusted: an outdated name only makes a rename fail;
- no clock is compared with another's. (Ceph and glusterfs set times by the clock of the client.) Each host
  measures how long it saw no change, and the owner how long ago it began its last renewal: after two thirds
  of SECONDS without one it stops changing the upper until it has renewed; see `leasekeeper`.

Where nobody has a lease, mkdir(2) of the directory decides; an empty directory runs out like a lease.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

from unionfs.core.places import SHARED
from unionfs.errors import LayerError, quoted, reason
from unionfs.sys import calls
from unionfs.sys.fds import Owned, close_quietly, open_for_listing

SUFFIX: Final = ".lease"
_SECONDS: Final = 30.0
"""How long a lease runs without a renewal, if UNIONFS_LEASE_SECONDS, for tests, does not say otherwise."""
_MOST_SECONDS: Final = 600.0
"""A name that says more is not a lease's: nobody should wait for that long."""
_VERSION: Final = "1"
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_GONE: Final = (errno.ENOENT, errno.ESTALE)
_FORCE_SYNC: Final = 0x2000
"""AT_STATX_FORCE_SYNC: ask the server, so that a listing is not an outdated one (fs/nfs/inode.c)."""
_BASIC_STATS: Final = 0x7FF
_POLL_SECONDS: Final = 1.0
_TELL_SECONDS: Final = 6.0
"""A mount that waits for longer tells its caller so. A live owner renews its lease sooner."""
_LONGEST_HOST: Final = 48
"""Bytes. Some encrypting filesystems have names of at most 143 bytes."""

log = logging.getLogger(__name__)


def clock() -> float:
    """Seconds since the boot; they pass also while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def seconds() -> float:
    """How long a lease of this process runs without a renewal."""
    with suppress(ValueError):
        return _checked(float(os.environ.get("UNIONFS_LEASE_SECONDS", _SECONDS)))
    return _SECONDS


def _checked(runs: float) -> float:
    """Returns the seconds that a lease runs. Raises ValueError if they are none."""
    if not 0 < runs <= _MOST_SECONDS:
        raise ValueError(runs)
    return runs


def filesystem(fd: int) -> str | None:
    """The kind of the filesystem of an fd, for a sentence, if other hosts may see it; else None."""
    return SHARED.get(calls.filesystem_magic(fd))


@cache
def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip().replace("-", "")


@dataclass(frozen=True, slots=True)
class Owner:
    """Who has a lease."""

    token: str
    """Of one mount."""
    seconds: float
    pid: int
    device: int
    """The st_dev that the owner's kernel shows for the directory: of one superblock of that kernel."""
    boot: str
    host: str

    @classmethod
    def here(cls, fd: int) -> Owner:
        """This process, which sees the lease's directory at `fd`."""
        host = os.fsencode(socket.gethostname()).replace(b"/", b"_")[:_LONGEST_HOST]
        device = os.fstat(fd).st_dev
        return cls(secrets.token_hex(8), seconds(), os.getpid(), device, _boot(), os.fsdecode(host))

    def name(self, sequence: int) -> bytes:
        """The name of its file."""
        parts = _VERSION, sequence, self.token, f"{self.seconds:g}".replace(".", ","), self.pid, self.device
        return os.fsencode(".".join(map(str, (*parts, self.boot, self.host))))


def parsed(name: bytes) -> tuple[int, Owner] | None:
    """The sequence and the owner that a name says; None if it is not a lease of this version."""
    parts = os.fsdecode(name).split(".", 7)
    try:
        if parts[0] != _VERSION:
            return None
        _, sequence, token, runs, pid, device, boot, host = parts
        owner = Owner(token, _checked(float(runs.replace(",", "."))), int(pid), int(device), boot, host)
        return int(sequence), owner
    except ValueError:
        return None


class Lease:
    """A lease of this process."""

    def __init__(self, upper: str, parent: int, fd: int, owner: Owner, sequence: int, until: float) -> None:
        """`parent`, `fd`: O_PATH fds of the directory above the upper and of the lease's directory, which the
        caller closes after :meth:`end`."""
        self.upper = upper
        self.parent = parent
        self.fd = fd
        #: What the name says now. A lease that was resumed names this process from its first renewal on.
        self.owner = owner
        self._next = owner
        self.sequence = sequence
        #: Until when, by :func:`clock`, nobody else can have it.
        self.until = until
        #: Why it cannot come back, as a clause; empty while it can.
        self.lost = ""
        self._left = False

    @classmethod
    def resume(cls, upper: str, parent: int, fd: int, token: str) -> Lease:
        """The lease of a former daemon of the mount, which is not valid before it is renewed. Raises
        OSError if the server cannot tell."""
        lease = cls(upper, parent, fd, Owner(token, seconds(), os.getpid(), 0, _boot(), ""), 0, 0.0)
        if lease._found():
            lease._next = replace(lease.owner, pid=os.getpid())
        else:
            lease.lost = lease._why()
        return lease

    def renew(self) -> None:
        """Rename the file to the next name, or set `lost`. Raises OSError if the server cannot tell."""
        began = clock()
        for attempt in range(2):
            try:
                # The second step is for a server that made the first one, whose answer was lost with it.
                if self._step() or self._step() or (self._found() and self._step()):
                    self.until = began + self.owner.seconds * 2 / 3
                    return
                break
            except OSError as error:
                if error.errno != errno.ESTALE or attempt:
                    raise
                if not self._open_again():
                    break
        self.lost = self._why()

    def _step(self) -> bool:
        old, new = self.owner.name(self.sequence), self._next.name(self.sequence + 1)
        made = True
        try:
            os.rename(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except FileNotFoundError:
            made = False
        self.owner = self._next
        self.sequence += 1
        return made

    def _found(self) -> bool:
        """Whether it is there, perhaps with another sequence, which is taken over. Raises OSError if the
        server cannot tell."""
        try:
            names = _names(self.fd)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return False
        for sequence, owner in filter(None, map(parsed, names)):
            if owner.token == self.owner.token:
                self.owner, self.sequence = owner, sequence
                return True
        return False

    def _open_again(self) -> bool:
        """After ESTALE: the directory that has the name now, if there is one."""
        try:
            fd = os.open(_directory(self.upper), _DIRECTORY, dir_fd=self.parent)
        except FileNotFoundError:
            return False
        with Owned(fd):
            if self._left:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            os.dup2(fd, self.fd, inheritable=False)
        return True

    def _why(self) -> str:
        with suppress(OSError):
            for name in _names(self.fd):
                return f"{_described(name)} has taken its lease over"
        return "its lease was removed"

    def leave(self) -> None:
        """Its fds may be closed, and their numbers be those of other files: open it no more."""
        self._left = True

    def end(self) -> None:
        """Remove it. An error is logged: it runs out."""
        if self.lost:
            return
        try:
            for number in (self.sequence, self.sequence + 1):
                with suppress(FileNotFoundError):
                    os.unlink(self.owner.name(number), dir_fd=self.fd)
            os.rmdir(_directory(self.upper), dir_fd=self.parent)
        except OSError as error:
            log.warning("the lease of upper %s cannot be removed: %s", quoted(self.upper), reason(error))


def claim(upper_fd: int, upper: str, parent: int, *, alone: bool) -> Lease:
    """A lease on an upper. `parent`: an O_PATH fd of the directory above it, which the caller closes, as the
    lease's own fd. `alone`: no process of this kernel uses the upper by the same superblock.

    Waits until another host's lease has run out. Raises LayerError if it is renewed, or the lease cannot be
    made.
    """
    try:
        return _Claim(upper_fd, upper, parent, alone=alone).made()
    except OSError as error:
        place, kind = quoted(os.path.dirname(upper)), filesystem(upper_fd)
        raise LayerError(
            f"upper {quoted(upper)} is on {kind}, which other hosts may see, and its lease "
            f"{quoted(upper + SUFFIX)} cannot be made: {reason(error)}; make {place} writable for the "
            "user who mounts."
        ) from error


def refuse_if_led(upper: str, *, alone: bool) -> None:
    """Raises LayerError if another host, or another mount of the filesystem, has a lease on an upper that is
    renewed. `alone`: as in :func:`claim`. Changes nothing; a missing upper is nobody's. Raises OSError."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    with suppress(FileNotFoundError), Owned(os.open(upper, flags)) as fd:
        if filesystem(fd) is not None:
            with Owned(os.open(os.path.dirname(upper), flags)) as parent:
                _Claim(fd, upper, parent, alone=alone).refuse_if_led()


class _Claim:
    """One attempt to get a lease."""

    def __init__(self, upper_fd: int, upper: str, parent: int, *, alone: bool) -> None:
        self._upper_fd = upper_fd
        self._upper = upper
        self._parent = parent
        self._alone = alone

    def made(self) -> Lease:
        while True:
            began = clock()
            fd, found = self._open(make=True)
            with Owned(fd):
                lease = Lease(self._upper, self._parent, fd, Owner.here(fd), 1, began)
                try:
                    if self._has_it(lease, found):
                        lease.until = began + lease.owner.seconds * 2 / 3
                        lease.fd = os.dup(fd)
                        return lease
                except OSError as error:
                    if error.errno not in _GONE:
                        raise

    def refuse_if_led(self) -> None:
        """See the function of that name."""
        try:
            fd, _ = self._open(make=False)
            with Owned(fd):
                names = _names(fd)
                if not self._is_dead(fd, names):
                    self._watch(fd, names)
        except OSError as error:
            if error.errno not in _GONE:
                raise

    def _open(self, *, make: bool) -> tuple[int, bool]:
        """An O_PATH fd of the lease's directory, and whether it was there. Raises OSError, LayerError."""
        directory = _directory(self._upper)
        while True:
            found = not make
            if make:
                try:
                    os.mkdir(directory, 0o700, dir_fd=self._parent)
                except FileExistsError:
                    found = True
            try:
                fd = os.open(directory, _DIRECTORY, dir_fd=self._parent)
            except FileNotFoundError:
                if make:
                    continue
                raise
            owner = os.fstat(fd).st_uid
            if not found or owner in (0, os.geteuid(), os.fstat(self._upper_fd).st_uid):
                return fd, found
            close_quietly(fd)
            raise LayerError(
                f"{quoted(self._upper + SUFFIX)} belongs to uid {owner}, another user than the upper's; "
                "remove it."
            )

    def _has_it(self, lease: Lease, found: bool) -> bool:
        """Make the lease's file, or rename to it one that has run out; whether it is the only one."""
        fd, own = lease.fd, lease.owner.name(1)
        outdated: list[bytes] = []
        if found:
            outdated = _names(fd)
            if not self._is_dead(fd, outdated) and not self._watch(fd, outdated):
                return False
            if not outdated:
                os.rmdir(_directory(self._upper), dir_fd=self._parent)
                return False
            log.info("upper %s: the lease of %s has run out", quoted(self._upper), _described(outdated[0]))
            os.rename(outdated[0], own, src_dir_fd=fd, dst_dir_fd=fd)
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            close_quietly(os.open(own, flags, 0o600, dir_fd=fd))
        others = [name for name in _names(fd) if name != own]
        if set(others) <= set(outdated):
            for name in others:
                os.unlink(name, dir_fd=fd)
            return True
        os.unlink(own, dir_fd=fd)
        return False

    def _is_dead(self, fd: int, names: list[bytes]) -> bool:
        """Whether all owners were processes of this kernel, of which none has the upper any more."""
        device = os.fstat(fd).st_dev
        owners = [None if (found := parsed(name)) is None else found[1] for name in names]
        ours = [one for one in owners if one is not None and one.boot == _boot() and one.device == device]
        return self._alone and bool(names) and len(ours) == len(owners)

    def _watch(self, fd: int, names: list[bytes]) -> bool:
        """Wait until names have not changed for as long as a lease runs; False if they were removed.
        Raises LayerError if one is renewed."""
        runs = max([seconds(), *(found[1].seconds for name in names if (found := parsed(name)) is not None)])
        tell_after = _TELL_SECONDS if names else math.inf
        pause = min(_POLL_SECONDS, runs / 20)
        unchanged, last = 0.0, clock()
        while unchanged < runs:
            time.sleep(pause)
            now_there = _names(fd)
            if now_there != names:
                if names and now_there:
                    raise self._refusal(now_there[0])
                return False
            # A server that did not answer kept the owner from renewing it, too.
            unchanged += min(clock() - last, 2 * pause)
            last = clock()
            if unchanged >= tell_after:
                tell_after = math.inf
                log.warning(
                    "upper %s has a lease of %s, which has not been renewed for %.0f seconds; waiting until "
                    "it runs out after %.0f", quoted(self._upper), _described(names[0]), unchanged, runs,
                )  # fmt: skip
        return True

    def _refusal(self, name: bytes) -> LayerError:
        return LayerError(
            f"upper {quoted(self._upper)} is in use by {_described(name)}, which has its lease "
            f"{quoted(self._upper + SUFFIX)}; unmount it there, or choose another upper."
        )


def _directory(upper: str) -> bytes:
    return os.fsencode(os.path.basename(upper) + SUFFIX)


def _names(fd: int) -> list[bytes]:
    """The names in a directory, as the server has them. Raises OSError; ENOENT or ESTALE if it is removed."""
    calls.statx(fd, b"", calls.AT_EMPTY_PATH | _FORCE_SYNC, _BASIC_STATS)
    with Owned(open_for_listing(fd)) as listing:
        return sorted(map(os.fsencode, os.listdir(listing)))


def _described(name: bytes) -> str:
    """The owner of a lease, for a sentence."""
    found = parsed(name)
    if found is None:
        return f"the unknown owner of {quoted(os.fsdecode(name))}"
    owner = found[1]
    if owner.boot == _boot():
        return f"process {owner.pid} of this host, through another mount of the filesystem"
    return f"process {owner.pid} of host {quoted(owner.host)}"
