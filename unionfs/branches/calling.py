"""Calls of the command line for the Python API, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any


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


async def in_thread(function: Any, *arguments: Any, **options: Any) -> Any:
    """Run a function in a thread of trio."""
    # For start-up time: only programs that use trio need it.
    import trio

    return await trio.to_thread.run_sync(partial(function, *arguments, **options))
