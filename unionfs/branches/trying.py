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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from unionfs.branches.attaching import attach
from unionfs.branches.covered import Below
from unionfs.branches.parts import clear, prepare
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
    """Paths that the command may change for good."""


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
        record = branch.record()
        self._around = Surroundings(
            record.base, branch.store.root, wish.hide, wish.writable, is_nested=record.parent is not None
        )
        self._workdir = self._around.start(wish.here)
        self._merged: dict[str, str] = {}
        self._confinement = settle_confinement((), (), (), privileged=False)

    def run(self) -> int:
        branch, base = self._branch, self._around.base
        for sentence in _sentences(self._around.below):
            self._complain(sentence)
        parts = prepare(branch, self._around.below)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        mounted = {base: branch, **parts}
        self._merged = {path: one.merged for path, one in mounted.items()}
        try:
            attach([branch, *parts.values()])
            hold_signals()
            self._check()
            branch.save(branch.record().started(tuple(self._wish.command)))
            code = self._waited(self._started())
            branch.save(branch.record().finished(code, time.time_ns()))
            return code
        finally:
            for merged in self._merged.values():
                self._end(merged)
            clear(branch)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _waited(self, command: Command) -> int:
        """Run the command, which is killed with this process. Returns its exit code."""

        watcher = guardian.start(lambda _: command.clear())
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
        except UserError:
            # A copy of the mount in another namespace keeps it busy, which the user need not end.
            try:
                umount(merged, lazy=True)
            except UserError as error:
                self._complain(str(error))

    def _check(self) -> None:
        """Refuse a missing directory or command before anything is started. Raises UserError."""
        place = self._around.inside(self._workdir)
        way = RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
        with ExitStack() as stack:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            roots = {
                path: stack.enter_context(Owned(os.open(merged, flags)))
                for path, merged in self._merged.items()
            }
            self._around.check(roots)
            if place is not None:
                # A former command may have put a symlink there, which would be followed outside.
                with on_failure(
                    f"the directory {quoted(self._workdir)} cannot be used in branch "
                    f"{quoted(self._branch.name)}", "start from another one",
                ):  # fmt: skip
                    name = os.fsencode(place[1] or ".")
                    os.close(openat2(roots[place[0]], name, os.O_PATH | os.O_DIRECTORY, way))
            _find_command(self._wish.command[0], self._workdir, self._merged, self._around)

    def _started(self) -> Command:
        confinement = self._confinement
        with ExitStack() as stack:
            data = [bubblewrap.environment_arguments(dict(os.environ))]
            data += [] if confinement.filter is None else [confinement.filter]
            fds = [stack.enter_context(Owned(bubblewrap.in_memory(part))) for part in data]
            return Command(
                lambda info, _: Call(
                    "bubblewrap", self._program,
                    [self._program, "--info-fd", str(info), *self._arguments(fds)], [info, *fds],
                ),
                bounding=confinement.capabilities,
                small_root=None,
            )

    def _arguments(self, fds: Sequence[int]) -> list[str]:
        words = self._around.arguments(self._merged)
        words += ["--unshare-pid", "--unshare-ipc", "--unshare-cgroup-try"]
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


def _sentences(below: Sequence[Below]) -> list[str]:
    """What a command may do with the filesystems below the base."""
    found: dict[str, list[str]] = {}
    for one in below:
        found.setdefault(one.obstacle or "", []).append(quoted(one.path))
    result = []
    for obstacle, paths in sorted(found.items()):
        text, are = ", ".join(paths), "is" if len(paths) == 1 else "are"
        if obstacle:
            result.append(f"{text} below the base {are} read-only here: {obstacle}.")
        else:
            result.append(f"{text} below the base {are} covered by the branch, too.")
    return result


def _find_command(name: str, workdir: str, merged: Mapping[str, str], around: Surroundings) -> None:
    """Raise CommandError for a command that is not found in the branch or its surroundings, or cannot be
    executed."""
    directories = [workdir] if "/" in name else os.environ.get("PATH", bubblewrap.PATH).split(":")
    found = False
    for place in directories:
        path = os.path.normpath(os.path.join(workdir, place, name))
        if around.hides(path):
            continue
        inside = around.inside(path)
        where = path if inside is None else os.path.join(merged[inside[0]], inside[1])
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
