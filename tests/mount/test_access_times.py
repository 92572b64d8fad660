"""Access times: when reading the union changes them in its layers, beside overlayfs with the same options."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.cli_calls import Place, succeed
from tests.mount.user_calls import Host
from tests.support.mounting import kernel_mounted, mounted

OLDER = (10**9, 10**9 + 5)
"""An atime before the mtime: relatime changes it."""
RECENT = "recent"
"""An atime after mtime and ctime, and of the last day: relatime keeps it."""


def _build(root: Path) -> None:
    for name in ("lower", "upper", "work"):
        (root / name).mkdir()
    (root / "lower/d").mkdir()
    (root / "lower/f").write_bytes(b"low")
    (root / "lower/d/x").write_bytes(b"low")
    for path in (root / "lower/f", root / "lower/d", root / "lower/d/x"):
        os.utime(path, OLDER)


@contextmanager
def _both(area: Path, session: str, options: list[str]) -> Iterator[tuple[Path, Path]]:
    for name in ("u", "k"):
        (area / name).mkdir()
        _build(area / name)

    def layers(name: str) -> dict[str, Path]:
        return {"upper": area / name / "upper", "work": area / name / "work"}

    home, other = area / "u", area / "k"
    with (
        mounted(home, lowers=[home / "lower"], session=session, options=options, **layers("u")) as ours,
        kernel_mounted(other, lowers=[other / "lower"], **layers("k")) as theirs,
    ):
        words = ",".join(["remount", *(options or ["relatime"])])
        subprocess.run(["mount", "-o", words, str(theirs.mountpoint)], check=True)
        yield ours.mountpoint, theirs.mountpoint


def _changes(path: Path, times: object, read: Callable[[Path], object]) -> bool:
    """Whether reading changes the access time."""
    if times == RECENT:
        os.utime(path, ns=(time.time_ns(), time.time_ns() - 10**9))
        time.sleep(0.05)
        before = path.stat().st_mtime_ns
        os.utime(path, ns=(time.time_ns() + 10**8, before))
    else:
        os.utime(path, OLDER)
    before = path.stat().st_atime_ns
    time.sleep(0.02)
    read(path)
    return path.stat().st_atime_ns != before


@pytest.mark.parametrize("option", ["", "relatime", "noatime", "strictatime", "nodiratime"])
def test_the_upper_by_the_unions_options(
    kernel_overlay: None, area: Path, session: str, option: str
) -> None:
    with _both(area, session, [option] if option else []) as roots:
        seen = []
        for root in roots:
            (root / "own").mkdir()
            (root / "own/x").write_bytes(b"own")
            found = []
            for number, times in enumerate((OLDER, RECENT)):
                new = root / f"new{number}"
                new.write_bytes(b"own")
                found.append(_changes(root / "own", times, os.listdir))
                if session != "direct-cached":  # what was written is read from the page cache
                    found.append(_changes(new, times, Path.read_bytes))
            seen.append(found)
        assert seen[0] == seen[1]


@pytest.mark.parametrize("option", ["", "strictatime"])
def test_a_lowers_never_change(kernel_overlay: None, area: Path, session: str, option: str) -> None:
    with _both(area, session, [option] if option else []) as roots:
        for root in roots:
            (root / "f").read_bytes()
            os.listdir(root / "d")
            (root / "d/x").read_bytes()
            (root / "d/x").chmod(0o600)
            lower = root.parent / "lower"
            for path in (lower / "f", lower / "d", lower / "d/x"):
                assert path.stat().st_atime == OLDER[0]


def test_a_lowers_never_change_as_a_user(host: Host, place: Place) -> None:
    paths = [place.lower / "base", place.lower2 / "deep", place.lower, place.lower2]
    for path in paths:
        os.utime(path, OLDER)
    host.mount()
    for command in (f"cat {place.merged}/*", f"ls -lR {place.merged}", f"echo more >> {place.merged}/base"):
        succeed(host.run("sh", "-c", command))
    assert [path.stat().st_atime for path in paths] == [OLDER[0]] * len(paths)


def test_noatime_as_a_user(host: Host, place: Place) -> None:
    (place.upper / "own").write_bytes(b"own")
    os.chown(place.upper / "own", place.upper.stat().st_uid, -1)
    os.utime(place.upper / "own", OLDER)
    host.mount("-o", "noatime")
    succeed(host.run("cat", place.merged / "own"))
    assert (place.upper / "own").stat().st_atime == OLDER[0]
