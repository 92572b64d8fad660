"""Real mounts for tests: the union through its command line, and kernel overlayfs beside it.

``mounted`` starts ``python -m unionfs mount -f`` and always cleans up: whatever the test does, no mount and
no process remain. If the body succeeds, the daemon must exit with code 0 and must have logged no error; if it
fails, the daemon's log is attached to the failure.

``UNIONFS_TEST_SESSIONS=overlay`` (or ``fuse-overlayfs``; comma separated) substitutes another filesystem for
the union, for developing the tests themselves: with kernel overlayfs on both sides every comparison must
pass, with fuse-overlayfs some must fail.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import areas, syscalls
from tests.support.patience import patient
from tests.support.prepared import PreparedProcess
from tests.support.worker import REPOSITORY
from unionfs.daemon import live
from unionfs.sys import fuseprobe

SESSIONS = ["pyfuse3", "direct-hybrid", "direct-passthrough", "direct-cached"]
"""The sessions that every mount test runs on; the direct one in each I/O mode."""

STAND_INS = ("overlay", "fuse-overlayfs")
"""Session names that only the environment variable can select."""

READY_SECONDS = patient(20.0)
GONE_SECONDS = patient(20.0)

# RELEASE is sent after close(2) has returned; if the mount is gone by then, the reply fails (ENOENT from
# /dev/fuse), and libfuse's caller logs that.
_HARMLESS_LOG = re.compile(r"fuse_release(dir)?\(\): fuse_reply_\* failed with No such file or directory")
_BAD_LOG = re.compile(r"\b(ERROR|CRITICAL|Traceback|Exception ignored)\b")


_OVERLAY_OPTIONS = ("redirect_dir=", "index=", "metacopy=", "xino=", "userxattr")
"""Options that the stand-in for the union has, too, by their beginning."""

PLAIN = "-plain"
"""Behind the name of a session: without `Shortcuts`."""

STEPS = "-steps"
"""Behind the name of a session: changes are made in steps, by Python, instead of bundles of system calls."""


def sessions() -> list[str]:
    """The sessions of this run."""
    chosen = os.environ.get("UNIONFS_TEST_SESSIONS", "")
    return [name for name in chosen.split(",") if name] or SESSIONS


@functools.cache
def session_reason(name: str) -> str | None:
    """Why this kernel does not support the session; None if it does."""
    if name in ("direct-hybrid", "direct-passthrough") and fuseprobe.offers_passthrough() is False:
        return "this kernel does not support passthrough, which needs Linux 6.9"
    return None


class MountFailed(AssertionError):
    """The daemon did not start, or did not end as it must; the text has its log."""


@dataclass
class Mount:
    """One live mount. ``pid`` is the daemon's (0 for a kernel filesystem)."""

    mountpoint: Path
    pid: int
    lowers: list[Path]
    upper: Path | None
    work: Path | None
    session: str
    log: Path | None = None
    options: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | PreparedProcess | None = None
    allowed_log: list[str] = field(default_factory=list)

    @property
    def is_ours(self) -> bool:
        """Whether a unionfs daemon serves it."""
        return self.session not in STAND_INS and self.session != "kernel"

    def log_text(self) -> str:
        """What the daemon has written to stderr."""
        return self.log.read_text(errors="replace") if self.log and self.log.exists() else ""

    def allow_log(self, pattern: str) -> None:
        """Allow log lines that match the regular expression, in a test that provokes an error."""
        self.allowed_log.append(pattern)

    def bad_log_lines(self) -> list[str]:
        """Log lines of level ERROR and above, and tracebacks, that no ``allow_log`` matches."""
        return [
            line
            for line in self.log_text().splitlines()
            if _BAD_LOG.search(line)
            and not _HARMLESS_LOG.search(line)
            and not any(re.search(pattern, line) for pattern in self.allowed_log)
        ]

    def inspect(self) -> dict[str, Any]:
        """``unionfs inspect --json`` of this mount."""
        done = subprocess.run(
            [*command(), "inspect", "--json", str(self.mountpoint)],
            capture_output=True, text=True, timeout=patient(20), cwd=REPOSITORY,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def figure(self, name: str) -> int:
        """One figure of the mount, at any depth of ``unionfs inspect``'s output."""
        deadline = time.monotonic() + READY_SECONDS
        while not (entries := [entry for entry in live.entries() if entry.pid == self.pid]):
            assert time.monotonic() < deadline, "the daemon is not in the registry"
            time.sleep(0.005)  # It answers requests shortly before it is announced.
        found = _find(entries[0].ask(), name)
        assert isinstance(found, int), f"the daemon's answer has no figure {name!r}"
        return found

    def kill(self) -> None:
        """End the daemon with SIGKILL (its requests then end with ENOTCONN)."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def _find(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        if name in value:
            return value[name]
        for item in value.values():
            if (found := _find(item, name)) is not None:
                return found
    return None


LIVE: list[Mount] = []
"""The mounts of the running test; the watchdog in conftest kills their daemons if the test hangs."""


def command() -> list[str]:
    """The start of a unionfs command line."""
    return [sys.executable, "-m", "unionfs"]


def is_mounted(path: Path) -> bool:
    """Whether something is mounted exactly here."""
    return any(where == str(path) for _, where, _ in areas.mounts_below(path))


def _escape(path: Path) -> str:
    return str(path).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def layer_options(lowers: Sequence[Path], upper: Path | None, work: Path | None) -> str:
    """The layers as the kernel's mount options: lowerdir=...,upperdir=...,workdir=..."""
    data = "lowerdir=" + ":".join(_escape(item) for item in lowers)
    if upper is not None and work is not None:
        data += f",upperdir={_escape(upper)},workdir={_escape(work)}"
    return data


@contextlib.contextmanager
def kernel_mounted(
    tmp: Path,
    *,
    lowers: Sequence[Path],
    upper: Path | None = None,
    work: Path | None = None,
    options: Sequence[str] = (),
    name: str = "kernel",
) -> Iterator[Mount]:
    """The same layers under kernel overlayfs: no index, redirect_dir or metacopy unless asked for.

    redirect_dir=nofollow is not used: reading redirects is part of the disk format.
    """
    mountpoint = tmp / name
    mountpoint.mkdir(parents=True, exist_ok=True)
    if upper is None and len(lowers) == 1:
        lowers = [*lowers, _empty(tmp)]
    chosen = list(options)
    # With userxattr the kernel accepts neither redirect_dir nor metacopy, not even with the value off, and
    # metacopy=on needs redirects.
    own = () if {"userxattr", "metacopy=on"} & set(options) else ("redirect_dir", "metacopy")
    for key in ("index", "nfs_export", *own):
        if not any(option.startswith(key + "=") for option in options):
            chosen.append(f"{key}=off")
    data = ",".join([layer_options(lowers, upper, work), *chosen])
    syscalls.mount("overlay", mountpoint, "overlay", 0, data)
    mount = Mount(mountpoint, 0, list(lowers), upper, work, "kernel", options=list(options))
    try:
        yield mount
    finally:
        try:
            syscalls.umount(mountpoint)
        except OSError:
            areas.detach(mountpoint)
            if sys.exc_info()[0] is None:
                raise


def _empty(tmp: Path) -> Path:
    path = tmp / "empty-lower"
    path.mkdir(exist_ok=True)
    return path


def overlay_reason() -> str | None:
    """Why kernel overlayfs cannot be the oracle here; None if it can."""
    if os.geteuid() != 0:
        return "kernel overlayfs needs root"
    with areas.area() as area:
        for name in ("lower", "upper", "work"):
            (area / name).mkdir()
        try:
            with kernel_mounted(area, lowers=[area / "lower"], upper=area / "upper", work=area / "work"):
                return None
        except OSError as error:
            return f"this kernel or container has no overlayfs ({error.strerror})"


def _wait_ready(mount: Mount, process: subprocess.Popen[bytes] | PreparedProcess) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if is_mounted(mount.mountpoint):
            os.statvfs(mount.mountpoint)  # waits for the daemon's answer to INIT
            return
        if (code := process.poll()) is not None:
            raise MountFailed(f"the daemon ended with {code}: {mount.log_text()}")
        time.sleep(0.005)
    raise MountFailed(f"not mounted within {READY_SECONDS} s: {mount.log_text()}")


def start(mount: Mount, arguments: Sequence[str]) -> None:
    """Run the daemon in the foreground with its stderr in a file, and wait until the mount answers."""
    assert mount.log is not None
    if mount.is_ours:
        plain, steps = mount.session.endswith(PLAIN), mount.session.endswith(STEPS)
        mount.process = PreparedProcess(
            arguments[len(command()) :], mount.log, REPOSITORY, plain=plain, steps=steps
        )
    else:
        with mount.log.open("ab") as log:
            mount.process = subprocess.Popen(
                list(arguments), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=REPOSITORY
            )
    mount.pid = mount.process.pid
    _wait_ready(mount, mount.process)


def _in_another_namespace(minor: int) -> bool:
    """Whether any process sees a mount of the filesystem with the device number 0:``minor``."""
    for path in Path("/proc").glob("[0-9]*/mountinfo"):
        with contextlib.suppress(OSError):
            if f" 0:{minor} " in path.read_text(errors="replace"):
                return True
    return False


def stop(mount: Mount) -> None:
    """Unmount in order. Raises MountFailed unless the daemon then ends by itself, with exit code 0."""
    process = mount.process
    if process is None:
        return
    deadline = time.monotonic() + GONE_SECONDS
    device = next((minor for minor, where, _ in areas.mounts_below(mount.mountpoint)), None)
    while is_mounted(mount.mountpoint):
        try:
            syscalls.umount(mount.mountpoint)
        except OSError as error:
            # A RELEASE is sent after close(2) has returned, so the mount may be busy for a moment.
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise MountFailed(f"umount of {mount.mountpoint}: {error}") from error
            time.sleep(0.005)
    try:
        code = process.wait(GONE_SECONDS)
    except subprocess.TimeoutExpired:
        if device is not None and _in_another_namespace(device):
            return  # A process that has unshared its mount namespace holds a copy; ``destroy`` ends it.
        raise MountFailed(f"the daemon lives {GONE_SECONDS} s after umount: {mount.log_text()}") from None
    if code != 0:
        raise MountFailed(f"the daemon ended with {code}: {mount.log_text()}")


def destroy(mount: Mount) -> None:
    """End the daemon and the mount by force; never fails and never blocks for long."""
    if mount.process is not None and mount.process.poll() is None:
        mount.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            mount.process.wait(5)
    areas.detach(mount.mountpoint)


def _arguments(mount: Mount, options: Sequence[str]) -> list[str]:
    layers = layer_options(mount.lowers, mount.upper, mount.work)
    if mount.session == "fuse-overlayfs":
        return ["fuse-overlayfs", "-f", "-o", ",".join([layers, *options]), str(mount.mountpoint)]
    session, _, io = mount.session.removesuffix(PLAIN).removesuffix(STEPS).partition("-")
    arguments = [*command(), "mount", "-f", "--session", session, *(["--io", io] if io else [])]
    for lower in mount.lowers:
        arguments += ["-l", str(lower)]
    if mount.upper is not None:
        arguments += ["-u", str(mount.upper)]
    if mount.work is not None:
        arguments += ["-w", str(mount.work)]
    for option in options:
        arguments += ["-o", option]
    return [*arguments, str(mount.mountpoint)]


@contextlib.contextmanager
def mounted(
    tmp: Path,
    *,
    lowers: Sequence[Path],
    upper: Path | None = None,
    work: Path | None = None,
    session: str = "pyfuse3",
    options: Sequence[str] = (),
    name: str = "merged",
) -> Iterator[Mount]:
    """Mount the layers (topmost lower first) at ``tmp/name`` through the command line.

    Options are those of ``-o``. As root the mount gets allow_other, dev and suid, like a kernel mount.
    """
    if session == "overlay":
        known = [option for option in options if option.startswith(_OVERLAY_OPTIONS)]
        with kernel_mounted(
            tmp, lowers=lowers, upper=upper, work=work, options=known, name=name
        ) as mount:  # fmt: skip
            mount.session = "overlay"
            yield mount
        return
    mountpoint = tmp / name
    mountpoint.mkdir(parents=True, exist_ok=True)
    wanted = list(options)
    if os.geteuid() == 0:
        wanted += [o for o in ("allow_other", "dev", "suid") if o not in wanted and "no" + o not in wanted]
    log = tmp / f"{name}.log"
    mount = Mount(mountpoint, 0, list(lowers), upper, work, session, log=log, options=list(options))
    LIVE.append(mount)
    try:
        start(mount, _arguments(mount, wanted))
        try:
            yield mount
        except BaseException as error:
            if text := mount.log_text():
                error.add_note(f"--- log of the daemon at {mountpoint}:\n{text[-6000:]}")
            raise
        stop(mount)
        if bad := mount.bad_log_lines():
            raise MountFailed(
                "the daemon logged errors:\n" + "\n".join(bad) + "\n" + mount.log_text()[-6000:]
            )
    finally:
        destroy(mount)
        LIVE.remove(mount)
