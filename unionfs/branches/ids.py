"""The user namespace of an ordinary user's branch of the whole system: its owners are more than one.

Its uid 0 is the user, and its other ids are the user's subordinate ones (subuid(5)), as in rootless podman.
All that uses the branch runs in it: the daemon, the command, and what compares, commits and removes files
that belong to these ids. Files of all other users belong to the overflow id there (user_namespaces(7)), and
the branch shows them as root's.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from unionfs.daemon.caller import CALLER
from unionfs.errors import UserError, reason
from unionfs.sys.fds import Owned
from unionfs.sys.namespaces import CLONE_NEWNS, CLONE_NEWUSER, unshare

Range = tuple[int, int]
"""The first id outside, and the number of ids."""
_KINDS = ("uid", "gid")
_LIKELY = "/usr/sbin:/usr/bin:/sbin:/bin"
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Ids:
    """The ids from 1 on: ranges of this host's ids, one after the other."""

    uids: tuple[Range, ...]
    gids: tuple[Range, ...]

    @classmethod
    def from_json(cls, values: Any) -> Ids:
        """Read the values of `dataclasses.asdict`. Raises KeyError, TypeError or ValueError for others."""
        uids, gids = (
            tuple((int(first), int(count)) for first, count in values[kind]) for kind in ("uids", "gids")
        )
        return cls(uids, gids)

    def options(self) -> list[str]:
        """The options of the mount: what belongs to no id of the namespace is root's."""
        found = []
        for kind, ranges in zip(_KINDS, (self.uids, self.gids), strict=True):
            # The last range that has an id counts: what uid 0 makes is stored as its own.
            none = overflow(kind)
            found.append(f"{kind}mapping=0:0:{_count(ranges)}:{none}:0:1:0:0:{none}")
        return found


_entered: Ids | None = None


def of_user() -> Ids | str:
    """The subordinate ids of this user, or why there are none that can be used."""
    ranges = []
    for kind in _KINDS:
        path = f"/etc/sub{kind}"
        found = _ranges(path)
        # What belongs to others is copied with the overflow id.
        if _count(found) <= overflow(kind):
            return f"{path} has no {overflow(kind) + 1:,} ids of this user"
        if _program(kind) is None:
            return f"new{kind}map is not installed (package uidmap)"
        ranges.append(found)
    return Ids(*ranges)


def enter(ids: Ids | None) -> None:
    """Become uid 0 of a new user namespace with these ids, and of a new mount namespace. Raises UserError.

    None, and ids that were entered before, change nothing. The process must have one thread.
    """
    global _entered
    if ids is None or ids == _entered:
        return
    CALLER.needs_own_process()
    go, ready = os.pipe()
    answer, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ready)
        _map(ids, go, told)
    os.close(go)
    os.close(told)
    cause = ""
    with Owned(answer):
        try:
            unshare(CLONE_NEWUSER | CLONE_NEWNS, own_ids=False)
            os.write(ready, b"\n")
        except OSError as error:
            cause = reason(error)
        finally:
            os.close(ready)
        cause = cause or os.fsdecode(os.read(answer, _CHUNK))
    os.waitpid(pid, 0)
    if cause or os.geteuid() != 0:
        raise UserError(
            f"a user namespace with the subordinate ids of this user cannot be made: {cause or 'no answer'}; "
            "check /etc/subuid, /etc/subgid and newuidmap."
        )
    _entered = ids


def entered() -> Ids | None:
    """The ids whose namespace this process has entered."""
    return _entered


def inside(ids: Ids | None, action: Callable[[], object]) -> None:
    """Run `action` in a child that has entered; for None here. Raises UserError."""
    if ids is None or ids == _entered:
        action()
        return
    answer, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = "its process failed"
        try:
            enter(ids)
            action()
            text = ""
        except UserError as error:
            text = str(error)
        except OSError as error:
            text = reason(error)
        finally:
            os.write(told, b"." + os.fsencode(text)[: _CHUNK - 1])
            os._exit(0)
    os.close(told)
    with Owned(answer):
        text = os.fsdecode(os.read(answer, _CHUNK))
    os.waitpid(pid, 0)
    if text != ".":
        raise UserError(text[1:] or "the process in the user namespace of the branch was killed; try again.")


def overflow(kind: str) -> int:
    """The id of what has none here; `kind`: uid or gid. proc_sys_kernel(5)."""
    with open(f"/proc/sys/kernel/overflow{kind}", encoding="ascii") as text:
        return int(text.read())


def _map(ids: Ids, go: int, told: int) -> None:
    """In a child outside: map the ids of the parent when it is ready, and write why that failed. Ends."""
    text = "its process failed"
    try:
        parent, user, group = os.getppid(), os.getuid(), os.getgid()
        if os.read(go, 1):
            text = _mapped("uid", parent, user, ids.uids) or _mapped("gid", parent, group, ids.gids)
    finally:
        os.write(told, os.fsencode(text))
        os._exit(0)


def _mapped(kind: str, pid: int, own: int, ranges: Sequence[Range]) -> str:
    words, first = [str(pid), "0", str(own), "1"], 1
    for start, count in ranges:
        words += [str(first), str(start), str(count)]
        first += count
    try:
        done = subprocess.run(
            [_program(kind) or f"new{kind}map", *words], stdin=subprocess.DEVNULL, capture_output=True
        )
    except OSError as error:
        return f"new{kind}map: {reason(error)}"
    if done.returncode == 0:
        return ""
    return os.fsdecode(done.stderr).strip() or f"new{kind}map: exit code {done.returncode}"


def _program(kind: str) -> str | None:
    return shutil.which(f"new{kind}map") or shutil.which(f"new{kind}map", path=_LIKELY)


def _count(ranges: Sequence[Range]) -> int:
    """The number of ids of the namespace, with 0."""
    return 1 + sum(count for _, count in ranges)


def _ranges(path: str) -> tuple[Range, ...]:
    """The ranges of this user in subuid(5) or subgid(5); none if it cannot be read."""
    uid, found = os.getuid(), []
    names = {str(uid)}
    with suppress(KeyError):
        names.add(pwd.getpwuid(uid).pw_name)
    with suppress(OSError), open(path, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            name, _, rest = line.strip().partition(":")
            first, _, count = rest.partition(":")
            if name in names and first.isdecimal() and count.isdecimal() and int(count):
                found.append((int(first), int(count)))
    return tuple(found)
