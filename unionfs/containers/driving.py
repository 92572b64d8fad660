"""The storage driver of a container: the option, that of a kept container, or the configuration's."""

from __future__ import annotations

from unionfs.containers.store import Container
from unionfs.errors import UserError, quoted
from unionfs.settings.drivers import DEFAULT, parse_storage_driver
from unionfs.storage.configured import configuration


def choose_driver(given: str | None, upper: str | None, container: Container) -> str:
    """Return the name of the driver. Raises UserError if the wishes exclude each other.

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
