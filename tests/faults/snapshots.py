"""Faults in snapshots: the daemon or the command gets an error from a system call, or is killed before it.

After each: the mount shows what it showed, or after a restore that succeeded the snapshot; open files go on;
the record names what is on disk. At the end each snapshot and the upper show their trees under kernel
overlayfs, and nothing else is left beside the upper.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.faults import commands
from tests.faults.batch import Report, wait_announced
from tests.faults.injecting import KILL, Fault, Injector
from tests.faults.plan import ALL, Selection
from tests.support import areas, mounting
from tests.support.live_lowers import Shown, shown
from tests.support.mounting import Mount
from tests.support.patience import patient
from unionfs.branches import snapshots
from unionfs.daemon import live
from unionfs.errors import UserError
from unionfs.storage.snapshots import base, path_of, read, with_snapshots
from unionfs.sys import calls
from unionfs.sys.fds import Owned
from unionfs.union.check import check
from unionfs.union.resting import resting

SESSIONS: Final = ("direct-hybrid", "direct-cached")
ORDERS: Final = ("create", "restore", "rm")
_SECONDS: Final = patient(30)
_ERRORS: Final = (errno.ENOSPC, errno.EIO, errno.EMFILE)
_AT_ONCE: Final = 25
"""Faults of one union: each adds a layer."""
_CHANGES: Final = (
    "mkdir", "rename", "link", "unlink", "symlink", "mknod", "openat", "setxattr", "removexattr", "write",
    "fsync", "syncfs", "utimensat", "fchmod", "fchown", "copy_file_range", "ioctl", "ftruncate",
)  # fmt: skip
"""The calls before which a kill leaves another state: by the beginning of their names."""


@dataclass
class _Stage:
    """A union with an upper that has snapshots."""

    place: Path
    session: str
    problems: list[str] = field(default_factory=list)
    #: What each snapshot must show.
    trees: dict[str, Shown] = field(default_factory=dict)
    number: int = 0

    def __post_init__(self) -> None:
        for name in ("lower/d/sub", "lower/e", "upper", "work", "merged"):
            (self.place / name).mkdir(parents=True)
        for number in range(6):
            (self.place / f"lower/d/f{number}").write_text(f"lower {number}\n")
            (self.place / f"lower/d/sub/g{number}").write_text(f"lower {number}\n" * 100)
        os.link(self.place / "lower/d/f5", self.place / "lower/e/f5")

    @property
    def upper(self) -> str:
        return str(self.place / "upper")

    @property
    def root(self) -> Path:
        return self.place / "merged"

    @contextmanager
    def mounted(self) -> Iterator[tuple[Mount, live.LiveMount]]:
        """A mount of it, and its entry."""
        (self.place / "merged.log").unlink(missing_ok=True)
        with mounting.mounted(
            self.place, lowers=[self.place / "lower"], upper=self.place / "upper",
            work=self.place / "work", session=self.session, options=("index=on",),
        ) as mount:  # fmt: skip
            wait_announced(mount)
            # A daemon that was killed may be listed, too.
            (entry,) = (one for one in live.live_mounts() if one.pid == mount.pid)
            yield mount, entry

    def change(self) -> None:
        """Change the union in other ways than the last time."""
        self.number += 1
        number, root = self.number, self.root
        (root / "d/f0").write_text(f"changed {number}\n")
        shutil.rmtree(root / f"new{number % 3}", ignore_errors=True)
        (root / f"new{number % 3}").mkdir()
        (root / f"new{number % 3}/x").write_text(f"{number}\n")
        os.link(root / f"new{number % 3}/x", root / f"new{number % 3}/y")
        for path in root.glob("d/su*"):
            os.rename(path, root / f"d/sub{number}")
        (root / "d/f1").unlink(missing_ok=True)
        if number % 2:
            (root / "d/f1").symlink_to("f0")
        (root / "e/f5").write_text(f"all names {number}\n")
        os.utime(root / "d/f5")
        self.sync()

    def sync(self) -> None:
        """What was written is not only in the page cache of the mount."""
        with Owned(os.open(self.root, os.O_RDONLY)) as fd:
            calls.syncfs(fd)

    def kernel(self, lowers: Sequence[str]) -> Shown:
        """What kernel overlayfs shows of layers."""
        options = ["redirect_dir=follow"]
        with mounting.kernel_mounted(
            self.place, lowers=list(map(Path, lowers)), options=options, name="view"
        ) as view:
            return shown(view.mountpoint)

    def lowers(self) -> list[str]:
        """Those of the next mount."""
        return list(with_snapshots(self.upper, [str(self.place / "lower")]))

    def check_at_rest(self, expected: Shown | None) -> None:
        """Nothing is mounted."""
        lowers = self.lowers()
        if expected is not None and self.kernel([self.upper, *lowers]) != expected:
            self.blame("the kernel shows another tree of the upper")
        with resting(
            self.upper, lowers, str(self.place / "work"), userxattr=False, writable=False
        ) as layers:
            for finding in check(layers):
                self.blame(f"check: {finding}")
        record = read(self.upper)
        for one in record.shown():
            if one.name not in self.trees:
                continue
            layers = [path_of(self.upper, id_) for id_ in record.chain(one.id)]
            if missing := [path for path in layers if not os.path.isdir(path)]:
                self.blame(f"snapshot {one.name} lacks {missing}")
                continue
            if self.kernel([*layers, *base(self.upper, lowers)]) != self.trees[one.name]:
                self.blame(f"snapshot {one.name} has another tree")
        with self.mounted() as (_, entry):  # which has no layers any more that were joined
            self.merge(entry, waste=True)
        known = {*read(self.upper).layers}
        found = {name for name in os.listdir(f"{self.upper}.snapshots") if "." not in name}
        if found != known:
            self.blame(f"layers on disk {sorted(found)}, in the record {sorted(known)}")

    def merge(self, entry: live.LiveMount, *, waste: bool = False) -> None:
        """Join the layers, unless a command has left a process that does; until that is done,
        and with ``waste`` nothing else is left."""
        deadline = time.monotonic() + _SECONDS
        snapshots.merge(entry)
        while snapshots.has_to_join(entry) or (waste and self.waste()):
            assert time.monotonic() < deadline, "layers are not joined"
            snapshots.merge(entry)

    def waste(self) -> set[str]:
        """Layers on disk that the record does not name."""
        used = {name for name in os.listdir(f"{self.upper}.snapshots") if "." not in name}
        return used - {*read(self.upper).layers}

    def blame(self, problem: str) -> None:
        self.problems.append(problem)


class _Opened:
    """Files that are open for writing, of the kinds that a snapshot treats differently."""

    def __init__(self, root: Path) -> None:
        with ExitStack() as files:
            for name in ("plain", "linked", "removed"):
                (root / name).unlink(missing_ok=True)
            (root / "other").unlink(missing_ok=True)
            self._files = [
                files.enter_context((root / name).open("w+b", buffering=0))
                for name in ("plain", "linked", "removed")
            ]
            os.link(root / "linked", root / "other")
            (root / "removed").unlink()
            self._texts = [b"", b"", b""]
            self._all = files.pop_all()
        self.write()

    def write(self) -> list[bytes]:
        """Write to each; returns those of which another content is read than was written."""
        wrong = []
        for index, file in enumerate(self._files):
            file.write(b"%d\n" % len(self._texts[index]))
            self._texts[index] += b"%d\n" % len(self._texts[index])
            os.fsync(file.fileno())
            if (found := os.pread(file.fileno(), 1 << 16, 0)) != self._texts[index]:
                wrong.append(found)
        return wrong

    def close(self) -> None:
        with suppress(OSError):
            self._all.close()


def _create(entry: live.LiveMount, stage: _Stage) -> None:
    snapshots.take(entry, f"s{stage.number}", stop=False)


def _restore(entry: live.LiveMount, stage: _Stage) -> None:
    snapshots.restore(entry, "first")


_ACTIONS: Final[dict[str, Callable[[live.LiveMount, _Stage], None]]] = {
    "create": _create, "restore": _restore,
}  # fmt: skip


# -- the daemon -------------------------------------------------------------------------------------------


class _Daemon:
    """Faults in the daemon that takes or restores a snapshot."""

    def __init__(self, stage: _Stage, order: str) -> None:
        self.stage = stage
        self.order = order

    def prepare(self, entry: live.LiveMount) -> Shown:
        """Bring the union into a state before the order."""
        stage = self.stage
        if "first" not in stage.trees:
            stage.change()
            stage.trees["first"] = shown(stage.root)
            snapshots.take(entry, "first", stop=False)
        stage.change()
        return shown(stage.root)

    def points(self) -> list[str]:
        """The calls of the daemon without a fault."""
        with self.stage.mounted() as (mount, entry):
            self.prepare(entry)
            opened = _Opened(self.stage.root)
            with Injector(mount.pid) as injector:
                injector.arm()
                _ACTIONS[self.order](entry, self.stage)
                calls = injector.disarm()
            opened.close()
            return calls

    def errors(self, faults: Sequence[Fault]) -> int:
        """Let calls fail, on one mount; returns how many did."""
        stage, tried = self.stage, 0
        with self.stage.mounted() as (mount, entry), Injector(mount.pid) as injector:
            last: Fault | None = None
            for fault in faults:
                try:
                    self.prepare(entry)
                    opened = _Opened(stage.root)
                    before = shown(stage.root)
                except (OSError, UserError) as error:
                    raise mounting.MountFailed(f"after {last}: {error}") from error
                last = fault
                timer = threading.Timer(_SECONDS, mount.kill)
                timer.start()
                injector.arm(fault)
                said = self._act(entry)
                injector.disarm()
                timer.cancel()
                tried += bool(fault.hit)
                try:
                    problems = [f"{fault}: {one}" for one in self._judge(said, before, opened, entry)]
                except OSError as error:
                    raise mounting.MountFailed(f"{fault}: the daemon ended: {error}") from error
                stage.problems = [*stage.problems, *problems]
                opened.close()
            at_the_end = shown(stage.root)
            stage.sync()
            mount.allow_log("")
        stage.check_at_rest(at_the_end)
        return tried

    def _act(self, entry: live.LiveMount) -> str | None:
        try:
            _ACTIONS[self.order](entry, self.stage)
        except UserError as error:
            return str(error)
        return None

    def _judge(
        self, said: str | None, before: Shown, opened: _Opened, entry: live.LiveMount
    ) -> Iterator[str]:
        stage = self.stage
        done = said is None or "could not be recorded" in said
        after = shown(stage.root)
        if self.order == "create":
            if after != before:
                yield f"{said}: another tree: {_differing(before, after)}"
            name = f"s{stage.number}"
            if done:
                stage.trees[name] = before
            if any(one.name == name for one in read(stage.upper).shown()) != done:
                yield f"{said}: the record says otherwise"
            if wrong := opened.write():
                yield f"{said}: open files have {wrong}"
        elif after != (stage.trees["first"] if done else before):
            yield f"{said}: another tree: {_differing(stage.trees['first'] if done else before, after)}"
        if said is not None and not said.endswith("."):
            yield f"no sentence: {said}"

    def kills(self, faults: Sequence[Fault]) -> int:
        """Kill the daemon, one for each fault."""
        stage, tried = self.stage, 0
        for fault in faults:
            with suppress(mounting.MountFailed), stage.mounted() as (mount, entry):
                self.prepare(entry)
                opened = _Opened(stage.root)
                before = shown(stage.root)
                with Injector(mount.pid) as injector:
                    injector.arm(fault)
                    self._act(entry)
                    injector.disarm()
                areas.detach(mount.mountpoint)
                opened.close()
            if not fault.hit:
                continue
            tried += 1
            shows = stage.kernel([stage.upper, *stage.lowers()])
            name = f"s{stage.number}"
            if self.order == "create" and any(one.name == name for one in read(stage.upper).shown()):
                stage.trees[name] = before
            expected = [before, *([stage.trees["first"]] if self.order == "restore" else [])]
            if shows not in expected:
                stage.blame(f"{fault}: then {_differing(before, shows)}")
            with stage.mounted():
                again = shown(stage.root)
            if again != shows:
                stage.blame(f"{fault}: mounted again {_differing(shows, again)}")
        stage.check_at_rest(None)
        return tried


def _differing(one: Shown, other: Shown) -> list[str]:
    return [
        f"{path}: {one.get(path)} {other.get(path)}"[:300]
        for path in sorted({*one, *other})
        if one.get(path) != other.get(path)
    ]


# -- the command ------------------------------------------------------------------------------------------


class _Command:
    """Faults in the process of a command; the daemon is another one."""

    def __init__(self, stage: _Stage, order: str) -> None:
        self.stage = stage
        self.order = order

    def run(self, fault: Fault) -> tuple[commands.Outcome, list[str]]:
        """Make two snapshots more, and run the command with a fault."""
        stage = self.stage
        with stage.mounted() as (mount, entry):
            for _ in range(2):
                stage.change()
                stage.trees[f"s{stage.number}"] = shown(stage.root)
                snapshots.take(entry, f"s{stage.number}", stop=False)
            stage.change()
            before = shown(stage.root)
            words = {
                "create": ["create", "--no-stop", str(stage.root), "new"],
                "restore": ["restore", str(stage.root), f"s{stage.number - 1}"],
                "rm": ["rm", "--wait", str(stage.root), f"s{stage.number - 1}", f"s{stage.number - 2}"],
            }[self.order]
            outcome, points = commands.run(stage.place, ["snapshot", *words], fault)
            after = shown(stage.root)
            expected = [before]
            if self.order == "restore":
                restored = stage.trees[f"s{stage.number - 1}"]
                expected = [restored] if outcome.code == 0 else [before, restored]
            if after not in expected:
                stage.blame(f"{fault}: {outcome}: another tree: {_differing(before, after)}")
            own = not fault.hit.endswith("/output")  # where the sentence goes
            if fault.error != KILL and own and outcome.code != 0 and "Traceback" in outcome.text:
                stage.blame(f"{fault}: no sentence: {outcome.text[-700:]}")
            # What a command has begun, another one ends, and each can be taken.
            stage.merge(entry)
            snapshots.take(entry, f"after{stage.number}", stop=False)
            stage.trees[f"after{stage.number}"] = after
            names = [one.name for one in read(stage.upper).shown()]
            snapshots.remove(entry, [name for name in names if not name.startswith("after")])
            stage.merge(entry)
            stage.sync()
            mount.allow_log("")
        stage.check_at_rest(after)
        return outcome, points


# -- all of them ------------------------------------------------------------------------------------------


def run(
    area: Path,
    session: str,
    order: str,
    *,
    kills: bool,
    some: Selection = ALL,
    told: Callable[[str], object] = lambda line: None,
) -> Report:
    """Try the faults of one order on one session, or some, of the daemon and of the command."""
    report = Report()
    for name, one in (("daemon", _of_daemon), ("command", _of_command)):
        if name == "daemon" and order == "rm":
            continue  # a matter of the command alone
        for stage, tried in one(area, session, order, kills, some):
            report.tried += tried
            for problem in stage.problems:
                report.problems.append(f"{order} on {session}, {name}: {problem}")
                told(f"  {report.problems[-1]}")
            areas.remove(stage.place)
        told(f"snapshot {order} on {session}, {name}: {report.tried} faults")
    return report


_Tried = Iterator[tuple[_Stage, int]]
"""Each union, and the number of faults in its calls."""


def _of_daemon(area: Path, session: str, order: str, kills: bool, some: Selection) -> _Tried:
    stage = _Stage(area / "points", session)
    faults = _faults(_Daemon(stage, order).points(), kills, some)
    yield stage, 0
    for batch in _batched(faults):
        stage = _Stage(area / "daemon", session)
        daemon = _Daemon(stage, order)
        yield stage, daemon.kills(batch) if kills else daemon.errors(batch)


def _of_command(area: Path, session: str, order: str, kills: bool, some: Selection) -> _Tried:
    stage = _Stage(area / "points", session)
    _, points = _Command(stage, order).run(Fault(0, 0))
    yield stage, 0
    for batch in _batched(_faults([""] * len(points), kills, some)):
        stage = _Stage(area / "command", session)
        for fault in batch:
            known = len(stage.problems)
            _Command(stage, order).run(fault)
            stage.problems[known:] = [f"{fault}: {one}" for one in stage.problems[known:]]
        yield stage, sum(bool(fault.hit) for fault in batch)


def _batched(faults: Sequence[Fault]) -> Iterator[Sequence[Fault]]:
    return (faults[start : start + _AT_ONCE] for start in range(0, len(faults), _AT_ONCE))


def _faults(points: Sequence[str], kills: bool, some: Selection) -> Sequence[Fault]:
    numbers = list(range(1, len(points) + 1))
    if kills:
        numbers = [one for one in numbers if not points[one - 1] or points[one - 1].startswith(_CHANGES)]
    return some.of([Fault(number, error) for number in numbers for error in ((KILL,) if kills else _ERRORS)])
