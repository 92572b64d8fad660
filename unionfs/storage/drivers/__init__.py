"""Volume drivers: where a volume's data is stored, and how it becomes a directory.

A driver is a subclass of `Driver` that a package names in the entry point group `unionfs.volume_drivers`:

    [project.entry-points."unionfs.volume_drivers"]
    mine = "package.module:MyDriver"

Any other name is that of a Docker volume plugin (`drivers.plugin`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING

from unionfs.errors import UserError, on_failure, quoted
from unionfs.storage.drivers.base import Driver, Replacement

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["Driver", "Replacement", "driver_names", "find_driver"]

GROUP = "unionfs.volume_drivers"
OWN_PLUGIN = "unionfs"
"""The name of the plugin that serves these volumes to others: it would wait for itself."""

# These names need no search through all installed packages, the slowest step here.
_BUILT_IN = {
    "local": "unionfs.storage.drivers.local:Local",
    "union": "unionfs.storage.drivers.union:UnionDriver",
    "sshfs": "unionfs.storage.drivers.remote:Sshfs",
    "rclone": "unionfs.storage.drivers.remote:Rclone",
    "glusterfs": "unionfs.storage.drivers.remote:Glusterfs",
}


def driver_names() -> list[str]:
    """The names of all drivers, plugins included."""
    # start-up time: few commands need it
    from unionfs.storage.drivers.plugin import plugin_names

    others = {point.name for point in _points()} | set(plugin_names())
    return [*_BUILT_IN, *sorted(others - {*_BUILT_IN, OWN_PLUGIN})]


def find_driver(name: str) -> Driver:
    """The driver of that name. Raises UserError if it does not exist."""
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        return _load(name, _BUILT_IN[name], lambda: getattr(import_module(module), attribute))
    if name == OWN_PLUGIN:
        raise UserError(
            f"volume driver {name} is the plugin by which container engines use these volumes; name the "
            f"driver of the volume itself: {', '.join(_BUILT_IN)}, or another plugin."
        )
    for point in _points():
        if point.name == name:
            return _load(name, point.value, point.load)
    # start-up time: few commands need it
    from unionfs.storage.drivers.plugin import find_plugin
    from unionfs.storage.drivers.plugin_search import searched

    plugin = find_plugin(name)
    if plugin is not None:
        return plugin
    known = driver_names()
    close = difflib.get_close_matches(name, known, 1)
    cure = f"did you mean {close[0]}" if close else f"there are {', '.join(known)}"
    raise UserError(
        f"unknown volume driver {quoted(name)}, and there is no plugin of that name in "
        f"{searched()}; {cure}."
    )


def _points() -> Iterable[EntryPoint]:
    """The drivers of installed packages."""
    # start-up time: it imports a fifth of what a command imports, and few need it
    from importlib.metadata import entry_points

    return entry_points(group=GROUP)


def _load(name: str, value: str, load: Callable[[], Callable[[], object]]) -> Driver:
    """Make a driver; `value` says where it is, for messages."""
    with on_failure(
        f"volume driver {quoted(name)} ({value}) cannot be loaded",
        "reinstall the package it comes from",
        Exception,
    ):
        made = load()()
    if not isinstance(made, Driver):
        raise UserError(
            f"volume driver {quoted(name)} ({value}) is not a unionfs.storage.drivers.Driver; "
            "reinstall the package it comes from."
        )
    return made
