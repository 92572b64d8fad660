"""What current users of a lower file see when others change it: as on overlayfs, or closer to native.

With passthrough, and with hybrid if it is a program, a process keeps the lower file it has open: DEVIATIONS
lists the effects, as does the table of docs/compliance.md (`scripts/compliance-tables --write` generates it).
"""

from __future__ import annotations

import errno
import os

import pytest

from tests.support import tables
from tests.support import who_sees_what as wsw
from tests.support.who_sees_what import PLACES, REFUSED, SAME, Trial, tried

STALE = os.strerror(errno.ESTALE)

DEVIATIONS = {
    "read of an old descriptor": "old",
    "an old mapping": "old",
    "flock, old and new descriptor": "do not meet",
    "POSIX lock, old and new descriptor": "do not meet",
    "inotify watch on the path": "no event",
    "old descriptor opened again for writing": STALE,
    "old descriptor opened again for reading": STALE,
    "unlinked, then written: read of an old descriptor": "old",
}
"""Rows where such a file is neither as native nor as overlayfs, for every writer."""

OTHERWISE = {
    (wsw.WRITING, "/proc/self/fd"): STALE,
    (wsw.WRITING_UNLINKED, "/proc/self/fd"): STALE,
    ("inotify watch on the path", "truncate"): "event",
}
"""By row and writer: an open file cannot be reopened for writing; truncating by name opens nothing, so it
affects the watched node."""

both = pytest.mark.parametrize("read_only", [False, True], ids=["lower", "read-only-lower"])
of = pytest.mark.parametrize("program", [False, True], ids=["data", "program"])


@pytest.fixture(autouse=True)
def _needs(kernel_overlay: None) -> None:
    """Root, and overlayfs to compare with."""


@pytest.fixture
def place(session: str) -> str:
    """The session, if the table has a column for it."""
    if session not in PLACES:
        pytest.skip(f"the table has no column for {session}")
    return session


@of
def test_a_native_filesystem_shows_what_was_written(program: bool) -> None:
    """The expected content after each writer, and a proof that the probes detect differences."""
    for trial in tried("native", program=program).trials:
        assert (trial.code, trial.content) == (0, trial.final), trial
    cells = tried("native", program=program).cells()
    assert {cells[row, "O_TRUNC"] for row in wsw.IN_ORDER} == {"writes", "new", "meet", "event", "0"}


@of
@both
def test_the_lower_is_never_written(place: str, read_only: bool, program: bool) -> None:
    """Not a byte, not a time: in every way that data gets into the upper."""
    found = tried(place, read_only=read_only, program=program)
    assert found.after == found.before
    assert found.before


@of
@both
def test_what_is_written_is_in_the_upper(place: str, read_only: bool, program: bool) -> None:
    """After fsync and close, before and after the end of the mount, and in the merged tree."""
    for trial in tried(place, read_only=read_only, program=program).trials:
        if trial.code:
            _nothing_has_changed(trial)
            continue
        stored = "whiteout" if trial.unlinked else trial.final
        assert (trial.content, trial.upper, trial.upper_later) == (trial.final, stored, stored), trial


def _nothing_has_changed(trial: Trial) -> None:
    """After a failed open: a copy may have been made, with the same content."""
    if trial.unlinked:
        assert trial.upper == trial.upper_later == "whiteout", trial
    else:
        assert trial.content == trial.old, trial
        assert {trial.upper, trial.upper_later} <= {None, trial.old}, trial


@of
@both
def test_as_overlayfs_or_nearer_to_native(place: str, read_only: bool, program: bool) -> None:
    """Every cell; of a file that is passed through all except the deviations, and these exactly."""
    native = tried("native", program=program).cells()
    overlay = tried("overlay", read_only=read_only, program=program).cells()
    wrong = {}
    for key, cell in tried(place, read_only=read_only, program=program).cells().items():
        allowed = {native[key], overlay[key]}
        if place == "direct-passthrough" or (program and place == wsw.PROGRAMS):
            row, writer = key
            # a writer through an open descriptor is refused, so there is no change to see
            if writer == "/proc/self/fd" and key not in OTHERWISE:
                allowed = {REFUSED}
            elif (deviation := OTHERWISE.get(key, DEVIATIONS.get(row))) is not None and native[key] != SAME:
                allowed = {deviation}
        if cell not in allowed:
            wrong[key] = cell, allowed
    assert not wrong


@of
def test_a_read_only_lower_makes_no_difference(place: str, program: bool) -> None:
    """The results are the same."""
    assert tried(place, read_only=True, program=program).cells() == tried(place, program=program).cells()


@pytest.mark.parametrize("column", ["native", "overlay"])
def test_the_table_of_the_references(column: str) -> None:
    """The documented columns of the native filesystem and of overlayfs equal the results."""
    assert tables.documented("who-sees-what", PLACES[column]) == wsw.column(column)


def test_the_table(place: str) -> None:
    """The documented column equals the results; `scripts/compliance-tables --write` updates it."""
    assert tables.documented("who-sees-what", PLACES[place]) == wsw.column(place)
    if place == wsw.PROGRAMS:
        programs = tables.documented("who-sees-what", wsw.PROGRAMS_TITLE)
        assert programs == wsw.column(place, program=True)
