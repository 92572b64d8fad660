"""What a container does and how it ended: state.json in its directory; of a detached one also its output."""

from __future__ import annotations

import os
import select
import shlex
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from unionfs.containers.store import Container, names
from unionfs.errors import UserError, on_failure, quoted
from unionfs.settings.words import in_table, moment
from unionfs.storage import jsonfiles
from unionfs.sys.fds import Owned
from unionfs.sys.process import is_alive, wait_gone

FORWARDED: Final = ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "WINCH", "CONT")
"""The signals that a container's process forwards to the command; KILL ends the container itself."""
_FILE: Final = "state.json"
_OUTPUT: Final = "output"
_KILLED: Final = "killed"
_END_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.1
_CHUNK: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class State:
    command: tuple[str, ...]
    pid: int
    started: int
    """The process of `unionfs run` and its start time in clock ticks since boot."""
    since: float
    """Seconds since the epoch."""
    top: tuple[int, int] | None = None
    """The process whose end is that of everything in the container, and its start time."""
    code: int | None = None
    ended: float | None = None
    ports: tuple[str, ...] = ()
    """Published ports, in docker's spelling."""
    policy: str = "no"
    """When it is started again; `Policy`."""
    restarts: int = 0
    between: bool = False
    """Whether its process waits before it starts the command again."""

    @property
    def is_running(self) -> bool:
        """Whether it runs, or waits to be started again."""
        return (self.code is None or self.between) and is_alive(self.pid, self.started)

    @property
    def word(self) -> str:
        """`running`, `restarting` if it waits, `exited`, or `dead` if its process was killed before it could
        record the exit code.
        """
        if self.is_running:
            return "restarting" if self.between else "running"
        return "dead" if self.code is None or self.between else "exited"


def write(container: Container, state: State) -> None:
    """Record a state; nothing, if the container's directory is gone or the disk is full."""
    with suppress(OSError):
        jsonfiles.write(f"{container.path}/{_FILE}", asdict(state), sync=False)


