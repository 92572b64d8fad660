"""A process that forks one for each connection. Each test runs in an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.worker import REPOSITORY

PRELUDE = """
import os, signal, socket, sys
from unionfs.core.forking import IDLE, REFUSED, Forking

listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(8)
listener.setblocking(False)
ours, theirs = socket.socketpair()
forking = Forking(listener.fileno(), theirs.detach(), 3)

def connected():
    client = socket.socket(socket.AF_UNIX)
    client.connect(sys.argv[1])
    return client

def answer(connection, code=0):
    one = socket.socket(fileno=connection)
    one.sendall(b"%d" % (os.getppid() == parent))
    os._exit(code)

parent = os.getpid()
"""


def run(code: str, path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, path / "socket"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_each_connection_has_a_process(tmp_path: Path) -> None:
    run("""
clients = [connected() for _ in range(3)]
if (connection := forking.next(100)) >= 0:
    answer(connection)
assert connection == IDLE
assert forking.forked == 4
for client in (ours, *clients):
    assert client.recv(10) == b"1"
    assert client.recv(10) == b""  # the other ends are closed
try:
    os.wait()
except ChildProcessError:  # nobody is left behind
    pass
else:
    assert forking.next(0) == IDLE
""", tmp_path)


def test_the_first_connection_has_one_process(tmp_path: Path) -> None:
    """Its number is another file's afterwards."""
    run("""
if (connection := forking.next(0)) >= 0:
    answer(connection)
assert ours.recv(10) == b"1"
opened = [os.open("/", os.O_RDONLY) for _ in range(8)]
client = connected()
if (connection := forking.next(100)) >= 0:
    answer(connection)
assert forking.forked == 2
assert client.recv(10) == b"1"
for fd in opened:
    os.close(fd)
""", tmp_path)


def test_a_process_that_refuses(tmp_path: Path) -> None:
    run("""
clients = [connected() for _ in range(2)]
if (connection := forking.next(60_000)) >= 0:
    answer(connection, 3)
assert connection == REFUSED
""", tmp_path)


def test_signals(tmp_path: Path) -> None:
    """Handlers run at once, and a forked process has the mask of before."""
    run("""
def leave(*_):
    raise SystemExit(0 if forking.forked == 1 else 1)

before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
signal.signal(signal.SIGTERM, leave)
if (connection := forking.next(60_000)) >= 0:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    os.write(connection, b"1" if mask == before - {signal.SIGCHLD} else b"0")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(parent, signal.SIGTERM)
    os._exit(0)
""", tmp_path)
