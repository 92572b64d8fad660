"""`unionfs run` and `rm`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from unionfs.cli.run import complain
from unionfs.cli.storage_options import storage_options
from unionfs.errors import UserError, quoted

if TYPE_CHECKING:
    from unionfs.settings.specs import Spec


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog="""\b
Examples:
  unionfs run --rm -l /srv/debian -- bash
  unionfs run --name web -l /srv/debian -v ./site:/var/www:ro -- nginx -g 'daemon off;'
  unionfs run --rm -l /srv/debian -u tmpfs:size=64m --net none -- sh -c 'echo secret > /key'
""",
)
@click.option(
    "-l", "--lower", "lowers", multiple=True, metavar="DIR",
    help="A read-only layer; the first is on top. A kept container knows its own.",
)  # fmt: skip
@click.option(
    "-u", "--upper", metavar="DIR|tmpfs[:OPT,...]",
    help="Where changes go instead of into the container: a directory, or memory.",
)  # fmt: skip
@click.option("-w", "--work", metavar="DIR", help="As for mount; needed with a directory as upper.")
@storage_options
@click.option("--name", metavar="NAME", help="The container's name: the same name finds its files again.")
@click.option("--rm", "remove", is_flag=True, help="Throw the container away at the end.")
@click.option("--workdir", metavar="DIR", default="/", show_default=True,
              help="Where the command starts; made if it is missing.")  # fmt: skip
@click.option("-e", "--env", "variables", multiple=True, metavar="K=V",
              help="An environment variable; K alone takes the caller's value.")  # fmt: skip
@click.option("--hostname", metavar="NAME", help="The host name inside.  [the container's name]")
@click.option("--net", type=click.Choice(["host", "none"]), default="host", show_default=True,
              help="The host's network, or none but loopback.")  # fmt: skip
@click.option("--cap-add", metavar="CAP", multiple=True, help="Add a capability, or ALL.")
@click.option("--cap-drop", metavar="CAP", multiple=True, help="Drop a capability, or ALL.")
@click.option("--security-opt", "security", metavar="OPT", multiple=True,
              help="seccomp=FILE: a profile in Docker's JSON form; seccomp=unconfined: none.")  # fmt: skip
@click.option("--privileged", is_flag=True,
              help="All capabilities, no filter, the host's /dev, writable /proc/sys and /sys: the command "
                   "can do to the host what root can.")  # fmt: skip
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    lowers: tuple[str, ...],
    upper: str | None,
    work: str | None,
    storage: tuple[Spec, ...],
    root: str | None,
    name: str | None,
    remove: bool,
    workdir: str,
    variables: tuple[str, ...],
    hostname: str | None,
    net: str,
    cap_add: tuple[str, ...],
    cap_drop: tuple[str, ...],
    security: tuple[str, ...],
    privileged: bool,
    command: tuple[str, ...],
) -> int:
    """Run COMMAND with a union as its root, in mount, pid, uts and ipc namespaces of its own (bubblewrap).

    The union's upper is the container's own: what the command changes stays there, and `run --name NAME`
    finds it again, until `unionfs rm NAME`; with --rm it is thrown away at the end. Volumes and bind mounts
    stay in any case. The command has /proc, /dev and the host's network. Root's capabilities, the filter of
    system calls (seccomp), and what is hidden or read-only in /proc and /sys are as in Docker by default;
    set-id programs gain nothing. Where stdin, stdout, or stderr is a terminal, the command gets its own.

    The exit code is the command's, 128 and the signal's number if a signal ended it, 126 and 127 if it cannot
    be executed or found, 1 if the union cannot be mounted. Signals are handed on to it.

    {storage}
    """
    # For start-up time: --help and completion do without.
    from unionfs.containers.run import CommandError, Wish
    from unionfs.containers.run import run as start

    wish = Wish(
        command=command,
        lowers=lowers,
        upper=upper,
        work=work,
        storage=storage,
        root=root,
        name=name,
        remove=remove,
        workdir=workdir,
        environment=_environment(variables),
        hostname=hostname,
        own_network=net == "none",
        cap_add=cap_add,
        cap_drop=cap_drop,
        security=security,
        privileged=privileged,
    )
    try:
        return start(wish, lambda sentence: complain("unionfs", sentence))
    except CommandError as error:
        return complain("unionfs", str(error), error.code)


def _environment(variables: tuple[str, ...]) -> dict[str, str]:
    values = {}
    for text in variables:
        key, equals, value = text.partition("=")
        if not key:
            raise UserError(f"-e {quoted(text)}: the variable has no name; write -e NAME=VALUE.")
        if equals:
            values[key] = value
        elif key in os.environ:
            values[key] = os.environ[key]
    return values


@click.command(epilog="Example: unionfs rm web")
@click.option(
    "--root", metavar="DIR",
    help="Where containers are kept. [UNIONFS_ROOT; /var/lib/unionfs, or ~/.local/share/unionfs]",
)  # fmt: skip
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def rm(root: str | None, names: tuple[str, ...]) -> int:
    """Remove containers that `unionfs run` kept, with all that was changed in them, and print their names.

    Volumes stay. What cannot be removed is told, and does not keep the others.
    """
    # For start-up time: --help and completion do without.
    from unionfs.containers.store import Container
    from unionfs.storage.root import storage_root

    place = storage_root(root)
    code = 0
    for name in dict.fromkeys(names):
        try:
            container = Container(place, name)
            with container.claimed(make=False):
                container.remove()
            print(name, flush=True)
        except UserError as error:
            code = complain("unionfs", str(error))
    return code
