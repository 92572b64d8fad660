"""`unionfs volume ls` and `inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from unionfs.cli.common import complain, on_terminal, print_json, root_option
from unionfs.cli.listing import list_options, print_list, wants_fields
from unionfs.cli.template import Joined, render
from unionfs.cli.terminal import all_printable
from unionfs.cli.volume.common import complete_volumes, open_volumes
from unionfs.errors import UserError, on_failure
from unionfs.settings.sizes import shown_size
from unionfs.settings.words import moment
from unionfs.storage.drivers import find_driver
from unionfs.storage.filters import KEYS, matches, parse_filters

if TYPE_CHECKING:
    from unionfs.storage.volumes import Volume, Volumes, VolumeUser

_NOT_KNOWN = "N/A"


@click.command(
    epilog="""\b
Examples:
  unionfs volume ls -f label=app=shop -f dangling=true
  unionfs volume ls --format '{{.Name}} {{.Mountpoint}}'
  unionfs volume rm $(unionfs volume ls -q -f anonymous=true)
""",
)
@list_options("Print names only.", KEYS, {"dangling": ("true", "false"), "anonymous": ("true", "false")})
@click.option(
    "-s", "--size", is_flag=True,
    help="Compute the size of each volume's content; `unionfs system df` shows the space that it takes.",
)  # fmt: skip
@root_option
def ls(
    quiet: bool, filters: tuple[str, ...], template: str | None, as_json: bool, size: bool, root: str | None
) -> int:
    """List volumes, sorted by name.

    A template has the fields .Name .Driver .Scope .Mountpoint .Labels .Options .Links .Anonymous .CreatedAt
    .Size .Status .Availability .Group, and docker's functions, `if`, `range` and `with`; `table TEMPLATE`
    adds headings. `--format json` prints one object per line, as docker does.
    """
    wanted = parse_filters(filters)
    volumes = open_volumes(root)
    # The users are files beside each volume: read them only where they matter.
    shows_users = as_json or wants_fields(template)
    users = volumes.all_users() if shows_users or any(key == "dangling" for key, _ in wanted) else {}
    found = [volume for volume in volumes.all() if matches(volume, wanted, used=volume.name in users)]
    sizes = _sizes(volumes, found) if size else {}
    code = 1 if size and len(sizes) < len(found) else 0
    if as_json:
        print_json([
            _facts(volume, users.get(volume.name, []), sizes.get(volume.name, -1)) for volume in found
        ])
        return code
    table: tuple[tuple[str, ...], list[tuple[str, ...]]] = (
        ("DRIVER", "VOLUME NAME"), [(volume.driver, volume.name) for volume in found]
    )  # fmt: skip
    if size:
        shown = [_shown_size(sizes.get(volume.name, -1)) for volume in found]
        table = (*table[0], "SIZE"), [(*row, one) for row, one in zip(table[1], shown, strict=True)]
    lines = []
    if template == "json":
        lines = [_docker_line(volume, users.get(volume.name, []), sizes) for volume in found]
    elif wants_fields(template):
        lines = [_line(volume, users.get(volume.name, []), sizes) for volume in found]
    print_list(lines, table, _HEADINGS, template, names=[volume.name for volume in found] if quiet else None)
    return code


_HEADINGS = {
    "Name": "VOLUME NAME",
    "Driver": "DRIVER",
    "Scope": "SCOPE",
    "Mountpoint": "MOUNTPOINT",
    "Labels": "LABELS",
    "Options": "OPTIONS",
    "Links": "LINKS",
    "Anonymous": "ANONYMOUS",
    "CreatedAt": "CREATED AT",
    "Size": "SIZE",
    "Status": "STATUS",
    "Availability": "AVAILABILITY",
    "Group": "GROUP",
}


def _measured(volumes: Volumes, volume: Volume) -> int:
    """Return the bytes of a volume's content. Raises UserError."""
    # For start-up time.
    from unionfs.storage.usage import size_of_tree

    with (
        on_failure(f"volume {volume.name} cannot be measured", "check its storage"),
        volumes.used(volume.name, "measurement") as path,
    ):
        return size_of_tree(path)


def _sizes(volumes: Volumes, found: Sequence[Volume]) -> dict[str, int]:
    """Measure volumes; reports those that cannot be measured, and leaves them out."""
    sizes = {}
    for volume in found:
        try:
            sizes[volume.name] = _measured(volumes, volume)
        except UserError as error:
            complain("unionfs", str(error))
    return sizes


def _shown_size(size: int) -> str:
    return _NOT_KNOWN if size < 0 else shown_size(size)


def _facts(volume: Volume, users: list[VolumeUser], size: int) -> dict[str, Any]:
    return {
        "Name": volume.name,
        "Driver": volume.driver,
        "Scope": volume.scope,
        "Mountpoint": volume.mountpoint,
        "Labels": dict(volume.labels),
        "Options": dict(volume.options),
        "Links": len(users),
        "Anonymous": volume.anonymous,
        "CreatedAt": moment(volume.created),
        "Size": size,
    }


def _line(volume: Volume, users: list[VolumeUser], sizes: dict[str, int]) -> dict[str, Any]:
    """Return the fields of a template, as docker prints them in lists."""
    return {
        **_facts(volume, users, -1),
        "Labels": Joined(volume.labels),
        "Size": _shown_size(sizes.get(volume.name, -1)),
        **dict.fromkeys(("Status", "Availability", "Group"), _NOT_KNOWN),
    }


def _docker_line(volume: Volume, users: list[VolumeUser], sizes: dict[str, int]) -> dict[str, Any]:
    """Return the keys and texts of `docker volume ls --format json`."""
    line = _line(volume, users, sizes)
    names = (
        "Availability", "Driver", "Group", "Labels", "Links", "Mountpoint", "Name", "Scope", "Size", "Status",
    )  # fmt: skip
    return {name: str(line[name]) for name in names}


@click.command(
    epilog="""\b
Examples:
  unionfs volume inspect --size orders
  unionfs volume inspect -f '{{.Mountpoint}}' orders
""",
)
@click.option(
    "-s", "--size", is_flag=True, help="Compute the size of each volume (UsageData.Size, else -1)."
)
@click.option("-f", "--format", "template", metavar="TEMPLATE", help="A Go template, as with `volume ls`.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array (the default).")
@root_option
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_volumes)
def inspect(size: bool, template: str | None, as_json: bool, root: str | None, names: tuple[str, ...]) -> int:
    """Show details of volumes, as a JSON array with docker's keys; UsageData.RefCount counts the users."""
    volumes = open_volumes(root)
    found, code = [], 0
    for name in names:
        try:
            found.append(_details(volumes, volumes.get(name), size))
        except UserError as error:
            code = complain("unionfs", str(error))
    if template and template != "json" and not as_json:
        for values in found:
            print(render(template, all_printable(values) if on_terminal() else values))
    elif found or code == 0:
        print_json(found)
    return code


def _details(volumes: Volumes, volume: Volume, size: bool) -> dict[str, Any]:
    users = volumes.users(volume.name)
    values: dict[str, Any] = {
        "CreatedAt": moment(volume.created),
        "Driver": volume.driver,
        "Labels": dict(volume.labels),
        "Mountpoint": volume.mountpoint or (users[0].path if users else ""),
        "Name": volume.name,
        "Options": dict(volume.options),
        "Scope": volume.scope,
    }
    if status := find_driver(volume.driver).status(volume):
        values["Status"] = dict(status)
    values["UsageData"] = {"RefCount": len(users), "Size": _measured(volumes, volume) if size else -1}
    values["Users"] = [str(user) for user in users]
    return values
