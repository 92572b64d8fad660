"""Upper, work and lowers below a directory of another user, who replaces them between check and use."""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.security import attacks
from tests.support import snapshot
from tests.support.worker import Worker
from unionfs.daemon import preflight
from unionfs.daemon.settle import settle
from unionfs.errors import LayerError, UserError
from unionfs.settings.mount import MountSettings
from unionfs.union.layers import LayerStack

ROUNDS = 1000


@pytest.fixture
def his(root: None, area: Path) -> Path:
    """A directory of uid 1001 with a lower, an upper and a work directory, and one named `other`."""
    place = area / "his"
    for name in ("lower", "upper", "work"):
        (place / name).mkdir(parents=True)
    (area / "merged").mkdir()
    for path in (place, *place.iterdir()):
        os.chown(path, 1001, 1001)
    return place


@pytest.fixture
def victim(area: Path) -> Path:
    """A directory of root that looks like a work directory containing files."""
    place = area / "victim"
    (place / "work").mkdir(parents=True)
    (place / "work/precious").write_text("data")
    (place / "work/#1").mkdir()
    (place / "work").chmod(0o755)
    return place


def _settings(his: Path) -> MountSettings:
    return settle(
        str(his.parent / "merged"),
        lowers=[str(his / "lower")],
        upper=str(his / "upper"),
        work=str(his / "work"),
    )


def _open(settings: MountSettings) -> None:
    LayerStack.open(settings.lowers, settings.upper, settings.work).close()


@pytest.mark.parametrize("name", ["lower", "upper", "work"])
@pytest.mark.parametrize("what", ["layer", "above"])
def test_symlinks_are_not_followed(his: Path, victim: Path, attacker: Worker, name: str, what: str) -> None:
    settings, before = _settings(his), snapshot.take(victim)
    preflight.check(settings)
    if what == "layer":
        attacker.call(os.rename, str(his / name), str(his / "moved"))
        attacker.call(os.symlink, str(victim), str(his / name))
    else:
        his.rename(his.parent / "moved")
        his.symlink_to(victim.parent)
        for wanted in ("lower", "upper", "work"):
            (victim.parent / wanted).symlink_to(victim)
    with pytest.raises(LayerError, match="symlink"):
        _open(settings)
    assert snapshot.take(victim) == before


@pytest.mark.parametrize("content", ["#1", "x", "incompat", "outer"])
def test_content_is_checked_by_what_is_opened(his: Path, attacker: Worker, content: str) -> None:
    settings = _settings(his)
    preflight.check(settings)
    attacker.call(os.rename, str(his / "work"), str(his / "moved"))
    attacker.call(os.mkdir, str(his / "work"))
    if content == "outer":
        attacker.call(os.mkdir, str(his / "work/kept"))
    attacker.call(os.mkdir, str(his / "work/work"), 0o755)
    attacker.call(os.mkdir, str(his / f"work/work/{content}"))
    if content == "#1":
        os.chown(his / "work/work", 1002, 1002)
    before = snapshot.take(his)
    with pytest.raises(LayerError, match={"#1": "uid 1002", "outer": "kept"}.get(content, content)):
        _open(settings)
    assert snapshot.take(his) == before


def test_what_is_ours_is_emptied(his: Path) -> None:
    for name in ("#12", "#x", "77", ".nfs" + "0a" * 12):
        (his / "work/work" / name / "deep").mkdir(parents=True)
    os.chown(his / "work/work", 1001, 1001)
    _open(_settings(his))
    assert os.listdir(his / "work/work") == []
    st = (his / "work/work").stat()
    assert (st.st_uid, stat.S_IMODE(st.st_mode)) == (0, 0o700)


def test_one_directory_twice(his: Path) -> None:
    with pytest.raises(LayerError, match="same directory"):
        LayerStack.open([str(his / "lower")], str(his / "upper"), str(his / "upper"))


@pytest.mark.parametrize("name", ["work", "upper", pytest.param("above", marks=pytest.mark.slow)])
def test_races(his: Path, victim: Path, attacker: Worker, name: str) -> None:
    """The checked path is repeatedly exchanged for a symlink, while root checks and opens it."""
    settings, before = _settings(his), snapshot.take(victim)
    link = his.parent / "link" if name == "above" else his / "link"
    link.symlink_to(victim.parent if name == "above" else victim)
    if name == "above":
        os.chown(his.parent, 1001, 1001)
        (victim.parent / "work").symlink_to(victim)
        (victim.parent / "upper").symlink_to(victim)
    attacker.call(attacks.swap, str(his if name == "above" else his / name), str(link))
    opened = refused = 0
    end = time.monotonic() + 10
    try:
        while opened + refused < ROUNDS and time.monotonic() < end:
            with suppress(UserError, OSError):
                preflight.check(settings)
            try:
                _open(settings)
                opened += 1
            except (LayerError, OSError):
                refused += 1
    finally:
        attacker.call(attacks.stop)
    assert snapshot.take(victim) == before
    assert opened
    assert refused
