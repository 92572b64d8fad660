"""Runs a command on a branch, which lies over its base at the base's own path.

The command sees the host's tree read-only, but for the branch and private /tmp, /var/tmp, /dev and /proc:
what it changes is in the branch or nowhere. Capabilities and the system call filter are those of `unionfs
run`.
"""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from unionfs.branches.attaching import attach
from unionfs.branches.store import Branch, Store
from unionfs.branches.surroundings import Surroundings
from unionfs.containers import bubblewrap
from unionfs.containers.call import Call
from unionfs.containers.confinement import settle_confinement
from unionfs.containers.process import Command, CommandError, hold_signals
from unionfs.daemon.unmount import umount
from unionfs.errors import UserError, on_failure, quoted
from unionfs.sys import guardian
from unionfs.sys.calls import syncfs
from unionfs.sys.fds import Owned, directory
from unionfs.sys.mountinfo import mounted_at
from unionfs.sys.openat2 import RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2

_NOT_FOUND = 127
_NOT_EXECUTABLE = 126


@dataclass(frozen=True, slots=True)
class Wish:
    """The options of `unionfs try`."""

    command: Sequence[str]
    here: str
    """The working directory of the command, absolute, if it is in the base; else the base is taken."""
    own_network: bool = False
    hide: Sequence[str] = ()
    """Paths that are empty for the command."""
    writable: Sequence[str] = ()
    """Paths outside the base that the command may change for good."""


def try_on(store: Store, branch: Branch, wish: Wish, complain: Callable[[str], object]) -> int:
    """Run a command on a branch, and return its exit code: as for `unionfs run`.

    `complain` gets a sentence for each error after the command has ended. Raises UserError if it cannot be
    started.
    """
    program = bubblewrap.find()
    with branch.claimed("used"):
        return _Try(branch, wish, program, complain).run()


class _Try:
    def __init__(
        self, branch: Branch, wish: Wish, program: str, complain: Callable[[str], object]
    ) -> None:
        self._branch = branch
        self._wish = wish
        self._program = program
        self._complain = complain
        base = branch.record().base
        self._around = Surroundings(base, branch.store.root, wish.hide, wish.writable)
        self._workdir = self._around.start(wish.here)
        self._confinement = settle_confinement((), (), (), privileged=False)

    def run(self) -> int:
        branch = self._branch
        for path in self._around.below:
            self._complain(f"{quoted(path)} is another filesystem below the base; it is read-only here.")
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        merged = attach(branch)
        hold_signals()
        try:
            self._check(merged)
            branch.save(branch.record().started(tuple(self._wish.command)))
            code = self._waited(self._started(merged))
            branch.save(branch.record().finished(code, time.time_ns()))
            return code
        finally:
            self._end(merged)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _waited(self, command: Command) -> int:
        """Run the command, which is killed with this process. Returns its exit code."""

        def clear(_: str) -> None:
            command.kill()
            if command.terminal is not None:
                command.terminal.restore_from_outside()

        watcher = guardian.start(clear)
        try:
            code = command.wait()
        finally:
            watcher.dismiss()
        if not command.made:
            raise UserError(
                f"bubblewrap could not start the command (exit code {code}); see its own message, and "
                "`unionfs "
                "doctor` for what this host lacks."
            )
        return code

    def _end(self, merged: str) -> None:
        if mounted_at(merged) is None:
            return
        try:
            # A copy of the mount in another namespace would keep what is not written back.
            with suppress(OSError), directory(merged) as fd:
                syncfs(fd)
            umount(merged)
        except UserError as error:
            self._complain(str(error))
            with suppress(UserError):
                umount(merged, lazy=True)

    def _check(self, merged: str) -> None:
        """Refuse a missing directory or command before anything is started. Raises UserError."""
        inside = self._around.inside(self._workdir)
        way = RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
        with Owned(os.open(merged, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
            self._around.check(root)
            if inside is not None:
                # A former command may have put a symlink there, which would be followed outside.
                with on_failure(
                    f"the directory {quoted(self._workdir)} cannot be used in branch "
                    f"{quoted(self._branch.name)}", "start from another one",
                ):  # fmt: skip
                    os.close(openat2(root, os.fsencode(inside or "."), os.O_PATH | os.O_DIRECTORY, way))
            _find_command(self._wish.command[0], self._workdir, merged, self._around)

    def _started(self, merged: str) -> Command:
        confinement = self._confinement
        with ExitStack() as stack:
            data = [bubblewrap.environment_arguments(dict(os.environ))]
            data += [] if confinement.filter is None else [confinement.filter]
            fds = [stack.enter_context(Owned(bubblewrap.in_memory(part))) for part in data]
            return Command(
                lambda info, _: Call(
                    "bubblewrap", self._program,
                    [self._program, "--info-fd", str(info), *self._arguments(merged, fds)], [info, *fds],
                ),
                bounding=confinement.capabilities,
                small_root=None,
            )

    def _arguments(self, merged: str, fds: Sequence[int]) -> list[str]:
        words = [*self._around.arguments(merged), "--unshare-pid", "--unshare-ipc", "--unshare-cgroup-try"]
        if self._wish.own_network:
            words.append("--unshare-net")
        if os.geteuid() == 0:
            words += ["--cap-drop", "ALL"]
            for name in self._confinement.capabilities:
                words += ["--cap-add", name]
        elif self._around.is_whole:
            words += ["--unshare-user", "--uid", "0", "--gid", "0"]
        if len(fds) > 1:
            words += ["--seccomp", str(fds[1])]
        words += ["--args", str(fds[0]), "--chdir", self._workdir, "--"]
        return [*words, *self._wish.command]


def _find_command(name: str, workdir: str, merged: str, around: Surroundings) -> None:
    """Raise CommandError for a command that is not found in the branch or its surroundings, or cannot be
    executed."""
    directories = [workdir] if "/" in name else os.environ.get("PATH", bubblewrap.PATH).split(":")
    found = False
    for place in directories:
        path = os.path.normpath(os.path.join(workdir, place, name))
        if around.hides(path):
            continue
        inside = around.inside(path)
        where = path if inside is None else os.path.join(merged, inside)
        try:
            # Whether a symlink in the branch leads to something is left to the command.
            mode = os.lstat(where).st_mode if inside is not None else os.stat(where).st_mode
        except OSError:
            continue
        if stat.S_ISLNK(mode) or (stat.S_ISREG(mode) and mode & 0o111):
            return
        found = True
    if found:
        raise CommandError(f"{quoted(name)} is not executable; check its mode.", _NOT_EXECUTABLE)
    raise CommandError(f"command {quoted(name)} is not found; check its name and PATH.", _NOT_FOUND)
