"""`run -d`: the container goes on in a process of its own, while its caller ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NoReturn

from unionfs.errors import UserError
from unionfs.sys.process import to_null

_STARTED: Final = b"\0"
OWN_FAILURE: Final = 125
"""The exit code if a container cannot be started, as docker's."""


def start(run: Callable[[Callable[[], None], Callable[[str], None]], int]) -> tuple[int, str]:
    """Call `run` in a new session; return when it has called its first argument, or has ended.

    `run` gets what reports that the command has started, and what reports a sentence. Returns 0 or the exit
    code of a failure, and the sentences.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _go_on(run, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    if said.endswith(_STARTED):
        return 0, said[: -len(_STARTED)].decode("utf-8", "surrogateescape").strip()
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code > 0 else OWN_FAILURE, said.decode("utf-8", "surrogateescape").strip()


def _go_on(run: Callable[[Callable[[], None], Callable[[str], None]], int], writer: int) -> NoReturn:
    code = OWN_FAILURE
    try:
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        to_null(range(3))

        def started() -> None:
            with suppress(OSError):
                os.write(writer, _STARTED)
                os.close(writer)

        def report(sentence: str) -> None:
            line = f"{sentence}\n".encode("utf-8", "surrogateescape")
            try:
                os.write(writer, line)
            except OSError:  # started: the caller has gone, and stderr is the container's output
                with suppress(OSError):
                    os.write(2, b"unionfs: " + line)

        try:
            code = run(started, report)
        except UserError as error:
            report(str(error))
            code = getattr(error, "code", OWN_FAILURE)
        except Exception as error:
            report(f"internal error: {type(error).__name__}: {error}.")
    finally:
        os._exit(code)
