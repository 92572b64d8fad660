"""Daemons of mounts, and workers, forked from a process that has imported their modules.

Starting an interpreter and importing trio, pyfuse3 and the package costs more than most tests of a mount do.
A forked daemon runs the same `main`; only the imports happen before the fork. The tests of the command
line start real processes.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import TimeoutExpired

from unionfs.core.steps import NotPlain, set_hook
from unionfs.union.shortcuts import NO_SHORTCUTS
from unionfs.union.tree import Union

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["unionfs.cli.main", "unionfs.cli.mount", "unionfs.daemon.service", "unionfs.fuse.session_direct",
     "unionfs.fuse.session_pyfuse3", "pytest", "tests.support.snapshot", "tests.support.actions",
     "tests.support.worker", __name__],
)  # fmt: skip


@dataclass(frozen=True)
class Surroundings:
    """What a child of this process would have inherited."""

    environment: dict[str, str]
    umask: int
    files: tuple[int, int]

    @staticmethod
    def here() -> Surroundings:
        umask = os.umask(0)
        os.umask(umask)
        return Surroundings(dict(os.environ), umask, resource.getrlimit(resource.RLIMIT_NOFILE))

    def take(self) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        os.umask(self.umask)
        resource.setrlimit(resource.RLIMIT_NOFILE, self.files)


def _run(
    arguments: Sequence[str],
    log: Path,
    directory: Path,
    surroundings: Surroundings,
    plain: bool,
    steps: bool,
    stopped: bool,
    modules: Sequence[str],
) -> None:
    surroundings.take()
    os.chdir(directory)
    os.setsid()
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    faulthandler.enable()
    sys.argv = ["unionfs", *arguments]
    from unionfs.cli.main import main

    if plain:
        take_no_shortcuts()
    if steps:
        set_hook(_not_plain)
    for name in modules:
        importlib.import_module(name)
    if stopped:
        os.kill(os.getpid(), signal.SIGSTOP)
    main()


def take_no_shortcuts() -> None:
    """From now on unions of this process, and of its children, take none of the `Shortcuts`."""
    defaults = Union.__init__.__kwdefaults__
    assert "shortcuts" in defaults
    defaults["shortcuts"] = NO_SHORTCUTS


def _not_plain(step: str) -> None:
    if step != "set":  # a change of attributes in place has no other steps
        raise NotPlain


class PreparedProcess:
    """``unionfs ARGUMENT...`` as a process, with the part of subprocess.Popen that the tests use."""

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        directory: Path,
        *,
        plain: bool = False,
        steps: bool = False,
        stopped: bool = False,
        modules: Sequence[str] = (),
    ) -> None:
        """Start it; stdin is /dev/null, stdout and stderr are appended to ``log``.

        ``plain``: its unions take none of the `Shortcuts`. ``steps``: they make no bundles of system calls.
        ``stopped``: it stops (SIGSTOP) before it runs. ``modules``: it imports them before that.
        """
        self._process: ForkServerProcess = CONTEXT.Process(
            target=_run,
            args=(list(arguments), log, directory, Surroundings.here(), plain, steps, stopped, modules),
            daemon=True,
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, or minus the number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the process to end. Raises subprocess.TimeoutExpired after ``timeout`` seconds."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise TimeoutExpired("unionfs", timeout or 0)
        return code
