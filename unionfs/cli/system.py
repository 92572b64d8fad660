"""`unionfs info` and `unionfs system df`."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from unionfs import __version__
from unionfs.cli.common import print_json, print_table, root_option
from unionfs.cli.lazy import LazyGroup
from unionfs.cli.listing import print_list, wants_fields
from unionfs.cli.template import render
from unionfs.errors import UserError, quoted
from unionfs.settings.sizes import shown_size

if TYPE_CHECKING:
    from unionfs.storage.measuring import Use

_COMMANDS = {"df": ("unionfs.cli.system:df", "Show the space that images, containers and volumes take.")}
_NAMES = {
    "images": "Images", "containers": "Containers", "volumes": "Local Volumes", "bases": "Driver Bases",
}  # fmt: skip


@click.command(cls=LazyGroup, places=_COMMANDS, epilog="Example: unionfs system df -v")
def system() -> None:
    """Show what the storage root holds."""


@click.command(
    epilog="""\b
Examples:
  unionfs info
  unionfs info --format '{{.StorageRoot}}'
""",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@click.option("--format", "template", metavar="json|TEMPLATE", help="A Go template of the keys of --json.")
@root_option
def info(as_json: bool, template: str | None, root: str | None) -> None:
    """Show versions, the storage root and its filesystem, counts, and what new mounts use.

    `unionfs doctor` tests what this host supports.
    """
    facts = _facts(root)
    if as_json or template == "json":
        print_json(facts)
    elif template:
        print(render(template, facts))
    else:
        print_table(("FACT", "VALUE"), [(_words(name), _shown(value)) for name, value in facts.items()])


def _facts(root: str | None) -> dict[str, Any]:
    # For start-up time: --help and completion do not need it.
    from unionfs.containers import store as containers
    from unionfs.containers.driving import usable_drivers
    from unionfs.daemon.dead import dead_mounts
    from unionfs.daemon.detached import detached_mounts
    from unionfs.daemon.live import live_mounts
    from unionfs.images.store import Store
    from unionfs.storage.configured import configuration
    from unionfs.storage.root import storage_root
    from unionfs.sys import libfuse
    from unionfs.sys.features import kernel_features
    from unionfs.sys.mountinfo import location_of, mounts_of_device

    place = storage_root(root)
    values, names = configuration().values, containers.names(place)
    above = place
    while not os.path.isdir(above):
        above = os.path.dirname(above)
    space, there = os.statvfs(above), location_of(os.path.realpath(above))
    library = libfuse.load()
    return {
        "Version": __version__,
        "KernelVersion": os.uname().release,
        "PythonVersion": platform.python_version(),
        "LibfuseVersion": None if library is None else libfuse.version(library),
        "StorageRoot": place,
        "BackingFilesystem": mounts_of_device(there.device)[0].fstype if there else None,
        "AvailableBytes": space.f_bavail * space.f_frsize,
        "Mounts": len(live_mounts()),
        "DetachedMounts": len(detached_mounts()),
        "DeadMounts": len(dead_mounts()),
        "Containers": len(names),
        "ContainersRunning": sum(containers.Container(place, name).is_running() for name in names),
        "Volumes": _count(place),
        "Images": len(Store(place).images()),
        "Session": values["session"].value,
        "IoMode": values["io"].value,
        "LogLevel": values["log-level"].value,
        "VolumeDriver": values["volume-driver"].value,
        "StorageDriver": values["storage-driver"].value,
        "StorageDrivers": usable_drivers(place),
        "KernelFeatures": kernel_features(),
        "ConfigurationFiles": sorted({value.source for value in values.values() if value.source}),
    }


def _count(place: str) -> int:
    # For start-up time: --help and completion do not need it.
    from unionfs.cli.volume.common import open_volumes

    return len(open_volumes(place).all())


def _words(name: str) -> str:
    """Return the words of a key: `StorageRoot` is `storage root`."""
    return "".join(f" {char.lower()}" if char.isupper() else char for char in name).strip()


def _shown(value: object) -> str:
    match value:
        case None:
            return "-"
        case list():
            return ", ".join(map(str, value)) or "-"
        case int() if value >= 1 << 20:
            return shown_size(value)
    return quoted(str(value))


@click.command(
    epilog="""\b
Examples:
  unionfs system df
  unionfs system df --format '{{.Type}}: {{.Reclaimable}}'
""",
)
@click.option("-v", "--verbose", is_flag=True, help="Show each image, container and volume.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, with each of them.")
@click.option("--format", "template", metavar="table|json|TEMPLATE", help="A Go template, see above.")
@root_option
def df(verbose: bool, as_json: bool, template: str | None, root: str | None) -> None:
    """Show the space that images, containers and volumes take, and how much of it nothing uses.

    A container's size is that of its changes. A volume's is what its removal would free on this host: its
    files, the image of one with a filesystem of its own, the changes of one of the driver union, and nothing
    for storage elsewhere; `unionfs volume ls --size` measures the content, wherever it is. A base is a copy
    of lowers that storage drivers without layers keep for new containers. Sizes count each file once, without
    holes. A template has the fields .Type .TotalCount .Active .Size .Reclaimable.
    """
    if verbose and wants_fields(template):
        raise UserError("--verbose and --format exclude each other; give one of them.")
    # For start-up time: --help and completion do not need it.
    from unionfs.containers.driving import uses as of_drivers
    from unionfs.containers.store import lowers_of_all
    from unionfs.containers.store import uses as of_containers
    from unionfs.images.using import uses as of_images
    from unionfs.storage.measuring import uses as of_volumes
    from unionfs.storage.root import storage_root

    place = storage_root(root)
    found: dict[str, list[Use]] = {
        "images": of_images(place, lowers_of_all(place)),
        "containers": of_containers(place),
        "volumes": of_volumes(place),
        "bases": of_drivers(place),
    }
    if as_json:
        print_json({
            kind: [{"name": use.name, "size": use.size, "active": use.active} for use in uses]
            for kind, uses in found.items()
        })
        return
    rows = [_row(_NAMES[kind], uses) for kind, uses in found.items()]
    headings = {"Type": "TYPE", "TotalCount": "TOTAL", "Active": "ACTIVE", "Size": "SIZE",
                "Reclaimable": "RECLAIMABLE"}  # fmt: skip
    table = tuple(headings.values()), [tuple(row.values()) for row in rows]
    print_list(rows, table, headings, template)
    if not verbose:
        return
    for kind, uses in found.items():
        print(f"\n{_NAMES[kind]}:")
        print_table(
            ("NAME", "SIZE", "ACTIVE"),
            [(quoted(use.name), shown_size(use.size), "yes" if use.active else "no") for use in uses],
        )


def _row(name: str, uses: list[Use]) -> Mapping[str, str]:
    total = sum(use.size for use in uses)
    free = sum(use.size for use in uses if not use.active)
    share = f" ({100 * free // total}%)" if total else ""
    return {
        "Type": name,
        "TotalCount": str(len(uses)),
        "Active": str(sum(use.active for use in uses)),
        "Size": shown_size(total),
        "Reclaimable": f"{shown_size(free)}{share}",
    }
