"""The storage driver of a container, and what the containers of a driver share."""

from __future__ import annotations

import os
from collections.abc import Iterator

from unionfs.containers.store import Container
from unionfs.errors import UserError, quoted
from unionfs.images.drivers import Driver, open_driver
from unionfs.settings.drivers import DEFAULT, STORAGE_DRIVERS, parse_storage_driver
from unionfs.storage.configured import configuration
from unionfs.storage.measuring import Use


def choose_driver(given: str | None, upper: str | None, container: Container) -> str:
    """Return the option, the driver of a kept container, or that of the configuration.

    Raises UserError if the wishes exclude each other.

    `given`: the option `--storage-driver`; `upper`: an upper of the caller's own, which only the union has.
    """
    if given is not None:
        parse_storage_driver(given)
    known = container.driver()
    if known is not None and given not in (None, known):
        raise UserError(
            f"container {quoted(container.name)} was created with the storage driver {known}, which has its "
            f"changes; omit --storage-driver {given}, or choose another name."
        )
    if upper is not None:
        if given not in (None, DEFAULT):
            raise UserError(
                f"-u {quoted(upper)} needs the storage driver {DEFAULT}, and --storage-driver is {given}; "
                "leave one of the two out."
            )
        return DEFAULT
    return given or known or str(configuration().get("storage-driver"))


def usable_drivers(root: str) -> list[str]:
    """Return the drivers that this process can use on this host."""
    found = []
    for name in STORAGE_DRIVERS:
        try:
            open_driver(name, root).check()
        except UserError:
            continue
        found.append(name)
    return found


def uses(root: str) -> list[Use]:
    """Return the bases of all drivers. Raises UserError."""
    return [use for driver in _with_bases(root) for use in driver.shared()]


def prune_bases(root: str) -> list[str]:
    """Remove the bases that no container uses; return their names. Raises UserError."""
    return [name for driver in _with_bases(root) for name in driver.prune()]


def _with_bases(root: str) -> Iterator[Driver]:
    for name in STORAGE_DRIVERS:
        if os.path.isdir(f"{root}/drivers/{name}"):
            yield open_driver(name, root)
