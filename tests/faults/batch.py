"""Faults in operations on one union: a case for each, in a directory of its own, and what must hold after it.

At once: the caller got the injected errno and the directory is the old one, or success and the new one;
the work directory is empty and no file is open. At the end, for all cases: the lower is unchanged, the daemon
ends in order, `unionfs check` finds nothing, and the upper shows the same under kernel overlayfs and when it
is mounted again. The times of directories may differ from overlayfs's after an error or a kill, which may
come before they are restored.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.faults.injecting import KILL, Fault, Injector
from tests.faults.operations import (
    Look,
    Operation,
    differences,
    is_between,
    look,
    same_but_directories,
    set_times,
)
from tests.support import areas, mounting, snapshot, syscalls
from tests.support.mounting import Mount
from tests.support.patience import patient
from unionfs.union.check import check
from unionfs.union.resting import resting

ERRORS: Final = (
    errno.ENOSPC, errno.EIO, errno.EINTR, errno.EDQUOT, errno.EMFILE, errno.ENOMEM, errno.ESTALE, errno.EROFS,
)  # fmt: skip
LASTING: Final = (errno.ENOSPC, errno.EIO, errno.EMFILE)
"""Of these, also every later call of the same kind fails: a full disk stays full."""

_SECONDS = patient(20)
_BAD: Final = re.compile("ERROR|CRITICAL|Traceback|Exception ignored")
_LATE: Final = ("newfstatat", "close")
_FILES: Final = 6
"""The most files of a case."""
_FORGETS: Final = 20
"""The kernel sends up to eight requests before a FORGET that waits (fs/fuse/dev.c, fuse_dev_do_read)."""


@dataclass
class Case:
    """One operation with one fault; ``directory`` is its name in the root."""

    operation: Operation
    fault: Fault
    directory: str = ""
    #: The caller's error, None for success.
    error: OSError | None = None
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.operation}: {self.fault}"

    def blame(self, problem: str) -> None:
        """Record what does not hold."""
        self.problems.append(problem)


@dataclass
class Report:
    """``tried``: the faults that were reached. ``problems``: what did not hold, with the case."""

    tried: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        self.tried += other.tried
        self.problems += other.problems


class Expected:
    """What kernel overlayfs makes of each operation."""

    def __init__(self, area: Path) -> None:
        self._area = area
        self._known: dict[str, tuple[Look, Look]] = {}

    def of(self, operation: Operation) -> tuple[Look, Look]:
        """The directory before and after."""
        if operation.name not in self._known:
            place = self._area / f"expected-{len(self._known)}"
            layers = Layers(place)
            layers.add(operation, "case")
            layers.finish()
            # without the options, which only say how the upper stores it; links stay links with the index
            options = ("index=on", "redirect_dir=on")
            with _kernel(layers, options) as mountpoint:
                old = look(f"{mountpoint}/case")
                operation.act(f"{mountpoint}/case")
                self._known[operation.name] = old, look(f"{mountpoint}/case")
            areas.remove(place)
        return self._known[operation.name]


class Layers:
    """A lower, an upper and a work directory."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.lower, self.upper, self.work = (place / name for name in ("lower", "upper", "work"))
        place.mkdir()
        for path in (self.lower, self.upper, self.work):
            path.mkdir()

    def add(self, operation: Operation, name: str) -> None:
        lower, upper = self.lower / name, self.upper / name
        lower.mkdir()
        upper.mkdir()
        operation.build(lower, upper)
        set_times(lower)
        set_times(upper)

    def finish(self) -> None:
        set_times(self.lower)


@contextlib.contextmanager
def _kernel(layers: Layers, options: Sequence[str]) -> Iterator[Path]:
    with mounting.kernel_mounted(
        layers.place, lowers=[layers.lower], upper=layers.upper, work=layers.work, options=options
    ) as mount:
        yield mount.mountpoint


