"""`unionfs run`: mounts a union, runs a command in it, and ends both."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial

from unionfs.containers import entrance as entrances
from unionfs.containers import network as networks
from unionfs.containers import oci, state
from unionfs.containers.bubblewrap import Bubblewrap
from unionfs.containers.confinement import settle_confinement
from unionfs.containers.description import Description
from unionfs.containers.entrance import Entrance
from unionfs.containers.inside import Inside, prepare_inside, refuse_kernel_trees
from unionfs.containers.network import Network, Slirp4netns
from unionfs.containers.process import Command, hold_signals, wait_for_end
from unionfs.containers.runtimes import choose_runtime
from unionfs.containers.state import State
from unionfs.containers.store import Container, new_name
from unionfs.daemon import live
from unionfs.daemon.preflight import check_lower
from unionfs.daemon.process import mount
from unionfs.daemon.settle import absolute, settle
from unionfs.daemon.unmount import umount
from unionfs.errors import UserError, on_failure, quoted
from unionfs.settings.mount import MountSettings
from unionfs.settings.ports import Port
from unionfs.settings.restart import Policy, Restarts
from unionfs.settings.runtime import AUTO
from unionfs.settings.specs import Spec, VolumeSpec
from unionfs.storage.root import storage_root
from unionfs.storage.volumes import Volumes
from unionfs.sys import guardian
from unionfs.sys.calls import os_error
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability, may_use_trusted_xattrs
from unionfs.sys.child import run_child
from unionfs.sys.fds import Owned
from unionfs.sys.process import start_time, wait_gone
from unionfs.union.hiding import hide, parts_below

_LONGEST_HOSTNAME = 64  # HOST_NAME_MAX
_END_SECONDS = 20.0


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
        cause = "with --rm nothing is left to start" if wish.remove else "it is for containers of -d"
        raise UserError(f"--restart {wish.restart} is refused: {cause}; leave it out.")
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
        keep = not new
        with container.claimed(make=True, ends=lambda: state.has_ended(container)):
            try:
                lowers = self._lowers()
                container.make(lowers, layers=wish.upper is None, image=wish.image)
                code = self._mounted(lowers)
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

    def _mounted(self, lowers: Sequence[str]) -> int:
        wish, container = self._wish, self._container
        own_upper = wish.upper is None
        if wish.detached:
            with Owned(state.open_output(container)) as output:
                os.dup2(output, 1)
                os.dup2(output, 2)
        if own_upper:
            self._hide_storage(lowers)
        settings = settle(
            container.merged,
            lowers=lowers,
            upper=container.upper if own_upper else wish.upper,
            work=container.work if own_upper else wish.work,
            # Changes that will be removed need not reach a disk.
            options=["volatile"] if own_upper and wish.remove else [],
            storage=container.with_its_volumes(wish.storage),
            storage_root=wish.root,
        )
        me = os.getpid()
        mount(replace(settings, lives_with=(me, start_time(me) or 0)))
        # From here on signals wait until the command can receive them.
        hold_signals()
        merged, entry = settings.mountpoint, None
        try:
            entry = next((entry for entry in live.entries() if entry.settings.mountpoint == merged), None)
            if entry is None:
                raise UserError(f"{quoted(merged)} was unmounted before the command could start; try again.")
            return self._in_union(entry)
        finally:
            if entry is not None and entry.is_alive():
                self._end_mount(merged)
            if wish.remove and entry is not None:
                self._remove_anonymous(entry.settings)

    def _hide_storage(self, lowers: Sequence[str]) -> None:
        """Let the union not see the storage root, where the container's upper is, if a lower has it."""
        root = os.path.realpath(storage_root(self._wish.root))
        for lower in lowers:
            parts = parts_below(lower, root)
            if parts is not None and os.path.isdir(lower):
                with on_failure(
                    f"{quoted(root)} cannot be hidden from the container, whose lower {quoted(lower)} has it",
                    "give a --root elsewhere, or -u tmpfs",
                ):
                    hide(self._container.upper, lower, parts, userxattr=not may_use_trusted_xattrs())

    def _end_mount(self, merged: str) -> None:
        """Unmount the union. With the container ends whatever else holds it, such as a mount namespace that
        was copied meanwhile: the next run needs the upper.
        """
        try:
            umount(merged)
        except UserError:
            self._try(lambda: umount(merged, force=True))

    def _remove_anonymous(self, settings: MountSettings) -> None:
        """Remove anonymous volumes like `docker run --rm`: nobody else knows their names."""
        volumes = Volumes(settings.storage_root)
        for spec in settings.storage:
            if isinstance(spec, VolumeSpec) and spec.anonymous and spec.name is not None:
                self._try(partial(volumes.remove, spec.name, missing_ok=True))

    def _in_union(self, entry: live.LiveMount) -> int:
        """Run the command, again as `--restart` says; return its last exit code."""
        state.clear_killed(self._container)
        restarts = Restarts(self._wish.restart)
        while True:
            begun = time.monotonic()
            last, told_to_end = self._once(entry, restarts)
            code = last.code or 0
            pause = restarts.pause(code, time.monotonic() - begun)
            if pause is None or told_to_end or state.is_killed(self._container):
                return code
            state.write(self._container, state.restarting(last, restarts.count))
            if wait_for_end(pause) or not entry.is_alive():
                state.write(self._container, last)
                return code

    def _once(self, entry: live.LiveMount, restarts: Restarts) -> tuple[State, bool]:
        """Run the command; return the last state, and whether this process was told to end."""
        inside = self._prepared(entry.settings.mountpoint)
        command = self._started(entry, inside)
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
            """Clean up after this process was killed; the daemon, which ends with it, unmounts the union."""
            command.kill()
            if command.terminal is not None:
                command.terminal.restore_from_outside()
            entrances.remove(self._container)
            wait_gone(entry.pid, entry.started, _END_SECONDS)
            if self._wish.remove:
                self._complain = lambda sentence: None
                self._remove_anonymous(entry.settings)
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
        if command.init is None:
            return
        confinement = self._confinement
        record = Entrance(
            *command.init, inside.root, inside.environment, inside.workdir, inside.account,
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

    def _started(self, entry: live.LiveMount, inside: Inside) -> Command:
        """The command, started in the union."""
        wish, confinement, merged = self._wish, self._confinement, entry.settings.mountpoint
        os.umask(0o022)
        connector, runtime = self._connector, self._runtime
        lines = None if connector is None else f"nameserver {connector.nameserver}\n".encode()
        container = Description(
            merged, wish.command, inside.workdir, inside.hostname, inside.environment, entry.settings.storage,
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
