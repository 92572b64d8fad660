"""`unionfs run`: mounts a union, runs a command in it, and ends both."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial

from unionfs.containers import bubblewrap, state
from unionfs.containers.account import Account, find_account
from unionfs.containers.bubblewrap import Confinement
from unionfs.containers.confinement import settle_confinement
from unionfs.containers.process import Command, CommandError, hold_signals
from unionfs.containers.state import State
from unionfs.containers.store import Container, new_name
from unionfs.daemon import live
from unionfs.daemon.preflight import check_lower
from unionfs.daemon.process import mount
from unionfs.daemon.settle import absolute, settle
from unionfs.daemon.unmount import umount
from unionfs.errors import UserError, on_failure, quoted, reason
from unionfs.settings.mount import MountSettings
from unionfs.settings.specs import Spec, VolumeSpec
from unionfs.storage.root import storage_root
from unionfs.storage.targets import MountedTree, find, prepare
from unionfs.storage.volumes import Volumes
from unionfs.sys import guardian
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability, may_use_trusted_xattrs
from unionfs.sys.fds import Owned
from unionfs.sys.openat2 import open_in_root
from unionfs.sys.process import start_time, wait_gone
from unionfs.union.hiding import hide, parts_below

_NOT_FOUND = 127
_NOT_EXECUTABLE = 126
_INTERPRETER_LINE = 256  # BINPRM_BUF_SIZE, linux/binfmts.h
_LONGEST_HOSTNAME = 64  # HOST_NAME_MAX
_END_SECONDS = 20.0
_KERNEL_TREES = (b"proc", b"dev", b"sys")


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
    cap_add: Sequence[str] = ()
    cap_drop: Sequence[str] = ()
    security: Sequence[str] = ()
    privileged: bool = False
    read_only: bool = False
    """Whether the command may write only to its storage."""
    detached: bool = False
    """Whether the container keeps the command's output."""


def run(wish: Wish, complain: Callable[[str], object], started: Callable[[], object] = lambda: None) -> int:
    """Run a command in a union and return its exit code. Raises UserError if it cannot be started; then a new
    container is removed again.

    `complain` gets a sentence for each error after the command has ended. `started` is called when the
    command has started.
    """
    _check(wish)
    return _Run(wish, complain, started).run()


