"""Takes a mount over after its daemon died: `python -m unionfs.daemon.takeover FD`, which the holder starts.

FD is that of the state; see `core.holder`. With --version it prints the version of the state that it
takes over.
"""

from __future__ import annotations

import logging
import os
import sys

from unionfs.core.state import VERSION, State, StateError
from unionfs.daemon import logs
from unionfs.daemon.former import FormerDaemon
from unionfs.daemon.runtime import RuntimeDirectory
from unionfs.daemon.service import Service

log = logging.getLogger(__name__)

GIVEN_UP = "all requests fail with EIO until the mount is unmounted"


def main(fd: int) -> int:
    """Take over and serve; returns the exit code when the mount is gone."""
    try:
        state = State(fd)
        former = FormerDaemon(state)
    except (StateError, OSError) as error:
        print(f"unionfs: the state of a dead daemon cannot be used: {error}", file=sys.stderr)
        return 2
    settings = former.settings
    with RuntimeDirectory(former.entry.directory) as directory:
        logs.to_host(settings.log_level, directory, settings.mountpoint)
        deaths, too_often = state.died
        if too_often:
            log.critical("daemon %d died, one too many within a minute: %s", former.entry.pid, GIVEN_UP)
            return 1
        log.warning("daemon %d ended (deaths: %d); this one takes over", former.entry.pid, deaths)
        service = Service(settings, directory, lambda: None, None, foreground=False, former=former)
        return 0 if service.run() else 1


if __name__ == "__main__":
    code = 1
    try:
        if sys.argv[1] == "--version":
            print(VERSION)
            code = 0
        else:
            code = main(int(sys.argv[1]))
    except BaseException:
        log.exception("the daemon failed")
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)
