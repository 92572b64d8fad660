"""`unionfs volume ls` and `inspect`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from unionfs.cli.run import complain, moment, on_terminal, print_table
from unionfs.cli.template import render, render_rows
from unionfs.cli.terminal import all_printable
from unionfs.cli.volume.common import complete_volumes, open_volumes, root_option
from unionfs.errors import UserError
from unionfs.storage.drivers import find_driver
from unionfs.storage.filters import matches, parse_filters

if TYPE_CHECKING:
    from unionfs.storage.volumes import Volume, Volumes, VolumeUser


@click.command(
    epilog="""\b
Examples:
  unionfs volume ls -f label=app=shop -f dangling=true
  unionfs volume ls --format '{{.Name}} {{.Mountpoint}}'
  unionfs volume rm $(unionfs volume ls -q -f anonymous=true)
""",
)
@click.option("-q", "--quiet", is_flag=True, help="Print names only.")
@click.option(
    "-f", "--filter", "filters", multiple=True, metavar="KEY=VALUE",
    help="name, label, driver, dangling or anonymous; may be repeated, and all must hold.",
)  # fmt: skip
@click.option("--format", "template", metavar="table|json|TEMPLATE", help="A Go template, see above.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
@root_option
def ls(quiet: bool, filters: tuple[str, ...], template: str | None, as_json: bool, root: str | None) -> None:
    """List volumes, sorted by name.

    A template has the fields .Name .Driver .Scope .Mountpoint .Labels .Options .Links .Anonymous .CreatedAt,
    and the functions json, index, lower and upper; `table TEMPLATE` adds headings. `--format json` prints one
    object per line, as docker does.
    """
    wanted = parse_filters(filters)
    volumes = open_volumes(root)
    # The users are files beside each volume: read them only where they matter.
    shows_users = as_json or template not in (None, "table")
    users = volumes.all_users() if shows_users or any(key == "dangling" for key, _ in wanted) else {}
    found = [volume for volume in volumes.all() if matches(volume, wanted, used=volume.name in users)]
    if as_json:
        print(json.dumps([_line(volume, users.get(volume.name, [])) for volume in found], indent=2))
        return
    if quiet and template in (None, "table"):
        for volume in found:
            print(volume.name)
        return
    if template == "json":
        for volume in found:
            print(json.dumps(_docker_line(volume, users.get(volume.name, []))))
        return
    lines = [_for_template(_line(volume, users.get(volume.name, []))) for volume in found]
    if template and not template.startswith("table"):
        for line in lines:
            print(render(template, line))
        return
    if template and template != "table":
        headings, *rows = render_rows(template, lines, _HEADINGS)
        print_table(headings, rows)
        return
    print_table(("DRIVER", "VOLUME NAME"), [(volume.driver, volume.name) for volume in found])


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
}


def _line(volume: Volume, users: list[VolumeUser]) -> dict[str, Any]:
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
    }


def _for_template(values: dict[str, Any]) -> dict[str, Any]:
    """Escape control characters on a terminal: some values come from plugins."""
    cleaned: dict[str, Any] = all_printable(values) if on_terminal() else values
    return cleaned


def _docker_line(volume: Volume, users: list[VolumeUser]) -> dict[str, str]:
    """Return the keys and texts of `docker volume ls --format json`."""
    return {
        "Availability": "N/A",
        "Driver": volume.driver,
        "Group": "N/A",
        "Labels": ",".join(f"{key}={value}" for key, value in volume.labels.items()),
        "Links": str(len(users)),
        "Mountpoint": volume.mountpoint,
        "Name": volume.name,
        "Scope": volume.scope,
        "Size": "N/A",
        "Status": "N/A",
    }


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
            print(render(template, _for_template(values)))
    elif found or code == 0:
        print(json.dumps(found, indent=4))
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
    held = -1
    if size:
        # For start-up time.
        from unionfs.storage.usage import size_of_tree

        with volumes.used(volume.name, "measurement") as path:
            held = size_of_tree(path)
    values["UsageData"] = {"RefCount": len(users), "Size": held}
    values["Users"] = [str(user) for user in users]
    return values
