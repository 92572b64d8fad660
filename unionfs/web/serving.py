"""Serves the pages by hypercorn on trio, and reads the samples of all mounts."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from typing import Final, cast

import trio
from hypercorn.config import Config
from hypercorn.trio import serve as serve_app
from hypercorn.typing import ASGIFramework

from unionfs.web.children import Children, start_child
from unionfs.web.gate import Gate, secret
from unionfs.web.history import History
from unionfs.web.pages import Pages, templates
from unionfs.web.sampling import sample_forever

_MOST_BYTES: Final = 64 << 20
_LAST_SECONDS: Final = 2.0


def serve(listener: socket.socket, root: str, seconds: float, announce: Callable[[str], object]) -> None:
    """Serve until SIGTERM or SIGINT. Calls `announce` first, with the path that has the token.

    `root` is the storage root; the mounts are looked at every `seconds`. Raises OSError.
    """
    sampler, reader = start_child(partial(sample_forever, seconds))
    try:
        trio.run(_serve, listener, root, seconds, announce, reader)
    finally:
        with suppress(ProcessLookupError):
            os.kill(sampler, signal.SIGKILL)
        os.waitpid(sampler, 0)


async def _serve(
    listener: socket.socket, root: str, seconds: float, announce: Callable[[str], object], reader: int
) -> None:
    history, token = History(), secret()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        announce(f"/?token={token}")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_collect, history, reader)
            pages = Pages(history, Children(nursery), root, f"/{secret()}", seconds)
            gate = Gate(pages.app, templates(), pages.path, token)
            app, end = cast(ASGIFramework, gate), partial(_first, signals)
            await serve_app(app, _configuration(listener), shutdown_trigger=end, mode="asgi")
            nursery.cancel_scope.cancel()


async def _first(signals: AsyncIterator[int]) -> None:
    async for _ in signals:
        return


def _configuration(listener: socket.socket) -> Config:
    config = Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.loglevel = "WARNING"
    config.include_server_header = False
    config.graceful_timeout = _LAST_SECONDS
    return config


async def _collect(history: History, reader: int) -> None:
    """Put the lines of the sampling child into the history."""
    pending = bytearray()
    async with trio.lowlevel.FdStream(reader) as pipe:
        async for chunk in pipe:
            pending += chunk
            *lines, rest = pending.split(b"\n")
            for line in lines:
                history.add(json.loads(line))
            pending = bytearray(rest)
            if len(pending) > _MOST_BYTES:
                break
    history.fail(f"the process that looks at the mounts has ended at {time.ctime()}; start the server again")
