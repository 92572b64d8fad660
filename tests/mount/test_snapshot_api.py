"""`unionfs.branches.Snapshots` and `TrioSnapshots`: the same as the commands, and their errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import Place
from tests.support.live_lowers import shown
from unionfs.branches import SnapshotError, Snapshots


def _changes(snapshots: Snapshots, *names: str) -> list[tuple[str, str]]:
    return [(one["change"], one["path"]) for one in snapshots.diff(*names)]


def test_in_python(kernel_overlay: None, place: Place) -> None:
    place.mount()
    snapshots, root = Snapshots(place.merged), place.merged
    assert snapshots.ls() == []
    (root / "base").write_text("first\n")
    before = shown(root)
    assert snapshots.create("first")["name"] == "first"
    (root / "base").write_text("second\n")
    (root / "new").write_text("new\n")
    with (root / "new").open("ab", buffering=0) as file:
        taken = snapshots.create(stop=False)
        file.write(b"later\n")
    assert (taken["open_files"], taken["stopped"]) == (1, 0)
    assert [one["name"] for one in snapshots.ls()] == ["first", taken["name"]]
    assert _changes(snapshots, "first", taken["name"]) == [("C", "base"), ("A", "new")]
    assert _changes(snapshots, taken["name"]) == [("C", "new")]
    (changed,) = snapshots.diff(taken["name"], content=True)
    assert "+later" in changed["diff"]
    snapshots.restore("first")
    assert shown(root) == before
    snapshots.rm(taken["name"], wait=True)
    assert [one["name"] for one in snapshots.ls()] == ["first"]
    assert len(list(Path(f"{place.upper}.snapshots").glob("0*"))) == 1


def test_errors(kernel_overlay: None, place: Place) -> None:
    with pytest.raises(SnapshotError, match="not an active unionfs mount"):
        Snapshots(place.merged).create()
    place.mount()
    snapshots = Snapshots(place.merged)
    with pytest.raises(SnapshotError, match="has no snapshot none"):
        snapshots.restore("none")
    for name in ("--no-stop", "-x", "a/b", "", "..", "a\nb"):
        with pytest.raises(SnapshotError):
            snapshots.create(name)
    assert snapshots.ls() == []


@pytest.mark.slow
def test_with_trio(kernel_overlay: None, place: Place) -> None:
    place.mount()
    script = (
        "import pathlib, sys, trio, unionfs.branches\n"
        "async def main():\n"
        "    root = pathlib.Path(sys.argv[1])\n"
        "    snapshots = unionfs.branches.TrioSnapshots(root)\n"
        "    await snapshots.create('first')\n"
        "    (root / 'new').touch()\n"
        "    print([one['path'] for one in await snapshots.diff('first')])\n"
        "    await snapshots.restore('first')\n"
        "    print((root / 'new').exists(), len(await snapshots.ls()))\n"
        "    await snapshots.rm('first')\n"
        "    print(await snapshots.ls())\n"
        "trio.run(main)\n"
    )
    done = cli_calls.call((sys.executable, "-c", script), place.merged)
    assert (done.stdout, done.stderr) == ("['new']\nFalse 1\n[]\n", "")
