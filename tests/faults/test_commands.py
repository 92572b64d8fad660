"""Faults in commands, chosen by what the system call is made on: those that once had another result."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from tests.faults import branches, commands, images, injecting
from tests.faults.injecting import KILL, Fault

pytestmark = pytest.mark.usefixtures("kernel_overlay")


@pytest.fixture(autouse=True)
def _injects() -> None:
    if reason := injecting.reason():
        pytest.skip(reason)


def _last(points: list[str], call: str, end: str, error: int = errno.EIO) -> Fault:
    """A fault in the last call of that kind on a path with that end."""
    count = sum(point.startswith(call) and point.endswith(end) for point in points)
    return Fault(count, error, on=(call, end))


def _scenario(name: str) -> branches.Scenario:
    return next(one for one in branches.SCENARIOS if one.name == name)


def test_a_commit(area: Path) -> None:
    """What cannot be looked at does not exist, is no conflict and no mistake; what is in place stays."""
    with branches.staged(area / "stage", _scenario("branch commit")) as stage:
        points = stage.points()
        for call, end in (
            ("newfstatat", "/branches/br"), ("getdents64", "/work/index"), ("newfstatat", "/base/d/f1"),
            ("openat", "/storage/branches"), ("close", "/base"),
        ):  # fmt: skip
            fault = _last(points, call, end)
            assert list(stage.try_fault(fault)) == []
            assert fault.hit


def test_an_undo(area: Path) -> None:
    """The branch is not lost, and what was undone is committed again."""
    with branches.staged(area / "stage", _scenario("branch undo")) as stage:
        points = stage.points()
        for call, end in (
            ("newfstatat", "/branch"), ("renameat2", ""), ("openat", "/last.json"),
            ("openat", "/journal.json"),
        ):  # fmt: skip
            fault = _last(points, call, end)
            assert list(stage.try_fault(fault)) == []
            assert fault.hit


@pytest.mark.parametrize(("name", "call", "end", "error"), [
    ("layer import", "fchownat", "/s", KILL),
    ("layer import", "close", "/base.tar", errno.EIO),
    ("image import", "fsync", "/layers/trusted", errno.EIO),
    ("image import", "read", "/layer.json", errno.EIO),
    ("image import", "close", "/root/d", errno.EIO),
])  # fmt: skip
def test_a_layer(area: Path, name: str, call: str, end: str, error: int) -> None:
    """Nothing is left of one that is not there, and one that is there is reported so."""
    (scenario,) = [one for one in images.SCENARIOS if one.name == name]
    reference = commands.reference(area / "reference", scenario)
    fault = _last(reference.points, call, end, error)
    assert commands.tried(area / "place", scenario, fault, reference) == []
    assert fault.hit


def test_a_commit_to_an_image(area: Path) -> None:
    """A list of mounts that cannot be read is reported so, not as a mount that is missing; an error of
    closing what was only read is none; an archive whose name cannot be made durable is there."""
    (scenario,) = [one for one in images.SCENARIOS if one.name == "commit to an image"]
    reference = commands.reference(area / "place", scenario)
    for fault in (
        *(Fault(1, errno.EIO, on=(call, "/run/unionfs")) for call in ("openat", "newfstatat", "close")),
        *(Fault(1, errno.EIO, on=(call, ".json")) for call in ("openat", "read", "close")),
        _last(reference.points, "openat", "/run/unionfs"),
        _last(reference.points, "close", " (deleted)"),
        _last(reference.points, "fsync", "/place"),
    ):
        assert commands.tried(area / "place", scenario, fault, reference) == []
        assert fault.hit


def test_a_backup(area: Path) -> None:
    """Another one removes the user that a killed one has begun to record, and keeps space for one again. An
    archive gets its name at once, and is a success although its user cannot be removed; one whose name
    cannot be made durable is there, as the command says."""
    reference = commands.reference(area / "place", commands.BACKUP)
    stats = sum(re.fullmatch("newfstatat .*/volumes/vol", one) is not None for one in reference.points)
    for fault in (
        Fault(1, KILL, on=("rename", ".new")),
        Fault(1, errno.EIO, on=("rename", ".new")),
        _last(reference.points, "getdents64", "/volumes/vol"),
        *(Fault(number, errno.EIO, on=("newfstatat", "/volumes/vol")) for number in range(1, stats + 1)),
        _last(reference.points, "openat", "/place/."),
        _last(reference.points, "fsync", "/place"),
    ):
        assert commands.tried(area / "place", commands.BACKUP, fault, reference) == []
        assert fault.hit
    assert not any(point.startswith("renameat ") for point in reference.points)


def test_a_backup_over_its_base(area: Path) -> None:
    """An archive that others need is not replaced because it could not be looked at."""
    place = area / "place"
    place.mkdir()
    commands.CHANGED.prepare(place)
    archive = place / "vol.tar"
    before = archive.read_bytes()
    fault = Fault(1, errno.EIO, on=("newfstatat", "/vol.tar"))
    words = ["volume", "backup", "vol", "--since", str(archive), "-o", str(archive)]
    outcome, _ = commands.run(place, words, fault)
    assert fault.hit
    assert commands.message(outcome, fault) == []
    assert archive.read_bytes() == before


def test_a_mount_of_snapshots(area: Path) -> None:
    """They are not left out because they cannot be looked for."""
    (scenario,) = [one for one in commands.SCENARIOS if one.name == "mount of snapshots"]
    reference = commands.reference(area / "reference", scenario)
    count = sum(one.endswith("/upper.snapshots") for one in reference.points)
    faults = [Fault(number, errno.EIO, on=("", "/upper.snapshots")) for number in range(1, count + 1)]
    for fault in faults:
        assert commands.tried(area / "place", scenario, fault, reference) == []
    assert faults[0].hit


def test_a_restore(area: Path) -> None:
    """The old content is back if the new one's name cannot be made durable; the archive was only read."""
    reference = commands.reference(area / "reference", commands.CHANGED)
    for call, end in (("fsync", "/volumes/vol"), ("close", "/vol.tar")):
        fault = _last(reference.points, call, end)
        assert commands.tried(area / "place", commands.CHANGED, fault, reference) == []
        assert fault.hit


def test_a_restore_after_a_killed_one(area: Path) -> None:
    """The content that was set aside is not removed with the rest if it cannot be moved back."""
    place = area / "place"
    place.mkdir()
    commands.CHANGED.prepare(place)
    data = place / "storage/volumes/vol/_data"
    data.rename(data.with_name(".restore-x.old"))
    fault = Fault(1, errno.EIO, on=("rename", ".restore-x.old"))
    outcome, _ = commands.run(place, commands.CHANGED.arguments(place), fault)
    assert fault.hit
    assert commands.message(outcome, fault) == []
    assert (data.with_name(".restore-x.old") / "more").read_text() == "more"
    again, _ = commands.run(place, commands.CHANGED.arguments(place))
    assert again.code == 0
    assert sorted(path.name for path in data.iterdir()) == ["d", "f"]
