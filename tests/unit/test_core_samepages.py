"""Memory in common of forked processes. Each test has an interpreter of its own, and changes its memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.sanitizer import SANITIZED
from tests.support.worker import REPOSITORY

pytestmark = pytest.mark.skipif(
    SANITIZED, reason="it reads whole pages, also parts of them that are free, which AddressSanitizer reports"
)

PRELUDE = """
import fcntl, mmap, os, resource, signal, sys
from unionfs.core.samepages import SamePages

PAGES = 300
memory = [bytearray(4096 * 4) for _ in range(PAGES)]
shared = SamePages()

def private():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Private_Dirty"):
            return int(line.split()[1])

def change(own=b""):
    for one in memory:
        one[4096:4105] = b"different"
    memory[7][9000:9000 + len(own)] = own

def right(own=b""):
    return all(one[4096:4105] == b"different" for one in memory) and memory[7][9000:9000 + len(own)] == own

def forked(run):
    pid = os.fork()
    if pid == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_equal_pages_become_one() -> None:
    """The content stays, each process's own, too; later changes are seen by the process alone."""
    run("""
def first():
    change(b"the first")
    assert shared.begin()
    assert sum(shared.adopt()) >= PAGES
    assert right(b"the first")

def second():
    change(b"the second")
    assert shared.begin()
    before = private()
    assert sum(shared.adopt()) >= PAGES
    assert private() < before - PAGES * 3  # not 4: counting dirties some
    assert right(b"the second")
    memory[8][4096:4105] = b"another's"

def third():
    change(b"the third")
    assert shared.begin()
    sum(shared.adopt())
    assert right(b"the third")
    more = [bytearray(4096 * 4) for _ in range(PAGES)]
    memory.clear()

for one in (first, second, third):
    forked(one)
""")


def test_nobody_changes_the_pattern() -> None:
    run("""
def first():
    change()
    assert shared.begin()

def second():
    for what in (lambda: os.pwrite(shared.fd, b"x" * 4096, 4096), lambda: os.ftruncate(shared.fd, 0)):
        try:
            what()
        except PermissionError:
            continue
        raise AssertionError
    try:
        mmap.mmap(shared.fd, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE)
    except PermissionError:
        return
    raise AssertionError

forked(first)
forked(second)
""")


def test_another_pattern() -> None:
    """One that a process gone wrong has written: none of it counts."""
    run("""
import ctypes

def first():
    for one in memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(one)) // 4096 * 4096
        os.pwrite(shared.fd, b"wrong" * 4000, address)
    fcntl.fcntl(shared.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)

def second():
    change(b"the second")
    assert shared.begin()
    sum(shared.adopt())
    assert right(b"the second")

forked(first)
forked(second)
""")


def test_a_process_that_is_killed_while_it_writes() -> None:
    run("""
def first():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    change()
    try:
        shared.begin()
    except OSError:
        assert right()
        return
    raise AssertionError

def second():
    change()
    assert shared.begin()
    assert sum(shared.adopt()) >= PAGES
    assert right()

forked(first)
forked(second)
""")


def test_two_at_once() -> None:
    """While one process writes the pattern, others do without it."""
    run("""
fcntl.lockf(shared.fd, fcntl.LOCK_EX)

def first():
    change()
    assert not shared.begin()

forked(first)
""")


def test_where_there_is_no_memory_file() -> None:
    run("""
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
try:
    SamePages()
except OSError:
    sys.exit(0)
sys.exit(1)
""")
