"""`unionfs container`: kept containers, and those that run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from unionfs.cli.common import complain, confirm, for_each, print_json, root_option
from unionfs.cli.completing import complete_containers
from unionfs.cli.lazy import LazyGroup
from unionfs.cli.listing import list_options, print_list
from unionfs.errors import UserError, quoted
from unionfs.settings.filters import parse_filters
from unionfs.settings.words import moment

if TYPE_CHECKING:
    from unionfs.containers.store import Container

_F = TypeVar("_F", bound=Callable[..., Any])
_COMMANDS = {
    "ls": ("unionfs.cli.container:ps", "List containers."),
    "diff": ("unionfs.cli.container:diff", "Show what a container has changed."),
    "exec": ("unionfs.cli.execute:execute", "Run a command in a running container."),
    "logs": ("unionfs.cli.container:logs", "Show the output of a detached container."),
    "stop": ("unionfs.cli.container:stop", "Stop containers."),
    "kill": ("unionfs.cli.container:kill", "Send a signal to containers."),
    "rm": ("unionfs.cli.container:rm", "Remove containers."),
    "prune": ("unionfs.cli.container:prune", "Remove all containers that do not run."),
}
_KEYS = ("name", "state", "image")
_VALUES = {"state": ("created", "running", "restarting", "exited", "dead")}
_FIELDS = {
    "Names": "NAME", "Image": "IMAGE", "Command": "COMMAND", "CreatedAt": "STARTED", "Status": "STATUS",
    "Ports": "PORTS",
    "State": "STATE", "ID": "NAME",
}  # fmt: skip


@click.command(
    cls=LazyGroup, places=_COMMANDS, aliases={"list": "ls"}, epilog="Example: unionfs container prune"
)
def container() -> None:
    """Manage the containers of `unionfs run`."""


def _names(command: _F) -> _F:
    command = click.argument(
        "names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_containers
    )(command)
    return root_option(command)


def _container(root: str | None, name: str) -> Container:
    # For start-up time: --help and completion do not need it.
    from unionfs.containers.store import Container
    from unionfs.storage.root import storage_root

    return Container(storage_root(root), name)


@click.command(
    epilog="""\b
Examples:
  unionfs ps -a
  unionfs ps --format '{{.Names}}: {{.Status}}'
""",
)
@click.option("-a", "--all", "every", is_flag=True, help="Also list containers that do not run.")
@list_options("Print names only.", _KEYS, _VALUES)
@root_option
def ps(
    every: bool, quiet: bool, filters: tuple[str, ...], template: str | None, as_json: bool, root: str | None
) -> None:
    """List the containers that run: name, image or topmost lower, command, start, status, ports.

    A template has the fields .Names .Image .Command .CreatedAt .Status .State .Ports; `--format json` prints
    one object per line.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.containers.state import every as of_root
    from unionfs.containers.state import facts, shown_fields
    from unionfs.storage.root import storage_root

    wanted = parse_filters(filters, _KEYS, _VALUES)
    found = [facts(*one) for one in of_root(storage_root(root))]
    found = [one for one in found if every or one["state"] in ("running", "restarting")]
    found = [one for one in found if all(str(one[key] or "") == value for key, value in wanted)]
    if as_json:
        for one in found:
            one["since"], one["ended"] = (t and moment(t) for t in (one["since"], one["ended"]))
        print_json(found)
        return
    rows = [shown_fields(one) for one in found]
    shown = ("Names", "Image", "Command", "CreatedAt", "Status", "Ports")
    table = [_FIELDS[name] for name in shown], [[row[name] for name in shown] for row in rows]
    print_list(rows, table, _FIELDS, template, names=[one["name"] for one in found] if quiet else None)


@click.command(epilog="Example: unionfs logs -f web")
@click.option("-f", "--follow", is_flag=True, help="Go on until the container ends.")
@root_option
@click.argument("name", shell_complete=complete_containers)
def logs(follow: bool, root: str | None, name: str) -> None:
    """Show what a container that was started by `run -d` has written to stdout and stderr."""
    # For start-up time: --help and completion do not need it.
    from unionfs.containers.state import output

    for data in output(_container(root, name), follow=follow):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