def _check(wish: Wish) -> None:
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
    _refuse_kernel_trees(wish.workdir, os.fsencode(os.path.normpath(wish.workdir)).strip(b"/").split(b"/")[0])
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
        self._program = bubblewrap.find()
        self._confinement = settle_confinement(
            wish.cap_add, wish.cap_drop, wish.security, privileged=wish.privileged
        )
        self._container = Container(storage_root(wish.root), wish.name or new_name())

    def run(self) -> int:
        wish, container = self._wish, self._container
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
        with container.claimed(make=True):
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
        command = self._started(entry)
        me = os.getpid()
        begun = State(tuple(self._wish.command), me, start_time(me) or 0, time.time(), command.top)
        state.write(self._container, begun)
        self._report_start()

        def clear(_: str) -> None:
            """Clean up after this process was killed; the daemon, which ends with it, unmounts the union."""
            command.kill()
            if command.terminal is not None:
                command.terminal.restore_from_outside()
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
        state.write(self._container, state.ended(begun, code))
        if not command.made:
            raise UserError(
                f"bubblewrap could not create the container (exit code {code}); see its own message, and "
                "`unionfs doctor` for what this host lacks."
            )
        return code

    def _started(self, entry: live.LiveMount) -> Command:
        """The command, started in the union."""
        wish, confinement, merged = self._wish, self._confinement, entry.settings.mountpoint
        hostname = wish.hostname or self._container.name[:_LONGEST_HOSTNAME]
        with Owned(os.open(merged, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
            _check_mountpoints(root)
            account = _account(root, wish)
            home = None if account is None else account.home
            environment = bubblewrap.environment(wish.environment, hostname, home)
            workdir = _workdir(MountedTree(root), wish.workdir)
            if account is not None and os.geteuid() == 0:
                # bubblewrap makes what is missing, but not as another user.
                for name in ("dev", "proc", "sys"):
                    prepare(MountedTree(root), f"/{name}", "--user", directory=True)
            _find_command(root, wish.command[0], workdir, environment["PATH"])
        os.umask(0o022)
        small = _wants_small_root(confinement, workdir, entry.settings.storage)
        with ExitStack() as stack:
            data = [bubblewrap.environment_arguments(environment)]
            data += [] if confinement.filter is None else [confinement.filter]
            fds = [stack.enter_context(Owned(bubblewrap.in_memory(part))) for part in data]
            return Command(
                self._program,
                bubblewrap.arguments(
                    merged,
                    wish.command,
                    workdir=workdir,
                    hostname=hostname,
                    own_network=wish.own_network,
                    storage=entry.settings.storage,
                    confinement=confinement,
                    environment_fd=fds[0],
                    filter_fd=None if len(fds) == 1 else fds[1],
                    account=account,
                    read_only=wish.read_only,
                ),
                keep=fds,
                bounding=confinement.capabilities,
                small_root=merged if small else None,
                account=account,
            )


def _account(root: int, wish: Wish) -> Account | None:
    """Return whom the command runs as, or None for this user. Raises UserError."""
    if wish.user is None:
        return None
    account = find_account(root, wish.user)
    if (account.uid, account.gid) == (os.geteuid(), os.getegid()) or (os.geteuid() == 0 == account.uid):
        return None
    if wish.privileged:
        raise UserError(
            f"--privileged is for root, and the command would run as {quoted(wish.user)}; add --user root, "
            "or leave --privileged out."
        )
    return account


def _check_mountpoints(root: int) -> None:
    """Refuse a union in which the kernel's filesystems would be mounted elsewhere. Raises UserError.

    bubblewrap follows symlinks there, including those to the host's tree while it still sees that.
    """
    for name in ("dev", "proc", "sys"):
        try:
            kind = stat.S_IFMT(os.stat(name, dir_fd=root, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            continue
        if kind != stat.S_IFDIR:
            raise UserError(
                f"/{name} in the union is not a directory, so nothing can be mounted there; remove it from "
                "the layers."
            )


def _wants_small_root(confinement: Confinement, workdir: str, storage: Sequence[Spec]) -> bool:
    """Return whether bubblewrap starts in a small tree: if not privileged, for root or a workdir on storage.

    Others may swap a workdir below storage. An ordinary user needs one more user namespace.
    """
    if confinement.privileged:
        return False
    return os.geteuid() == 0 or any(workdir.startswith(f"{spec.target}/") for spec in storage)


def _refuse_kernel_trees(given: str, first: bytes) -> None:
    if first in _KERNEL_TREES:
        raise UserError(
            f"--workdir {quoted(given)} leads into /proc, /dev, or /sys, from where it could leave the "
            "container; choose another directory."
        )


def _workdir(tree: MountedTree, given: str) -> str:
    """The command's working directory, normalized as in Docker; created if missing. Raises UserError."""
    clean = "/" + os.path.normpath(given).strip("/")
    with on_failure(f"--workdir {quoted(given)} cannot be used", "choose another directory"):
        names, missing = find(tree, clean)
        if not names and not missing:
            return "/"
        _refuse_kernel_trees(given, (names + missing)[0])
        if not missing and tree.kind(names) != stat.S_IFDIR:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return prepare(tree, clean, "--workdir", directory=True).path


def _find_command(root: int, name: str, workdir: str, search: str) -> None:
    """Refuse a command that cannot be started, with its exit code, before starting. Raises CommandError."""
    directories = [workdir] if "/" in name else [part or "." for part in search.split(":")]
    found = False
    for directory in directories:
        path = os.path.join(workdir, directory, name)
        try:
            opened = Owned(open_in_root(root, os.fsencode(path)))
        except OSError:
            continue
        with opened as fd:
            mode = os.stat(fd).st_mode
            found = found or not stat.S_ISDIR(mode) or "/" in name
            if stat.S_ISREG(mode) and mode & 0o111:
                _check_interpreter(root, fd, name, workdir)
                return
    if found:
        raise CommandError(
            f"{quoted(name)} in the union is not executable; check its mode.", _NOT_EXECUTABLE
        )
    where = "" if "/" in name else f" in {search}"
    raise CommandError(
        f"{quoted(name)} does not exist in the union{where}; check the name and the lowers.", _NOT_FOUND
    )


def _check_interpreter(root: int, fd: int, name: str, workdir: str) -> None:
    """Refuse a script whose interpreter is missing, for which execve(2) fails with ENOENT."""
    try:
        with open(f"/proc/self/fd/{fd}", "rb") as script:
            first = script.read(_INTERPRETER_LINE).partition(b"\n")[0]
    except OSError:
        return  # not readable even for root: let the kernel decide
    if not first.startswith(b"#!"):
        return
    words = first[2:].split(maxsplit=1)
    if not words:
        return
    try:
        os.close(open_in_root(root, os.path.join(os.fsencode(workdir), words[0])))
    except OSError as error:
        interpreter = quoted(os.fsdecode(words[0]))
        raise CommandError(
            f"{quoted(name)} is a script for {interpreter}, which cannot be found in the union: "
            f"{reason(error)}; check its first line and the lowers.",
            _NOT_FOUND,
        ) from error
