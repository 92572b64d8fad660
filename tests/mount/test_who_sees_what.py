"""What current users of a lower file see when others change it: as on overlayfs, or closer to native.

With passthrough a process keeps the lower file it has open: DEVIATIONS lists the effects, as does the table
of docs/compliance.md, which `scripts/compliance-tables --write` generates.
"""

from __future__ import annotations

import errno
import os

import pytest

from tests.support import tables
from tests.support import who_sees_what as wsw
from tests.support.who_sees_what import PLACES, REFUSED, SAME, Trial, tried
from tests.support.writers import OLD, WRITERS

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
"""Rows where passthrough is neither as native nor as overlayfs, for every writer."""

OTHERWISE = {
    (wsw.WRITING, "/proc/self/fd"): STALE,
    (wsw.WRITING_UNLINKED, "/proc/self/fd"): STALE,
    ("inotify watch on the path", "truncate"): "event",
}
"""By row and writer: an open file cannot be reopened for writing; truncating by name opens nothing, so it
affects the watched node."""

both = pytest.mark.parametrize("read_only", [False, True], ids=["lower", "read-only-lower"])


@pytest.fixture(autouse=True)
def _needs(kernel_overlay: None) -> None:
    """Root, and overlayfs to compare with."""


@pytest.fixture
def place(session: str) -> str:
    """The session, if the table has a column for it."""
    if session not in PLACES:
        pytest.skip(f"the table has no column for {session}")
    return session


def test_a_native_filesystem_shows_what_was_written() -> None:
    """The expected content after each writer, and a proof that the probes detect differences."""
    for trial in tried("native").trials:
        assert (trial.code, trial.content) == (0, WRITERS[trial.writer].final), trial
    cells = tried("native").cells()
    assert {cells[row, "O_RDWR"] for row in wsw.IN_ORDER} == {"writes", "new", "meet", "event", "0"}


@both
def test_the_lower_is_never_written(place: str, read_only: bool) -> None:
    """Not a byte, not a time: in every way that data gets into the upper."""
    found = tried(place, read_only=read_only)
    assert found.after == found.before
    assert found.before


@both
def test_what_is_written_is_in_the_upper(place: str, read_only: bool) -> None:
    """After fsync and close, before and after the end of the mount, and in the merged tree."""
    for trial in tried(place, read_only=read_only).trials:
        if trial.code:
            _nothing_has_changed(trial)
            continue
        final = WRITERS[trial.writer].final
        stored = "whiteout" if trial.unlinked else final
        assert (trial.content, trial.upper, trial.upper_later) == (final, stored, stored), trial


def _nothing_has_changed(trial: Trial) -> None:
    """After a failed open: a copy may have been made, with the same content."""
    if trial.unlinked:
        assert trial.upper == trial.upper_later == "whiteout", trial
    else:
        assert trial.content == OLD, trial
        assert {trial.upper, trial.upper_later} <= {None, OLD}, trial


@both
def test_as_overlayfs_or_nearer_to_native(place: str, read_only: bool) -> None:
    """Every cell; with passthrough all except the deviations, and these exactly."""
    native, overlay = tried("native").cells(), tried("overlay", read_only=read_only).cells()
    wrong = {}
    for key, cell in tried(place, read_only=read_only).cells().items():
        allowed = {native[key], overlay[key]}
        if place == "direct-passthrough":
            row, writer = key
            # a writer through an open descriptor is refused, so there is no change to see
            if writer == "/proc/self/fd" and key not in OTHERWISE:
                allowed = {REFUSED}
            elif (deviation := OTHERWISE.get(key, DEVIATIONS.get(row))) is not None and native[key] != SAME:
                allowed = {deviation}
        if cell not in allowed:
            wrong[key] = cell, allowed
    assert not wrong


def test_a_read_only_lower_makes_no_difference(place: str) -> None:
    """The results are the same."""
    assert tried(place, read_only=True).cells() == tried(place).cells()


@pytest.mark.parametrize("column", ["native", "overlay"])
def test_the_table_of_the_references(column: str) -> None:
    """The documented columns of the native filesystem and of overlayfs equal the results."""
    assert tables.documented("who-sees-what", PLACES[column]) == wsw.column(column)


def test_the_table(place: str) -> None:
    """The documented column equals the results; `scripts/compliance-tables --write` updates it."""
    assert tables.documented("who-sees-what", PLACES[place]) == wsw.column(place)
