"""Who waits for a mount, and sees how far long operations are."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest

from unionfs.core.samepages import SamePages
from unionfs.daemon.caller import Caller, MustRunThere, result
from unionfs.storage.archive.progress import UNSEEN, Progress


@contextmanager
def _shows(what: str, stream: TextIO) -> Iterator[Progress]:
    stream.write(f"{what} begins\n")
    yield UNSEEN
    stream.write(f"{what} ends\n")


def test_what_is_shown_while_the_caller_waits(tmp_path: Path) -> None:
    """On the stderr of the beginning, wherever fd 2 leads by then."""
    caller, before = Caller(), os.dup(2)
    assert list(caller.fds) == []
    with caller.shown("this") as progress:
        assert progress is UNSEEN
    with (tmp_path / "first").open("wb") as first, (tmp_path / "second").open("wb") as second:
        try:
            os.dup2(first.fileno(), 2)
            caller.watches(_shows)
            os.dup2(second.fileno(), 2)
            (fd,) = caller.fds
            assert os.path.samestat(os.fstat(fd), os.fstat(first.fileno()))
            for _ in range(2):  # it stays open
                with caller.shown("that"):
                    pass
        finally:
            os.dup2(before, 2)
            os.close(before)
        caller.goes()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        assert list(caller.fds) == []
        with caller.shown("more"):
            pass
        caller.goes()
    assert (tmp_path / "first").read_text() == "that begins\nthat ends\n" * 2
    assert (tmp_path / "second").read_text() == ""


def test_a_caller_that_wants_to_see_nothing() -> None:
    caller = Caller()
    caller.watches(_shows)
    (fd,) = caller.fds
    caller.watches(None)
    assert list(caller.fds) == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_the_call_of_a_launcher() -> None:
    caller, pages = Caller(), SamePages()
    caller.needs_own_process()
    assert (caller.launcher, caller.pages) == (None, None)
    here, there = socket.socketpair()
    with here, there:
        caller.follow(here, pages)
        assert caller.launcher is here
        assert caller.pages is pages
        with pytest.raises(MustRunThere):
            caller.needs_own_process()
    pages.close()


def test_the_message_with_the_exit_code() -> None:
    """A byte, as the kernel has it of exit(3)."""
    assert [result(code) for code in (0, 1, 125, -1)] == [b"R\0", b"R\1", b"R\x7d", b"R\xff"]
