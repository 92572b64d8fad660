"""The figures of all mounts, looked at again and again by a child of the server."""

from __future__ import annotations

import json
import time
from typing import Any, Final

from unionfs.daemon.dead import dead_mounts
from unionfs.daemon.overview import Activity, Overview
from unionfs.daemon.stats_tables import tables
from unionfs.errors import UserError

_SPARE_SECONDS: Final = 5.0
_FIRST_SECONDS: Final = 1.0


def sample_forever(seconds: float, writer: int) -> None:
    """Write a line of JSON to the fd every `seconds`, until nobody reads it: what `History.add` takes."""
    overview = Overview(seconds + _SPARE_SECONDS)
    pause = min(_FIRST_SECONDS, seconds)  # rates need two looks
    with open(writer, "wb") as pipe:
        while True:
            due = time.monotonic() + pause
            pipe.write(json.dumps(_sample(overview)).encode("ascii") + b"\n")
            pipe.flush()
            time.sleep(max(0.0, due - time.monotonic()))
            pause = seconds


def _sample(overview: Overview) -> dict[str, Any]:
    try:
        found = overview.look()
        dead = [one.mount.mountpoint for one in dead_mounts()]
    except (UserError, OSError) as error:
        return {"at": time.time(), "error": str(error)}
    return {"at": time.time(), "mounts": [_of_mount(one) for one in found], "dead": dead}


def _of_mount(one: Activity) -> dict[str, Any]:
    return {
        "name": one.mount.name,
        "facts": one.facts(),
        "tables": [] if one.span is None else tables(one.mount, one.span),
    }
