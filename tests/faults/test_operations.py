"""Faults in changes of a union, chosen by what the call is made on: those that once had another result."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults import injecting
from tests.faults.batch import Case, Errors, Expected
from tests.faults.injecting import Fault
from tests.faults.operations import OPERATIONS

pytestmark = pytest.mark.usefixtures("kernel_overlay")

_MOST = 12
"""Calls of one kind on a file."""


@pytest.mark.parametrize(("name", "io", "call", "end"), [
    ("metacopy write", "hybrid", "newfstatat", "/low"),
    ("metacopy write", "cached", "newfstatat", "/low"),
    ("tmpfile", "hybrid", "newfstatat", " (deleted)"),
    ("chown up", "hybrid", "newfstatat", "/up"),
    ("truncate up", "cached", "utimensat", "/up"),
    ("create in lower", "hybrid-plain", "newfstatat", "/d/new"),
    ("create", "hybrid-plain", "newfstatat", "/new"),
])  # fmt: skip
def test_what_cannot_be_examined_or_set(area: Path, name: str, io: str, call: str, end: str) -> None:
    """Nothing stays open, the kernel knows what has changed, and the caller gets that error or none."""
    if reason := injecting.reason():
        pytest.skip(reason)
    (found,) = [one for one in OPERATIONS if one.name == name]

    def act(top: str) -> None:
        for entry in os.scandir(top):  # so the kernel has the attributes
            entry.stat(follow_symlinks=False)
        found.act(top)

    operation = replace(found, act=act)
    faults = [Fault(number, errno.EIO, on=(call, end)) for number in range(1, _MOST + 1)]
    cases = [Case(operation, fault) for fault in faults]
    done = Errors(area / "b", f"direct-{io}", cases, Expected(area)).run()
    assert done.problems == []
    assert done.tried > 0


def test_an_interrupted_write_back(area: Path) -> None:
    """Who repeats an interrupted fsync(2) learns that the data is lost."""
    if reason := injecting.reason():
        pytest.skip(reason)
    (operation,) = [one for one in OPERATIONS if one.name == "write large"]
    case = Case(operation, Fault(1, errno.EINTR, on=("renameat", "")))
    assert Errors(area / "b", "direct-cached", [case], Expected(area)).run().problems == []
    assert case.error is not None
    assert case.error.errno == errno.EIO


def test_times_of_an_interrupted_write_back(area: Path) -> None:
    """The same of the times that the kernel has kept."""
    if reason := injecting.reason():
        pytest.skip(reason)
    (operation,) = [one for one in OPERATIONS if one.name == "write linked"]
    faults = [
        Fault(number, errno.EINTR, on=on)
        for on in (("newfstatat", "/two"), ("utimensat", ""))
        for number in range(1, _MOST + 1)
    ]
    cases = [Case(operation, fault) for fault in faults]
    assert Errors(area / "b", "direct-cached", cases, Expected(area)).run().problems == []
    assert errno.EIO in [case.error.errno for case in cases if case.error is not None]


def test_a_rename_over_an_emptied_directory(area: Path) -> None:
    """Nothing stays in the work directory if it fails."""
    if reason := injecting.reason():
        pytest.skip(reason)
    (operation,) = [one for one in OPERATIONS if one.name == "rename directory over emptied"]
    cases = [Case(operation, Fault(number, errno.ENOSPC, on=("renameat2", ""))) for number in range(1, 6)]
    assert Errors(area / "b", "direct-cached", cases, Expected(area)).run().problems == []
