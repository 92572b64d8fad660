"""Which runtime makes a container."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from unionfs.containers.bubblewrap import Bubblewrap
from unionfs.containers.call import Runtime
from unionfs.containers.oci import Oci
from unionfs.errors import UserError
from unionfs.settings.runtime import AUTO

_RUNTIMES: Final[Mapping[str, Callable[[], Runtime]]] = {
    "bubblewrap": Bubblewrap,
    "crun": lambda: Oci("crun", ["--cgroup-manager=disabled"]),
}


def choose_runtime(name: str) -> Runtime:
    """Return the runtime of that name; `auto`: the first that can be used here. Raises UserError."""
    if name != AUTO:
        return _RUNTIMES[name]()
    failure: UserError | None = None
    for make in _RUNTIMES.values():
        try:
            return make()
        except UserError as error:
            failure = failure or error
    assert failure is not None
    raise failure