def read(container: Container) -> State | None:
    """Return the last state; None for a container that was never started."""
    try:
        values = jsonfiles.read(f"{container.path}/{_FILE}")
        top = values["top"]
        return State(
            tuple(map(str, values["command"])), int(values["pid"]), int(values["started"]),
            float(values["since"]), None if top is None else (int(top[0]), int(top[1])),
            values["code"], values["ended"], tuple(map(str, values.get("ports", ()))),
            str(values.get("policy", "no")), int(values.get("restarts", 0)), values.get("between") is True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None


def ended(state: State, code: int) -> State:
    return replace(state, code=code, ended=time.time())


def restarting(state: State, count: int) -> State:
    """Return the state of a container between two runs, before its restart number `count`."""
    return replace(state, between=True, restarts=count, ports=())


def is_killed(container: Container) -> bool:
    """Return whether `kill` has ended the container: its process does not see such a signal."""
    return os.path.lexists(f"{container.path}/{_KILLED}")


def clear_killed(container: Container) -> None:
    with suppress(OSError):
        os.unlink(f"{container.path}/{_KILLED}")


def _mark_killed(container: Container) -> None:
    """Raises UserError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with on_failure(f"container {quoted(container.name)} would be started again", "free space"):
        os.close(os.open(f"{container.path}/{_KILLED}", flags, 0o600))


def every(root: str) -> Iterator[tuple[Container, State | None]]:
    """Yield all containers of a storage root with their states, sorted by name. Raises OSError."""
    for name in names(root):
        container = Container(root, name)
        yield container, read(container)


def has_ended(container: Container) -> bool:
    """Return whether the command of its last run has ended; its process may still be cleaning up."""
    state = read(container)
    return state is not None and state.code is not None and not state.between


def running(container: Container) -> State:
    """Return the state of a container that runs. Raises UserError."""
    if not container.exists():
        raise UserError(f"there is no container {quoted(container.name)}; `unionfs ps -a` lists them.")
    state = read(container)
    if state is None or not state.is_running:
        raise UserError(
            f"container {quoted(container.name)} is not running; `unionfs ps -a` shows its state."
        )
    return state


def kill(container: Container, name: str) -> None:
    """Send a signal, such as `TERM`, to a container's command. Raises UserError; waits after KILL."""
    name = name.upper().removeprefix("SIG")
    state = running(container)
    if name == "KILL":
        if state.policy != "no":
            _mark_killed(container)
            if state.between:
                _send(state.pid, state.started, signal.SIGTERM)
        pid, started = state.top or (state.pid, state.started)
        _send(pid, started, signal.SIGKILL)
        if not wait_gone(state.pid, state.started, _END_SECONDS):
            raise UserError(
                f"container {quoted(container.name)} was killed, but its process (pid {state.pid}) does not "
                "end; its storage may be hanging."
            )
        return
    if name not in FORWARDED:
        raise UserError(
            f"signal {quoted(name)} is not forwarded to commands; give one of {', '.join(FORWARDED)}, KILL."
        )
    _send(state.pid, state.started, signal.Signals[f"SIG{name}"])


def stop(container: Container, seconds: float) -> None:
    """End a container's command by SIGTERM, after `seconds` by SIGKILL. Raises UserError."""
    state = running(container)
    _send(state.pid, state.started, signal.SIGTERM)
    if not wait_gone(state.pid, state.started, seconds):
        end(container)


def end(container: Container) -> None:
    """Kill everything in a container, and wait until its mount has ended, too."""
    state = read(container)
    with suppress(UserError):  # it has ended just now
        kill(container, "KILL")
    if state is not None:
        wait_gone(state.pid, state.started, _END_SECONDS)


def _send(pid: int, started: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError), Owned(os.pidfd_open(pid)) as pidfd:
        if is_alive(pid, started):  # checked after pidfd_open: the pid cannot have been reused
            signal.pidfd_send_signal(pidfd, number)


def open_output(container: Container) -> int:
    """Return an fd for the output of a detached container, which is appended to that of earlier runs."""
    with on_failure(f"the output of container {quoted(container.name)} cannot be kept", "free space"):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(f"{container.path}/{_OUTPUT}", flags, 0o600)


def output(container: Container, *, follow: bool) -> Iterator[bytes]:
    """Yield the output of a detached container; with `follow` until it ends. Raises UserError."""
    if not container.exists():
        raise UserError(f"there is no container {quoted(container.name)}; `unionfs ps -a` lists them.")
    try:
        opened = Owned(os.open(f"{container.path}/{_OUTPUT}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
    except FileNotFoundError:
        raise UserError(
            f"container {quoted(container.name)} has no output on record: it was not started by `run -d`."
        ) from None
    with opened as fd:
        while True:
            state = read(container) if follow else None
            goes_on = state is not None and state.is_running
            while data := os.read(fd, _CHUNK):
                yield data
            if not goes_on:
                return
            select.select([], [], [], _POLL_SECONDS)


def facts(container: Container, state: State | None) -> dict[str, Any]:
    """Return what is known about a container, as plain values."""
    return {
        "name": container.name,
        "state": "created" if state is None else state.word,
        "pid": state.pid if state is not None and state.is_running else None,
        "code": None if state is None else state.code,
        "command": [] if state is None else list(state.command),
        "image": container.image(),
        "driver": container.driver(),
        "lowers": list(container.lowers()),
        "restart": "no" if state is None else state.policy,
        "restarts": 0 if state is None else state.restarts,
        "ports": [] if state is None or not state.is_running else list(state.ports),
        "since": None if state is None else state.since,
        "ended": None if state is None else state.ended,
    }


def shown_fields(one: Mapping[str, Any]) -> dict[str, str]:
    """Return docker's fields of `facts`, as words."""
    status = {"created": "Created", "dead": "Dead", "exited": f"Exited ({one['code']})",
              "restarting": f"Restarting ({one['code']})"}.get(one["state"])  # fmt: skip
    if status is None:
        status = f"Up {_duration(time.time() - one['since'])}"
    elif one["ended"] is not None:
        status += f" {_duration(time.time() - one['ended'])} ago"
    return {
        "Names": one["name"],
        "ID": one["name"],
        "Image": one["image"][:12] if one["image"] else (one["lowers"] or ["-"])[0],
        "Command": shlex.join(one["command"])[:40] or "-",
        "CreatedAt": in_table(moment(one["since"]) if one["since"] else None),
        "Status": status,
        "State": one["state"],
        "Ports": ", ".join(one["ports"]),
    }


def _duration(seconds: float) -> str:
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return f"{max(int(seconds), 0)} seconds"
