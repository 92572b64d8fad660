"""The network of a container with published ports: its own namespace, which a program connects to the host.

The program is pasta(1) or slirp4netns(1). It opens the host's ports as this user, and forwards connections.
The container reaches other hosts through it, but nothing that listens on the host's loopback only. Without
either program the container has the host's network.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

from unionfs.errors import UserError, on_failure, quoted
from unionfs.settings.ports import Port
from unionfs.sys.calls import PR_SET_PDEATHSIG, prctl
from unionfs.sys.child import run_child
from unionfs.sys.fds import Owned
from unionfs.sys.namespaces import enter

_NS_GET_USERNS: Final = 0xB701  # _IO(0xb7, 1), include/uapi/linux/nsfs.h
_FIRST_PORT: Final = "/proc/sys/net/ipv4/ip_unprivileged_port_start"
_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.01


@dataclass(frozen=True, slots=True)
class _Place:
    """A network namespace, and what the program has to know of it."""

    namespace: str
    """As a path, through an fd that the program inherits."""
    owner: str | None
    """The user namespace that has it, if that is not this process's."""
    directory: str
    """For files of the program; private, removed when it has started."""
    exit_fd: int
    """At its end this process has ended."""


class Slirp4netns:
    """slirp4netns(1), which opens ports by requests to a socket. Its --userns-path fails with its sandbox."""

    program: Final = "slirp4netns"
    nameserver: Final = "10.0.2.3"
    starts_in_owner: Final = True

    def words(self, place: _Place, ports: Sequence[Port]) -> list[str]:
        return [
            "--configure", "--mtu=65520", "--disable-host-loopback", "--enable-sandbox", "--enable-seccomp",
            f"--exit-fd={place.exit_fd}", f"--api-socket={place.directory}/socket",
            "--netns-type=path", place.namespace, "tap0",
        ]  # fmt: skip

    def is_ready(self, place: _Place) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(f"{place.directory}/socket") == 0

    def publish(self, place: _Place, port: Port) -> None:
        """Raises UserError."""
        request = {
            "proto": port.protocol, "host_addr": port.address, "host_port": port.host,
            "guest_port": port.container,
        }  # fmt: skip
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{place.directory}/socket")
            client.sendall(json.dumps({"execute": "add_hostfwd", "arguments": request}).encode())
            client.shutdown(socket.SHUT_WR)
            answer = client.recv(1 << 16)
        if b'"error"' in answer:
            raise _cannot_listen(port)


class Pasta:
    """pasta(1), which gets the ports as arguments and ends with the namespace."""

    program: Final = "pasta"
    nameserver: Final = "169.254.1.1"
    starts_in_owner: Final = False

    def words(self, place: _Place, ports: Sequence[Port]) -> list[str]:
        words = ["--config-net", "--foreground", "--quiet", "--no-map-gw", "-T", "none", "-U", "none"]
        for option, protocol in (("-t", "tcp"), ("-u", "udp")):
            chosen = [f"{p.address}/{p.host}:{p.container}" for p in ports if p.protocol == protocol]
            for text in chosen or ["none"]:
                words += [option, text]
        words += ["--dns-forward", self.nameserver, "--pid", f"{place.directory}/pid"]
        owner = ["--netns-only"] if place.owner is None else ["--userns", place.owner]
        return [*words, *owner, "--netns", place.namespace]

    def is_ready(self, place: _Place) -> bool:
        with suppress(OSError):
            return os.stat(f"{place.directory}/pid").st_size > 0
        return False

    def publish(self, place: _Place, port: Port) -> None:
        pass


Program = Slirp4netns | Pasta


def choose() -> Program | None:
    """Return the installed program; pasta does not enter a namespace of root's."""
    candidates: tuple[Program, ...] = (Slirp4netns(),) if os.geteuid() == 0 else (Pasta(), Slirp4netns())
    return next((one for one in candidates if shutil.which(one.program) is not None), None)


class Network:
    """A running program. It ends with this process."""

    def __init__(self, program: Program, init: int, ports: Sequence[Port]) -> None:
        """Connect the network namespace of process `init`, and open the ports. Raises UserError."""
        for port in ports:
            _check_free(port)
        with ExitStack() as stack, on_failure(
            f"{program.program} cannot be started", "check its installation, or run the command without -p",
            OSError, subprocess.SubprocessError,
        ):  # fmt: skip
            path = f"/proc/{init}/ns/net"
            namespace = stack.enter_context(Owned(os.open(path, os.O_RDONLY | os.O_CLOEXEC)))
            owner = _owner(namespace)
            if owner is not None:
                stack.enter_context(Owned(owner))
            run_child(lambda: _allow_low_ports(owner, namespace), None)
            enters = owner if program.starts_in_owner and os.geteuid() != 0 else None
            reader, self._exit = os.pipe()
            stack.enter_context(Owned(reader))
            place = _Place(
                f"/proc/self/fd/{namespace}", None if owner is None else f"/proc/self/fd/{owner}",
                stack.enter_context(tempfile.TemporaryDirectory(prefix="unionfs-")), reader,
            )  # fmt: skip
            log = stack.enter_context(tempfile.TemporaryFile())
            self._process = subprocess.Popen(
                [program.program, *program.words(place, ports)], start_new_session=True,
                pass_fds=[fd for fd in (namespace, owner, reader) if fd is not None],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=partial(_prepare, enters),
            )  # fmt: skip
            try:
                self._wait_until(lambda: program.is_ready(place))
                for port in ports:
                    program.publish(place, port)
            except TimeoutError:
                self.end()
                log.seek(0)
                said = " ".join(log.read(1 << 16).decode(errors="replace").split())
                raise UserError(
                    f"{program.program} cannot connect the container's network: {quoted(said[-300:])}; check "
                    "the ports, or run the command without -p."
                ) from None
            except BaseException:
                self.end()
                raise

    def _wait_until(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _SECONDS
        while not ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(_POLL_SECONDS)

    def end(self) -> None:
        """End the program, if it has not ended with the namespace."""
        with suppress(OSError):
            os.close(self._exit)
        with suppress(OSError):
            self._process.kill()
            self._process.wait()


def _owner(namespace: int) -> int | None:
    """Return an fd of the user namespace that owns another; None if it is this process's. Raises OSError."""
    owner = fcntl.ioctl(namespace, _NS_GET_USERNS)
    if os.path.samestat(os.fstat(owner), os.stat("/proc/self/ns/user")):
        os.close(owner)
        return None
    return owner


def _allow_low_ports(owner: int | None, namespace: int) -> int:
    """Let everybody in a network namespace listen at ports below 1024, as in docker. For a child process."""
    if owner is not None:
        enter(owner)
    enter(namespace)
    with open(_FIRST_PORT, "w", encoding="ascii") as setting:
        setting.write("0")
    return 0


def _prepare(owner: int | None) -> None:
    """Let the program run in a user namespace, and end with this process. For its process."""
    if owner is not None:
        enter(owner)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _check_free(port: Port) -> None:
    """Refuse a port that this user cannot open. Raises UserError."""
    kind = socket.SOCK_STREAM if port.protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as tried:
        if kind == socket.SOCK_STREAM:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((port.address, port.host))
        except OSError as error:
            raise _cannot_listen(port) from error


def _cannot_listen(port: Port) -> UserError:
    return UserError(
        f"-p: port {port.host}/{port.protocol} at {port.address} cannot be opened on the host: it is in use, "
        "or not this user's to open; choose another one."
    )
