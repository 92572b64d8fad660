"""Calls of the command line for the Python API, each in a process of its own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar

if TYPE_CHECKING:
    import trio

_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T")
_GRACE_SECONDS = 5


def program() -> list[str]:
    """The words that start `unionfs` with this interpreter."""
    return [sys.executable, "-m", "unionfs"]


def call(words: Sequence[str], error: type[Exception], *, codes: Sequence[int] = (0,)) -> Any:
    """Run `unionfs WORD...` and return the JSON that it prints. Raises `error` with the command's sentence
    for an exit code that is not in `codes`.
    """
    done = subprocess.run(
        [*program(), *words], text=True, stdin=subprocess.DEVNULL, errors="surrogateescape",
        capture_output=True,
    )  # fmt: skip
    if done.returncode not in codes:
        raise error(done.stderr.strip().removeprefix("unionfs: "))
    return json.loads(done.stdout)


async def in_thread(function: Callable[_P, _R], *arguments: _P.args, **options: _P.kwargs) -> _R:
    """Run a function in a thread of trio."""
    # For start-up time: only programs that use trio need it.
    import trio

    return await trio.to_thread.run_sync(partial(function, *arguments, **options))


class ForTrio(Generic[_T]):
    """An object whose methods are called in a thread of trio, which is not cancelled before their end."""

    def __init__(self, wrapped: _T) -> None:
        self._wrapped = wrapped


def threaded(
    method: Callable[Concatenate[_T, _P], _R],
) -> Callable[Concatenate[ForTrio[_T], _P], Coroutine[Any, Any, _R]]:
    """Return the method of `ForTrio` that calls a method of the wrapped object in a thread."""

    @wraps(method)
    async def call(self: ForTrio[_T], /, *arguments: _P.args, **options: _P.kwargs) -> _R:
        return await in_thread(method, self._wrapped, *arguments, **options)

    return call


async def run_to_end(
    words: Sequence[str], *, cwd: str | os.PathLike[str], input: str | None, capture_output: bool
) -> subprocess.CompletedProcess[str]:
    """Run a program, as subprocess.run with `text` does. When trio cancels it, it gets SIGTERM, and is killed
    if that does not end it.
    """
    # For start-up time: only programs that use trio need it.
    import trio

    given = subprocess.DEVNULL if input is None else input.encode(errors="surrogateescape")
    done = await trio.run_process(
        words, stdin=given, cwd=cwd, capture_stdout=capture_output, capture_stderr=capture_output,
        check=False, deliver_cancel=_end,
    )  # fmt: skip
    return subprocess.CompletedProcess(done.args, done.returncode, _text(done.stdout), _text(done.stderr))


async def _end(process: trio.Process) -> None:
    # For start-up time: only programs that use trio need it.
    import trio

    process.terminate()
    await trio.sleep(_GRACE_SECONDS)
    process.kill()


def _text(data: bytes | None) -> Any:
    return None if data is None else io.TextIOWrapper(io.BytesIO(data), errors="surrogateescape").read()
