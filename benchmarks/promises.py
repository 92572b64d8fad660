"""How a union, kernel overlayfs and fuse-overlayfs behave where something goes wrong.

    python -m benchmarks.promises [--contestant NAME ...]

Prints a row for each promise of docs/reliability.md that all three can be asked for, and what each did.
Requires root.
"""

from __future__ import annotations

import argparse
import errno
import mmap
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

from tests.mount.hung_calls import Server
from tests.support import areas
from unionfs.sys.mountinfo import mounted_at

_PROGRAM: Final = (sys.executable, "-m", "unionfs")
_SECONDS: Final = 5.0
_FDS: Final = 1024
_FILES: Final = 3000
_MIB: Final = 1 << 20


class Contestant:
    """Mounts lowers, an upper and a work directory."""

    def __init__(self, name: str, command: tuple[str, ...], daemon: str = "") -> None:
        """``daemon``: an expression for the command line of its daemon, if it has one."""
        self.name, self._command, self._daemon = name, command, daemon

    def mount(self, place: Path, top: Path, *lowers: Path, fds: int | None = None) -> None:
        """``fds``: how many a daemon may have. Raises OSError."""
        options = f"lowerdir={':'.join(map(str, lowers))},upperdir={place}/upper,workdir={place}/work"
        words = [word.format(options=options, top=top) for word in self._command]
        if fds is not None:
            words = ["prlimit", f"--nofile={fds}", *words]
        done = subprocess.run(words, check=False, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise OSError(errno.EIO, done.stderr)

    def daemon(self, top: Path) -> int | None:
        """The pid of the daemon of a mount."""
        if not self._daemon:
            return None
        words = ("pgrep", "-f", self._daemon.format(top=top))
        return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[0])


CONTESTANTS: Final = (
    Contestant("unionfs", (*_PROGRAM, "mount", "-o", "{options}", "{top}"), "unionfs mount .*{top}$"),
    Contestant(
        "unionfs -o outlive", (*_PROGRAM, "mount", "-o", "{options},outlive", "{top}"),
        "unionfs mount .*{top}$",
    ),
    Contestant("overlayfs", ("mount", "-t", "overlay", "overlay", "-o", "{options}", "{top}")),
    Contestant("fuse-overlayfs", ("fuse-overlayfs", "-o", "{options}", "{top}"), "^fuse-overlayfs .*{top}$"),
)


@contextmanager
def _place() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="promises-", dir="/var/tmp"))
    for name in ("lower", "upper", "work", "merged", "served", "source"):
        (place / name).mkdir()
    (place / "lower/file").write_text("lower")
    try:
        yield place
    finally:
        areas.detach(place)
        areas.remove(place)


def _in_time(call: Callable[[], object], seconds: float = _SECONDS) -> str:
    """How a call in a process of its own ends: `yes`, the error, or `hangs`."""
    pid = os.fork()
    if pid == 0:
        try:
            call()
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or 255)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return "yes" if code == 0 else errno.errorcode.get(code, str(code))
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return "hangs"


def a_killed_daemon(contestant: Contestant) -> str:
    """Open files and new ones after the daemon was killed."""
    with _place() as place:
        top = place / "merged"
        contestant.mount(place, top, place / "lower")
        daemon = contestant.daemon(top)
        if daemon is None:
            return "no daemon"
        with open(top / "file", "r+") as file:
            os.kill(daemon, signal.SIGKILL)
            old = _in_time(lambda: os.pwrite(file.fileno(), b"x", 0))
            new = _in_time((top / "new").touch)
            with suppress(OSError):
                file.close()
        return f"{old}, {new}"


def a_lower_that_hangs(contestant: Contestant) -> str:
    """While the server of a FUSE lower is stopped and one program waits for it: making and removing a file of
    the upper; reading a file of another lower; whether the program that waits can be killed."""
    with _place() as place, ExitStack() as undo:
        top = place / "merged"
        (place / "source/only").mkdir()
        (place / "lower/other").mkdir()
        for number in range(20):
            (place / f"lower/other/{number}").write_text("other")
        server = Server(place / "source", place / "served")
        undo.callback(server.end)
        contestant.mount(place, top, place / "lower", place / "served")
        (top / "other/warm").touch()
        server.stop()
        undo.callback(server.go_on)
        waiting = subprocess.Popen(["stat", top / "only/missing"], stderr=subprocess.DEVNULL)
        time.sleep(1)
        change = _in_time(partial(_make_and_remove, top / "other/new"))
        read = _in_time((top / "other/3").read_bytes)
        waiting.kill()
        try:
            waiting.wait(_SECONDS)
            killed = "yes"
        except subprocess.TimeoutExpired:
            killed = "hangs"
        return f"{change}, {read}, {killed}"


