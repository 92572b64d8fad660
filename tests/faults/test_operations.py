"""Faults in changes of a union, chosen by what the call is made on: those that once had another result."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults import injecting
from tests.faults.batch import Case, Errors, Expected
from tests.faults.deaths import Deaths, resends
from tests.faults.injecting import KILL, Fault
from tests.faults.operations import OPERATIONS, Operation
from unionfs.sys import calls

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


def _append_to_append_only(top: str) -> None:
    """Two appends, each of which is written back by an fsync(2); then the flag is removed again."""
    with open(f"{top}/up", "rb") as file:
        before = calls.get_flags(file.fileno())
        calls.set_flags(file.fileno(), before | calls.FS_APPEND)
        try:
            with open(f"{top}/up", "ab", buffering=0) as appended:
                for data in (b"one", b"two"):
                    appended.write(data)
                    os.fsync(appended)
        finally:
            calls.set_flags(file.fileno(), before)


def test_an_append_that_is_sent_again(area: Path) -> None:
    """A daemon dies after it has written to the end of an append-only file, before its answer."""
    if reason := injecting.reason():
        pytest.skip(reason)
    if not resends():
        pytest.skip("FUSE_NOTIFY_RESEND needs Linux 6.9")
    (files,) = [one.build for one in OPERATIONS if one.name == "unlink up"]
    operation = Operation("append", files, _append_to_append_only)
    faults = [Fault(number, KILL, on=("writev an answer", "")) for number in range(1, 31)]
    cases = [Case(operation, fault) for fault in faults]
    done = Deaths(area / "b", "direct-cached", cases, Expected(area)).run()
    assert done.problems == []
    assert done.tried > 0


def _link_and_unlink(top: str) -> None:
    """Of a lower's file with three names."""
    os.link(f"{top}/one", f"{top}/four")
    os.unlink(f"{top}/one")
    if os.stat(f"{top}/two").st_nlink != 3:
        raise OSError(errno.EIO, f"{os.stat(f'{top}/two').st_nlink} links")


@pytest.mark.parametrize("io", ["hybrid", "hybrid-plain"])
@pytest.mark.parametrize("call", ["lsetxattr", "linkat"])
def test_names_of_a_copy_whose_daemon_dies(area: Path, call: str, io: str) -> None:
    """Their number is right, also while it is stored in another way."""
    if reason := injecting.reason():
        pytest.skip(reason)
    if not resends():
        pytest.skip("FUSE_NOTIFY_RESEND needs Linux 6.9")
    (links,) = [one.build for one in OPERATIONS if one.name == "link of linked"]
    operation = Operation("link and unlink", links, _link_and_unlink)
    cases = [Case(operation, Fault(number, KILL, on=(call, ""))) for number in range(1, 9)]
    done = Deaths(area / "b", f"direct-{io}", cases, Expected(area)).run()
    assert done.problems == []
    assert done.tried > 0


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
