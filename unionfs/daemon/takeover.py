"""Takes a mount over after its daemon died: `python -m unionfs.daemon.takeover FD`, which the holder starts.

FD is that of the state; see `core.holder`.
"""

from __future__ import annotations

import logging
import os
import sys

from unionfs.core.state import State, StateError
from unionfs.daemon import logs
from unionfs.daemon.former import FormerDaemon
from unionfs.daemon.runtime import RuntimeDirectory
from unionfs.daemon.service import Service

log = logging.getLogger(__name__)


def main(fd: int) -> int:
    """Take over and serve; returns the exit code when the mount is gone."""
    try:
        former = FormerDaemon(State(fd))
    except (StateError, OSError) as error:
        print(f"unionfs: the state of a dead daemon cannot be used: {error}", file=sys.stderr)
        return 2
    settings = former.settings
    with RuntimeDirectory(former.entry.directory) as directory:
        logs.to_host(settings.log_level, directory, settings.mountpoint)
        log.warning("daemon %d died; this one takes over", former.entry.pid)
        service = Service(settings, directory, lambda: None, foreground=False, former=former)
        return 0 if service.run() else 1


if __name__ == "__main__":
    code = 1
    try:
        code = main(int(sys.argv[1]))
    except BaseException:
        log.exception("the daemon failed")
    logging.shutdown()
    os._exit(code)