def _make_and_remove(path: Path) -> None:
    path.touch()
    path.unlink()


def many_open_files(contestant: Contestant) -> str:
    """How many files of a lower a program may have open while the daemon may have 1,024 fds, and whether
    another program can list the directory meanwhile."""
    with _place() as place:
        top = place / "merged"
        for number in range(_FILES):
            (place / f"lower/{number}").touch()
        contestant.mount(place, top, place / "lower", fds=_FDS)
        opened = []
        with suppress(OSError):
            for number in range(_FILES):
                opened.append(os.open(top / f"{number}", os.O_RDONLY))
        listed = _in_time(lambda: (os.listdir(top), os.stat(top / "file")))
        for fd in opened:
            os.close(fd)
        return f"{len(opened)} of {_FILES}, {listed}"


def a_full_disk(contestant: Contestant) -> str:
    """Writing to a file of a lower that the upper has no room for: the error, whether the file has its old
    content, and whether upper and work are empty after that."""
    with _place() as place, ExitStack() as undo:
        top = place / "merged"
        content = os.urandom(8 * _MIB)
        (place / "lower/large").write_bytes(content)
        small = place / "upper"
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small], check=True)
        undo.callback(partial(subprocess.run, ["umount", "-l", small], check=True))
        (small / "upper").mkdir()
        (small / "work").mkdir()
        contestant.mount(small, top, place / "lower")
        error = _in_time(lambda: _append(top / "large"))
        kept = "yes" if (top / "large").read_bytes() == content else "no"
        left = [*_files(small / "upper"), *_files(small / "work")]
        subprocess.run(["umount", "-l", top], check=True)
        return f"{error}, {kept}, {'yes' if not left else f'no ({len(left)} left)'}"


def _append(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"x")
    os.close(fd)


def _files(top: Path) -> list[Path]:
    return [path for path in top.rglob("*") if path.is_file()]


def an_upper_that_is_mounted_twice(contestant: Contestant) -> str:
    """Whether a second mount of one upper is refused."""
    with _place() as place:
        (place / "second").mkdir()
        contestant.mount(place, place / "merged", place / "lower")
        try:
            contestant.mount(place, place / "second", place / "lower")
        except OSError:
            return "yes"
        return "no"


def a_mapped_write(contestant: Contestant) -> str:
    """Whether stat shows the time of a store through a mapping once that is closed."""
    with _place() as place:
        top = place / "merged"
        (place / "lower/mapped").write_bytes(b"\0" * 4096)
        os.utime(place / "lower/mapped", (1, 1))
        contestant.mount(place, top, place / "lower")
        fd = os.open(top / "mapped", os.O_RDWR)
        os.utime(top / "mapped", (1, 1))
        with mmap.mmap(fd, 4096) as mapping:
            mapping[0] = 1
        os.close(fd)
        return "yes" if os.stat(top / "mapped").st_mtime > 1 else "no"


def a_killed_copy_up(contestant: Contestant) -> str:
    """The daemon is killed in the middle of a copy-up: whether the file has its old content in the next
    mount, and whether that removes the part that was copied."""
    with _place() as place:
        top = place / "merged"
        with open(place / "lower/large", "wb") as file:
            for _ in range(400):
                file.write(os.urandom(_MIB))
        contestant.mount(place, top, place / "lower")
        daemon = contestant.daemon(top)
        if daemon is None:
            return "no daemon"
        words = (sys.executable, "-c", f"open({str(top / 'large')!r}, 'r+')")
        child = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not any(path.stat().st_size for path in _files(place / "work")):
            time.sleep(0.002)
        os.kill(daemon, signal.SIGKILL)
        child.wait()
        if _in_time(partial(os.listdir, top)) != "yes":
            subprocess.run(["umount", "-l", top], check=True)
        if mounted_at(str(top)) is None:
            contestant.mount(place, top, place / "lower")
        compared = subprocess.run(
            ["cmp", place / "lower/large", top / "large"], check=False, capture_output=True
        )
        return f"{'yes' if compared.returncode == 0 else 'no'}, {'no' if _files(place / 'work') else 'yes'}"


_PROMISES: Final = (
    a_killed_daemon, a_killed_copy_up, a_lower_that_hangs, many_open_files, a_full_disk,
    an_upper_that_is_mounted_twice, a_mapped_write,
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [one.name for one in CONTESTANTS]
    parser.add_argument("--contestant", action="append", choices=names)
    arguments = parser.parse_args()
    most = min(8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    for promise in _PROMISES:
        print(" ".join((promise.__doc__ or "").split()))
        for contestant in CONTESTANTS:
            if arguments.contestant is None or contestant.name in arguments.contestant:
                print(f"  {contestant.name}: {promise(contestant)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