class Batch:
    """Cases on one union."""

    def __init__(self, place: Path, session: str, cases: Sequence[Case], expected: Expected) -> None:
        """``place``: a directory that does not exist. All operations have the same options."""
        self._layers, self._session, self._cases, self._expected = Layers(place), session, cases, expected
        self._options = ("index=on", *cases[0].operation.options)
        #: Whether files stay open until the kernel forgets them, and it keeps what is written for a while.
        self._keeps = session.startswith("direct-cached")
        for index, case in enumerate(cases):
            case.directory = f"c{index:04d}"
            self._layers.add(case.operation, case.directory)
        self._layers.finish()
        self._before = snapshot.manifest(self._layers.lower)
        #: How much of the daemon's log was read.
        self._logged = 0
        #: What each case left, where it may be the old or the new tree.
        self._left: dict[str, Look] = {}

    def run(self) -> Report:
        """Try all of them."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _mounted(self) -> Iterator[Mount]:
        (self._layers.place / "merged.log").unlink(missing_ok=True)
        with mounting.mounted(
            self._layers.place, lowers=[self._layers.lower], upper=self._layers.upper, work=self._layers.work,
            session=self._session, options=self._options,
        ) as mount:  # fmt: skip
            wait_announced(mount)
            yield mount

    # -- one case -----------------------------------------------------------------------------------------

    def _fail(self, case: Case, mount: Mount, injector: Injector) -> None:
        top = f"{mount.mountpoint}/{case.directory}"
        settle(mount)
        opened, earlier = _open_files(mount.pid), self._in_work()
        self._act(case, top, mount, injector)
        if not os.path.exists(f"/proc/{mount.pid}/exe"):
            raise mounting.MountFailed(f"it ended: {mount.log_text()[-2000:]}")
        if not case.fault.hit:
            return
        others = [case.fault.error, *case.operation.others]
        if self._keeps and (case.operation.writes or case.operation.late):
            others.append(errno.EIO)  # as which the kernel remembers those of writing what it has cached
        if case.error is not None and case.error.errno not in others and not _is_repeated(case):
            case.blame(f"the caller got {_error(case.error)}")
        left = [name for name in self._in_work() if name not in earlier]
        if left and not _is_removal(case):
            case.blame(f"left in work: {left}")
        for _ in range(_FORGETS):
            if not (more := _open_files(mount.pid) - opened):
                break
            if self._keeps:
                syscalls.drop_caches(mount.mountpoint)
            settle(mount)
        else:
            case.blame(f"left open: {', '.join(more)}")
        self._judge(case, top)

    def _read_log(self, case: Case, mount: Mount) -> None:
        """Errors that the daemon logs are bugs, apart from those that no caller gets: of close(2), and of
        fstat(2) of what is forgotten."""
        text = mount.log_text()
        new, self._logged = text[self._logged :], len(text)
        if case.fault.hit.startswith("close") and "could not be closed" in new:
            return
        if case.fault.hit.startswith("newfstatat") and "has other names cannot be seen" in new:
            return
        if _BAD.search(new):
            case.blame(f"logged: {new}")

    def _act(self, case: Case, top: str, mount: Mount, injector: Injector) -> None:
        timer = threading.Timer(_SECONDS, mount.kill)
        timer.start()
        injector.arm(case.fault)
        try:
            case.operation.act(top)
        except OSError as error:
            case.error = error
        settle(mount)
        injector.disarm()
        timer.cancel()
        if not timer.finished.is_set():
            case.blame("the daemon did not answer")

    def _judge(self, case: Case, top: str) -> None:
        """Compare the directory with what it may be now."""
        old, new = self._expected.of(case.operation)
        try:
            found = self._look(top)
        except OSError as error:
            case.blame(f"then cannot be read: {error}")
            return
        self._left[case.directory] = found
        # The kernel repeats what ended with ESTALE; what was undone before leaves the time of its directory.
        # And a time is lost that cannot be restored, or by a daemon that died before that.
        excused = case.fault.error in (errno.ESTALE, KILL) or case.fault.hit.startswith("utimensat")
        if case.error is None and found != new and not (excused and same_but_directories(found, new)):
            case.blame(f"success, but {differences(new, found)}")
        late = case.operation.late and case.fault.hit.startswith(_LATE)
        if case.error is not None and late and self._keeps:
            # The kernel, which caches size and times, may still show the old ones.
            del self._left[case.directory]
        elif case.error is not None and not same_but_directories(found, old):
            between = case.operation.writes and is_between(old, new, found)
            # The kernel writes the times that it keeps later, and close(2) reports an error of that.
            late |= self._keeps and case.operation.late and case.fault.hit.startswith("utimensat")
            if not between and not (late and found == new):
                case.blame(f"{_error(case.error)}, but {differences(old, found)}")

    def _look(self, top: str) -> Look:
        """The directory there. Where the kernel writes times later, after the change, it reports an error of
        that once, at the next close(2) of the file (fs/fuse/file.c, fuse_flush)."""
        for _ in range(_FILES if self._keeps else 0):
            with contextlib.suppress(OSError):
                return look(top)
        return look(top)

    def _look_at_rest(self, case: Case) -> None:
        """What a killed daemon left, as the kernel reads it."""
        old, new = self._expected.of(case.operation)
        layers = self._layers
        options = ["index=on", "redirect_dir=on", *self._options]
        with _kernel(layers, options) if case.operation.links else self._kernel_view() as view:
            found = look(f"{view}/{case.directory}")
        self._left[case.directory] = found
        if not case.fault.hit or any(same_but_directories(found, tree) for tree in (old, new)):
            return
        if not (case.operation.writes and is_between(old, new, found)):
            case.blame(f"neither old nor new: {differences(old, found)}; {differences(new, found)}")

    def _same(self, case: Case, root: str, when: str) -> None:
        if (left := self._left.get(case.directory)) is None:
            return
        try:
            found = look(f"{root}/{case.directory}")
        except OSError as error:
            case.blame(f"{when}: {error}")
            return
        if found == left:
            return
        # A change that was undone leaves the time of its directory; and the kernel, too, ignores an error of
        # keeping it (copy_up.c, ovl_set_timestamps).
        excused = case.error is not None or case.fault.hit.startswith("utimensat")
        if excused and same_but_directories(left, found):
            return
        # What the kernel has cached and could not write is lost, also times.
        lost = self._keeps and case.error is not None and case.operation.writes
        if not (lost and is_between(*self._expected.of(case.operation), found)):
            case.blame(f"{when}: {differences(left, found)}")

    # -- all of them --------------------------------------------------------------------------------------

    def _at_rest(self) -> None:
        layers, one = self._layers, self._cases[0]
        if snapshot.manifest(layers.lower) != self._before:
            one.blame("the lower has changed (of this batch)")
        for finding in self._findings():
            slow = self._session.endswith(mounting.PLAIN)
            if not _is_left_whiteout(self._of(finding), finding, slow):
                self._of(finding).blame(f"check: {finding}")
        with self._kernel_view() as view:
            for case in self._cases:
                if not case.operation.links:
                    self._same(case, str(view), "by the kernel")
        with self._mounted() as mount:
            for case in self._cases:
                self._same(case, str(mount.mountpoint), "mounted again")
        if left := self._in_work():
            one.blame(f"left in work after another mount: {left}")
        options = ["index=on", "redirect_dir=on", *self._options]
        with _kernel(layers, options) as mountpoint:
            for case in self._cases:
                self._same(case, str(mountpoint), "by the kernel, writable")

    @contextlib.contextmanager
    def _kernel_view(self) -> Iterator[Path]:
        """Layers under kernel overlayfs that writes nothing, as a mount with that upper would."""
        options = ["redirect_dir=follow", *self._options]
        with mounting.kernel_mounted(
            self._layers.place, lowers=[self._layers.upper, self._layers.lower], options=options, name="view"
        ) as mount:
            yield mount.mountpoint

    def _findings(self) -> list[str]:
        layers = self._layers
        with resting(
            str(layers.upper), [str(layers.lower)], str(layers.work), userxattr=False, writable=False
        ) as resting_layers:
            return [f"{one}" for one in check(resting_layers)]

    def _of(self, finding: str) -> Case:
        return next((case for case in self._cases if case.directory in finding), self._cases[0])

    def _in_work(self) -> list[str]:
        return sorted(os.listdir(self._layers.work / "work"))

    def _report(self) -> Report:
        tried = [case for case in self._cases if case.fault.hit]
        problems = [f"{case}: {problem}" for case in self._cases for problem in case.problems]
        return Report(len(tried), [f"{self._session}: {problem}" for problem in problems])


class Errors(Batch):
    """Calls fail. The daemon lives on."""

    def run(self) -> Report:
        pending = list(self._cases)
        while pending:
            case = pending[0]
            try:
                with self._mounted() as mount, Injector(mount.pid) as injector:
                    self._logged = 0
                    while pending and mount.process is not None and mount.process.poll() is None:
                        case = pending.pop(0)
                        self._fail(case, mount, injector)
                        self._read_log(case, mount)
                    mount.allow_log("")
            except mounting.MountFailed as error:
                case.blame(f"the daemon: {error}")
                if pending and pending[0] is case:
                    raise
        self._at_rest()
        return self._report()


class Kills(Batch):
    """The daemon is killed, one for each case."""

    def run(self) -> Report:
        last: Case | None = None
        for case in [*self._cases, None]:
            with contextlib.suppress(mounting.MountFailed), self._mounted() as mount:
                if last is not None:
                    self._same(last, str(mount.mountpoint), "mounted again")
                    if left := self._in_work():
                        last.blame(f"left in work by the next mount: {left}")
                if case is not None:
                    with Injector(mount.pid) as injector:
                        self._act(case, f"{mount.mountpoint}/{case.directory}", mount, injector)
                    areas.detach(mount.mountpoint)
                    self._look_at_rest(case)
            last = case
        self._at_rest()
        return self._report()


def _is_left_whiteout(case: Case, finding: str, slow: bool) -> bool:
    """Whether it is a whiteout that hides nothing, and the exception is documented.

    A daemon was killed before it removed the whiteout over which it had renamed a directory, and which has
    the directory's old name since (dir.c, ovl_rename, ovl_cleanup_whiteout). Or it removed what it had
    created, and could not look whether the lower has the name; in a slow one it never looks then.
    """
    if "a whiteout of a name that no lower has" not in finding:
        return False
    if case.fault.lasts or (slow and case.fault.error != KILL):
        return case.fault.hit.startswith("newfstatat")
    return (
        case.fault.error == KILL and case.fault.hit.startswith("unlinkat") and "directory over" in str(case)
    )


def _is_removal(case: Case) -> bool:
    """Whether removing something from work failed: the next removal or mount does it."""
    again = case.error is None or case.fault.lasts or case.fault.hit.startswith("unlinkat")
    return "/work/work/#" in case.fault.hit and again


def _is_repeated(case: Case) -> bool:
    """Whether the file was there when the kernel (ESTALE) or the interpreter (EINTR) repeated the call."""
    again = case.fault.error in (errno.ESTALE, errno.EINTR)
    return case.operation.late and again and case.error is not None and case.error.errno == errno.EEXIST


def wait_announced(mount: Mount) -> None:
    """Wait until the daemon has started: it answers requests shortly before."""
    deadline = time.monotonic() + _SECONDS
    while "mounted at" not in mount.log_text():
        assert time.monotonic() < deadline, mount.log_text()
        time.sleep(0.002)


def _error(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error))


def settle(mount: Mount) -> None:
    """Wait until the daemon has done what it does after its answers."""
    with contextlib.suppress(OSError):
        os.statvfs(mount.mountpoint)


def _open_files(pid: int) -> Counter[str]:
    """Paths of files that a process holds open; not of directories, which are cached, and a whiteout."""
    found: Counter[str] = Counter()
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        try:
            st, where = os.stat(path), os.readlink(path)
        except OSError:
            continue
        if stat.S_ISREG(st.st_mode) or stat.S_ISLNK(st.st_mode):
            found[where] += 1
    return found
