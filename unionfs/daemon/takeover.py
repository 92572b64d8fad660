"""Takes a mount over after its daemon died, or mounts its union anew (`daemon.anew`).

`python -m unionfs.daemon.takeover FD` is the command that the holder starts where it does not fork another
daemon from itself. FD is that of the state; see `core.holder`. With --version it prints the version of the
state that it takes over.
"""

from __future__ import annotations

import logging
import os
import sys

from unionfs.core.state import VERSION, State, StateError
from unionfs.daemon import logs
from unionfs.daemon.anew import dead_daemon, mount_anew
from unionfs.daemon.former import FormerDaemon
from unionfs.daemon.holder import Holder
from unionfs.daemon.runtime import RuntimeDirectory
from unionfs.daemon.service import Service

log = logging.getLogger(__name__)

GIVEN_UP = "all requests fail with EIO until the mount is unmounted"


def take_over(state: State) -> int:
    """Serve the mount until it is gone; returns the exit code. Raises no exception: a forked daemon has the
    callers of the dead one."""
    try:
        while True:
            logs.close()
            dead = dead_daemon(state)
            if dead is not None:
                return mount_anew(state, dead)
            former = FormerDaemon(state)
            settings = former.settings
            holder = Holder(state, former.holder)
            if state.died[1] or holder.fork(settings):
                return _serve(former, holder)
            state.find_free()  # this is another process: the one that its holder forked
    except StateError as error:
        print(f"unionfs: the state of a dead daemon cannot be used: {error}", file=sys.stderr)
        return 2
    except BaseException:
        log.exception("the daemon failed")
        return 1


def _serve(former: FormerDaemon, holder: Holder) -> int:
    settings = former.settings
    with RuntimeDirectory(former.entry.directory) as directory:
        logs.to_host(settings.log_level, directory, settings.mountpoint)
        deaths, too_often = former.state.died
        if too_often:
            log.critical("daemon %d died, one too many within a minute: %s", former.entry.pid, GIVEN_UP)
            return 1
        log.warning("daemon %d ended (deaths: %d); this one takes over", former.entry.pid, deaths)
        service = Service(
            settings, directory, lambda: None, None, foreground=False, holder=holder, former=former
        )
        return 0 if service.run() else 1


def main(word: str) -> int:
    """Run the command; returns its exit code."""
    if word == "--version":
        print(VERSION)
        return 0
    try:
        state = State(int(word))
    except (StateError, OSError) as error:
        print(f"unionfs: the state of a dead daemon cannot be used: {error}", file=sys.stderr)
        return 2
    return take_over(state)


if __name__ == "__main__":
    code = main(sys.argv[1])
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)
