"""`unionfs run`: mounts a root filesystem by a storage driver, runs a command in it, and ends both."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial

from unionfs.containers import entrance as entrances
from unionfs.containers import network as networks
from unionfs.containers import oci, state
from unionfs.containers.bubblewrap import Bubblewrap
from unionfs.containers.confinement import settle_confinement
from unionfs.containers.description import Description
from unionfs.containers.driving import choose_driver
from unionfs.containers.entrance import Entrance
from unionfs.containers.inside import Inside, prepare_inside, refuse_kernel_trees
from unionfs.containers.network import Network, Slirp4netns
from unionfs.containers.process import Command, hold_signals, wait_for_end
from unionfs.containers.runtimes import choose_runtime
from unionfs.containers.state import State
from unionfs.containers.store import Container, new_name
from unionfs.daemon.preflight import check_lower
from unionfs.daemon.settle import absolute
from unionfs.errors import UserError, on_failure, quoted
from unionfs.images.drivers import Mounted, Wanted, Writable, open_driver
from unionfs.settings.ports import Port
from unionfs.settings.restart import Policy, Restarts
from unionfs.settings.runtime import AUTO
from unionfs.settings.specs import Spec, VolumeSpec
from unionfs.storage.root import storage_root
from unionfs.storage.volumes import Volumes
from unionfs.sys import guardian
from unionfs.sys.calls import os_error
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability
from unionfs.sys.child import run_child
from unionfs.sys.fds import Owned
from unionfs.sys.process import start_time

_LONGEST_HOSTNAME = 64  # HOST_NAME_MAX


@dataclass(frozen=True, slots=True)
class Wish:
    """The options of `unionfs run`."""

    command: Sequence[str]
    lowers: Sequence[str] = ()
    image: str | None = None
    """The id of the image that has the lowers."""
    upper: str | None = None
    work: str | None = None
    storage: Sequence[Spec] = ()
    root: str | None = None
    name: str | None = None
    remove: bool = False
    workdir: str = "/"
    user: str | None = None
    """USER[:GROUP], as in the container; None: root, or the ordinary user."""
    environment: Mapping[str, str] = field(default_factory=dict)
    hostname: str | None = None
    own_network: bool = False
    """Whether it has no network but loopback."""
    ports: Sequence[Port] = ()
    """Published ports; with these it has its own network, connected to the host's."""
    cap_add: Sequence[str] = ()
    cap_drop: Sequence[str] = ()
    security: Sequence[str] = ()
    privileged: bool = False
    read_only: bool = False
    """Whether the command may write only to its storage."""
    detached: bool = False
    """Whether the container keeps the command's output."""
    restart: Policy = field(default_factory=Policy)
    """Of a detached container."""
    driver: str | None = None
    """The storage driver; None: that of a kept container, else the configuration's."""
    runtime: str = AUTO
    """What makes the container, of settings.runtime.RUNTIMES."""


def run(wish: Wish, complain: Callable[[str], object], started: Callable[[], object] = lambda: None) -> int:
    """Run a command in a union and return its exit code. Raises UserError if it cannot be started; then a new
    container is removed again.

    `complain` gets a sentence for each error after the command has ended. `started` is called when the
    command has started.
    """
    _check(wish)
    return _Run(wish, complain, started).run()


def _check(wish: Wish) -> None:
    if wish.restart.word != "no" and (wish.remove or not wish.detached):
        what = f"--restart {wish.restart}"
        if wish.remove:
            raise UserError(f"{what} conflicts with --rm, which leaves nothing to start; omit one of them.")
        raise UserError(f"{what} is only for containers in the background; add -d, or leave it out.")
    if "" in wish.lowers or wish.upper == "" or wish.work == "":
        raise UserError("an empty path is given; name a directory.")
    if wish.work is not None and wish.upper is None:
        raise UserError(
            f"--work {quoted(wish.work)} belongs to an upper of your own (-u DIR), and none is given; leave "
            "it out. The working directory inside is -w DIR."
        )
    if wish.read_only and wish.storage and not has_capability(CAP_SYS_ADMIN):
        raise UserError(
            "--read-only with storage needs root: without it, the union's daemon serves both; leave one of "
            "the two out."
        )
    if not wish.workdir.startswith("/"):
        raise UserError(f"--workdir {quoted(wish.workdir)} is a relative path; give an absolute one.")
    first = os.fsencode(os.path.normpath(wish.workdir)).strip(b"/").split(b"/")[0]
    refuse_kernel_trees(wish.workdir, first)
    hostname = wish.hostname
    if hostname is not None and not 0 < len(os.fsencode(hostname)) <= _LONGEST_HOSTNAME:
        raise UserError(
            f"--hostname {quoted(hostname)}: a host name has 1 to {_LONGEST_HOSTNAME} characters; shorten it."
        )


