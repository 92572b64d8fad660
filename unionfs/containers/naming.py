"""Which container a process belongs to."""

from __future__ import annotations

from unionfs.containers.state import every
from unionfs.errors import UserError
from unionfs.storage.root import storage_root
from unionfs.sys.process import ancestors


def container_of(pid: int) -> str | None:
    """Return the name of the running container of this storage root that a process is of; None if of none."""
    try:
        runners = {
            state.pid: container.name
            for container, state in every(storage_root())
            if state is not None and state.is_running
        }
    except (UserError, OSError):
        return None
    return next((runners[one] for one in ancestors(pid) if one in runners), None) if runners else None
