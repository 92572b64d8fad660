"""Power cuts at every flush of the upper's disk, and with writes out of order: see `power_cuts`."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.faults import power_cuts
from tests.faults.power_cuts import Cut, Load
from tests.mount.cli_calls import unionfs
from tests.support.areas import Unavailable
from tests.support.mounting import kernel_mounted, mounted

_SEED = 7 if os.environ.get("UNIONFS_RANDOM", "0") == "0" else random.randrange(1 << 30)

pytestmark = [pytest.mark.usefixtures("kernel_overlay"), pytest.mark.timeout(600), pytest.mark.watchdog(500)]


class Recorded:
    """A load on a union, and the log of its disk."""

    def __init__(self, area: Path, kind: str, session: str, changes: int, *options: str) -> None:
        self.area, self.session = area, session
        (area / "lower").mkdir()
        Load.lower(area / "lower")
        with power_cuts.recorded(area, kind) as (disk, log):
            for name in ("upper", "work"):
                (disk / name).mkdir()
            os.sync()
            self.log, self.after = log, log.stat().st_size
            with mounted(
                area, lowers=[area / "lower"], upper=disk / "upper", work=disk / "work", session=session,
                options=options,
            ) as mount:  # fmt: skip
                self.load = Load(mount.mountpoint, log, seed=_SEED)
                self.load.starts()
                self.load.run(changes)
                self.load.top = Path("/nonexistent")
            self.flushes = power_cuts.flushes(log)

    @contextmanager
    def _image(self, cut: Cut) -> Iterator[Path]:
        """The mounted disk."""
        top = self.area / "cut.mounted"
        top.mkdir(exist_ok=True)
        with ExitStack() as stack:
            subprocess.run(["mount", "-o", "loop", cut.image, top], check=True)
            stack.callback(subprocess.run, ["umount", top], check=True)
            yield top

    def problems(self, *, every: int = 1, session: str | None = None) -> Iterator[str]:
        """What is wrong after cuts; ``session``: seen through a union of ours, not through the kernel's."""
        tried = 0
        for cut in power_cuts.cuts(self.area, self.log, self.after, _SEED, every=every):
            tried += 1
            with self._image(cut) as disk:
                layers = {"upper": disk / "upper", "work": disk / "work", "lowers": [self.area / "lower"]}
                shown = (
                    kernel_mounted(self.area, **layers, name="after")
                    if session is None
                    else mounted(self.area, **layers, session=session, name="after")
                )
                with shown as mount:
                    yield from self.load.problems(mount.mountpoint, cut, self.flushes)
                if session is not None:
                    words = ["-l", self.area / "lower", "-u", disk / "upper", "-w", disk / "work"]
                    done = unionfs("check", *words)
                    if done.returncode:
                        yield f"{cut.flushed}: {done.stdout}{done.stderr}"
                    if left := os.listdir(disk / "work/work"):
                        yield f"{cut.flushed}: {left} is left in work"
        print(f"{tried} cuts at {len(self.flushes)} flushes, seed {_SEED}")
        assert tried > 2


def _recorded(area: Path, kind: str, session: str, changes: int, *options: str) -> Recorded:
    try:
        return Recorded(area, kind, session, changes, *options)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("kind", ["ext4", pytest.param("xfs", marks=pytest.mark.slow)])
def test_some_power_cuts(area: Path, session: str, kind: str) -> None:
    """At some of the flushes, through a union."""
    recorded = _recorded(area, kind, session, 12)
    assert list(recorded.problems(every=12, session=session)) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", power_cuts.SIZES)
def test_every_power_cut(area: Path, session: str, kind: str) -> None:
    """At each flush, through the kernel's overlayfs."""
    recorded = _recorded(area, kind, session, 60)
    assert list(recorded.problems()) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", power_cuts.SIZES)
def test_every_power_cut_of_overlayfs(area: Path, kind: str) -> None:
    """So the kernel's union does."""
    recorded = _recorded(area, kind, "overlay", 60)
    assert list(recorded.problems()) == []


def test_without_sync(area: Path) -> None:
    """With `volatile` nothing is made durable, which shows."""
    recorded = _recorded(area, "ext4", "direct-hybrid", 12, "volatile")
    assert any(recorded.problems(every=6))