class _Run:
    def __init__(
        self, wish: Wish, complain: Callable[[str], object], started: Callable[[], object]
    ) -> None:
        self._wish = wish
        self._complain = complain
        self._report_start = started
        self._runtime = choose_runtime(wish.runtime)
        self._confinement = settle_confinement(
            wish.cap_add, wish.cap_drop, wish.security, privileged=wish.privileged
        )
        self._connector = networks.choose() if wish.ports else None
        if isinstance(self._connector, Slirp4netns) and os.geteuid() != 0 and not self._is_bubblewrap:
            raise UserError(
                f"-p of an ordinary user's container of {self._runtime.title} needs pasta, and only "
                "slirp4netns is installed, whose sandbox needs uid 0; install the package passt, or "
                "bubblewrap."
            )
        self._network: Network | None = None
        self._container = Container(storage_root(wish.root), wish.name or new_name())
        driver = choose_driver(wish.driver, wish.upper, self._container)
        self._driver = open_driver(driver, self._container.root)

    @property
    def _is_bubblewrap(self) -> bool:
        return isinstance(self._runtime, Bubblewrap)

    def run(self) -> int:
        wish, container = self._wish, self._container
        if wish.ports and self._connector is None:
            self._complain(
                "-p needs pasta or slirp4netns, and neither is installed: the command has the host's network "
                "and its own port numbers; install the package passt or slirp4netns."
            )
        new = not container.exists()
        if not new and wish.remove:
            raise UserError(
                f"container {quoted(container.name)} already exists, and --rm would remove its files; omit "
                "--rm, or choose another name."
            )
        if new and not wish.lowers:
            missing = "" if wish.name is None else f"there is no container {quoted(container.name)} yet, and "
            raise UserError(
                f"{missing}no lower is given; add -l DIR for each one, topmost first, or --image IMAGE."
            )
        self._driver.check()
        keep = not new
        with container.claimed(make=True, ends=lambda: state.has_ended(container)):
            try:
                layer = Writable(container.path, container.root, self._lowers())
                container.make(layer, self._driver if wish.upper is None else None, image=wish.image)
                code = self._mounted(layer)
                # If the caller names an upper, the container has nothing to keep.
                keep = keep or not (wish.remove or wish.upper is not None)
            finally:
                if not keep:
                    self._try(container.remove)
        return code

    def _try(self, action: Callable[[], object]) -> bool:
        """Do it, and report an error. Returns whether it succeeded."""
        try:
            action()
        except UserError as error:
            self._complain(str(error))
            return False
        return True

    def _lowers(self) -> tuple[str, ...]:
        """Return the lowers of the options, or those of an existing container."""
        given = tuple(absolute(path) for path in self._wish.lowers)
        known = self._container.lowers()
        if given and known and given != known:
            shown = ", ".join(quoted(path) for path in known)
            raise UserError(
                f"container {quoted(self._container.name)} was created with other lowers ({shown}), and its "
                "changes fit only these; omit -l, or choose another name."
            )
        for path in given or known:
            check_lower(path)
        return given or known

    def _mounted(self, layer: Writable) -> int:
        wish, container = self._wish, self._container
        if wish.detached:
            with Owned(state.open_output(container)) as output:
                os.dup2(output, 1)
                os.dup2(output, 2)
        storage = container.with_its_volumes(wish.storage)
        # Changes that will be removed need not reach a disk.
        wanted = Wanted(storage, volatile=wish.remove, upper=wish.upper, work=wish.work)
        mounted = self._driver.mount(layer, wanted)
        # From here on signals wait until the command can receive them.
        hold_signals()
        try:
            return self._in_root(mounted)
        finally:
            if mounted.is_alive():
                self._try(mounted.unmount)
            if wish.remove:
                self._remove_anonymous(mounted.storage)

    def _remove_anonymous(self, storage: Sequence[Spec]) -> None:
        """Remove anonymous volumes like `docker run --rm`: nobody else knows their names."""
        volumes = Volumes(self._container.root)
        for spec in storage:
            if isinstance(spec, VolumeSpec) and spec.anonymous and spec.name is not None:
                self._try(partial(volumes.remove, spec.name, missing_ok=True))

    def _in_root(self, mounted: Mounted) -> int:
        """Run the command, again as `--restart` says; return its last exit code."""
        state.clear_killed(self._container)
        restarts = Restarts(self._wish.restart)
        while True:
            begun = time.monotonic()
            last, told_to_end = self._once(mounted, restarts)
            code = last.code or 0
            pause = restarts.pause(code, time.monotonic() - begun)
            if pause is None or told_to_end or state.is_killed(self._container):
                return code
            state.write(self._container, state.restarting(last, restarts.count))
            if wait_for_end(pause) or not mounted.is_alive():
                state.write(self._container, last)
                return code

    def _once(self, mounted: Mounted, restarts: Restarts) -> tuple[State, bool]:
        """Run the command; return the last state, and whether this process was told to end."""
        inside = self._prepared(mounted.path)
        command = self._started(mounted, inside)
        self._record_entrance(command, inside)
        me = os.getpid()
        ports = () if self._network is None else tuple(map(str, self._wish.ports))
        begun = State(
            tuple(self._wish.command), me, start_time(me) or 0, time.time(), command.top, ports=ports,
            policy=str(restarts.policy), restarts=restarts.count,
        )  # fmt: skip
        state.write(self._container, begun)
        if not restarts.count:
            self._report_start()
        elif state.is_killed(self._container):  # while it was started
            command.kill()

        def clear(_: str) -> None:
            """Clean up after this process was killed."""
            command.clear()
            entrances.remove(self._container)
            mounted.abandon()
            if self._wish.remove:
                self._complain = lambda sentence: None
                self._remove_anonymous(mounted.storage)
                with suppress(UserError), self._container.claimed(make=False):
                    self._container.remove()

        watcher = guardian.start(clear)
        try:
            code = command.wait()
        finally:
            watcher.dismiss()
            if self._network is not None:
                self._network.end()
                self._network = None
            entrances.remove(self._container)
        last = state.ended(begun, code)
        state.write(self._container, last)
        if not command.made:
            raise UserError(
                f"{self._runtime.title} could not create the container (exit code {code}); see its own "
                "message, and `unionfs doctor` for what this host lacks."
            )
        return last, command.told_to_end

    def _record_entrance(self, command: Command, inside: Inside) -> None:
        """Let `unionfs exec` find the container."""
        init = command.init  # asked once: the container may end at any moment
        if init is None:
            return
        confinement = self._confinement
        record = Entrance(
            *init, inside.root, inside.environment, inside.workdir, inside.account,
            () if inside.account else tuple(confinement.capabilities), confinement.filter,
        )  # fmt: skip
        self._try(lambda: entrances.write(self._container, record))

    def _prepared(self, merged: str) -> Inside:
        wish = self._wish
        hostname = wish.hostname or self._container.name[:_LONGEST_HOSTNAME]
        return prepare_inside(
            merged, wish.command[0], user=wish.user, workdir=wish.workdir, hostname=hostname,
            given=wish.environment, privileged=wish.privileged,
        )  # fmt: skip

    def _started(self, mounted: Mounted, inside: Inside) -> Command:
        """The command, started in the mounted root."""
        wish, confinement, merged = self._wish, self._confinement, mounted.path
        os.umask(0o022)
        connector, runtime = self._connector, self._runtime
        lines = None if connector is None else f"nameserver {connector.nameserver}\n".encode()
        container = Description(
            merged, wish.command, inside.workdir, inside.hostname, inside.environment, mounted.storage,
            confinement, wish.own_network or connector is not None, inside.account, wish.read_only, lines,
        )  # fmt: skip
        small = not self._is_bubblewrap or _wants_small_root(container)
        guarded = not self._is_bubblewrap and container.by_root and not confinement.privileged
        with ExitStack() as held:
            return Command(
                lambda info, block: runtime.call(container, held, info, block),
                bounding=confinement.capabilities,
                small_root=merged if small else None,
                account=inside.account,
                connect=None if connector is None and not guarded else partial(self._finish, guarded),
            )

    def _finish(self, guarded: bool, init: int) -> None:
        """Finish a container that has been made. Raises UserError."""
        if guarded:
            with on_failure("the container's root cannot be protected", "use --runtime bubblewrap"):
                if error := run_child(partial(oci.finish, init), None):
                    raise os_error(error)
        if self._connector is not None:
            self._network = Network(self._connector, init, self._wish.ports)


def _wants_small_root(container: Description) -> bool:
    """Return whether bubblewrap starts in a small tree: if not privileged, for root or a workdir on storage.

    Others may swap a workdir below storage. An ordinary user needs one more user namespace.
    """
    if container.confinement.privileged:
        return False
    return os.geteuid() == 0 or any(
        container.workdir.startswith(f"{spec.target}/") for spec in container.storage
    )