@click.command(epilog="Example: unionfs stop -t 30 web db")
@click.option("-t", "--time", "seconds", type=click.FloatRange(0), default=10, show_default=True,
              metavar="SECONDS", help="How long the command may take to end.")  # fmt: skip
@_names
def stop(seconds: float, root: str | None, names: tuple[str, ...]) -> int:
    """Stop containers: SIGTERM to the command, SIGKILL if it takes too long; print their names."""
    # For start-up time: --help and completion do not need it.
    from unionfs.containers.state import stop as end

    def end_one(name: str) -> bool:
        end(_container(root, name), seconds)
        return True

    return for_each(names, end_one)


@click.command(epilog="Example: unionfs kill -s HUP web")
@click.option("-s", "--signal", "name", metavar="SIGNAL", default="KILL", show_default=True,
              help="HUP, INT, QUIT, TERM, USR1, USR2, WINCH, CONT or KILL.")  # fmt: skip
@_names
def kill(name: str, root: str | None, names: tuple[str, ...]) -> int:
    """Send a signal to the commands of containers, and print their names."""
    # For start-up time: --help and completion do not need it.
    from unionfs.containers.state import kill as send

    def send_one(container: str) -> bool:
        send(_container(root, container), name)
        return True

    return for_each(names, send_one)


@click.command(epilog="Example: unionfs container diff web")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
@root_option
@click.argument("name", shell_complete=complete_containers)
def diff(as_json: bool, root: str | None, name: str) -> int:
    """Show the changes of a container since it was created: A(dded), C(hanged) or D(eleted), and the path.

    With the storage driver vfs they are the differences from the lowers as they are now.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.cli.diff import print_changes

    container = _container(root, name)
    container.check()
    if not container.exists():
        raise UserError(f"there is no container {quoted(name)}; `unionfs ps -a` lists them.")
    return print_changes(container.storage_driver().diff(container.layer()), as_json)


@click.command(epilog="Example: unionfs rm web")
@click.option("-f", "--force", is_flag=True, help="Kill it first, if it runs.")
@click.option("-v", "--volumes", "with_volumes", is_flag=True, help="Also remove its anonymous volumes.")
@_names
def rm(force: bool, with_volumes: bool, root: str | None, names: tuple[str, ...]) -> int:
    """Remove containers that `unionfs run` kept, with all their changes, and print their names.

    Volumes stay, without -v also anonymous ones. A container that cannot be removed is reported; the others
    are still removed.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.containers.state import end, has_ended
    from unionfs.storage.root import storage_root
    from unionfs.storage.volumes import Volumes

    volumes = Volumes(storage_root(root))

    def remove(name: str) -> bool:
        container = _container(root, name)
        if force and container.is_running():
            end(container)
        with container.claimed(make=False, ends=lambda: has_ended(container)):
            anonymous = container.volumes() if with_volumes else {}
            container.remove()
        for volume in anonymous.values():
            volumes.remove(volume, missing_ok=True)
        return True

    return for_each(names, remove)


@click.command(epilog="Example: unionfs container prune -f")
@click.option("-f", "--force", is_flag=True, help="Don't ask.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@root_option
def prune(force: bool, as_json: bool, root: str | None) -> int:
    """Remove all containers that do not run, with their changes, and print their names. Volumes stay.

    Also the bases that no container uses: copies of lowers that some storage drivers keep for new containers.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.containers.driving import prune_bases
    from unionfs.containers.store import names
    from unionfs.storage.root import storage_root

    if not force:
        confirm("This will remove all containers that do not run.")
    gone: list[str] = []
    bases: list[str] = []
    code = 0
    for name in names(storage_root(root)):
        container = _container(root, name)
        if container.is_running():
            continue
        try:
            with container.claimed(make=False):
                container.remove()
            gone.append(name)
        except UserError as error:
            code = complain("unionfs", str(error))
    try:
        bases = prune_bases(storage_root(root))
    except UserError as error:
        code = complain("unionfs", str(error))
    if as_json:
        print_json({"removed": gone, "bases": bases})
    else:
        for name in [*gone, *bases]:
            print(name)
    return code
