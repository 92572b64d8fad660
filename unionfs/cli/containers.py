"""`unionfs run` and `rm`."""

from __future__ import annotations

import os
from typing import Any

import click

from unionfs.cli.rules import complete_images, tell
from unionfs.cli.run import complain, for_each
from unionfs.cli.storage_options import storage_options
from unionfs.errors import UserError, quoted


def _environment(_: click.Context, option: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    values = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not key:
            raise UserError(f"-e {quoted(text)}: the variable has no name; write -e NAME=VALUE.")
        if equals:
            values[key] = value
        elif key in os.environ:
            values[key] = os.environ[key]
    return values


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog="""\b
Examples:
  unionfs run --rm -l /srv/debian -- bash
  unionfs run --name web -l /srv/debian -v ./site:/var/www:ro -- nginx -g 'daemon off;'
  unionfs run --rm --image oci-archive:web.tar
  unionfs run --rm -l /srv/debian -u tmpfs:size=64m --net none -- sh -c 'echo secret > /key'
""",
)
@click.option(
    "-l", "--lower", "lowers", multiple=True, metavar="DIR|IMAGE",
    help="A read-only layer; the first is on top. A kept container remembers its own.",
)  # fmt: skip
@click.option(
    "--image", metavar="IMAGE", shell_complete=complete_images,
    help="The layers of an image as lowers, and its command, environment, user and working directory; as for "
         "mount.",
)  # fmt: skip
@click.option(
    "-u", "--upper", metavar="DIR|tmpfs[:OPT,...]",
    help="Store changes in a directory or in memory instead of in the container.",
)  # fmt: skip
@click.option("-w", "--work", metavar="DIR", help="As for mount; required with a directory as upper.")
@storage_options
@click.option("--name", metavar="NAME", help="The container's name: the same name finds its files again.")
@click.option("--rm", "remove", is_flag=True, help="Remove the container at the end.")
@click.option("--workdir", metavar="DIR",
              help="The command's working directory; created if missing.  [the image's, or /]")  # fmt: skip
@click.option("--user", metavar="USER[:GROUP]",
              help="Run as a user of the container, by name or number.  [the image's, or root]")  # fmt: skip
@click.option("--entrypoint", metavar="WORD", help="Replace the image's entrypoint; empty: none.")
@click.option("-e", "--env", "environment", multiple=True, metavar="K=V", callback=_environment,
              help="An environment variable; K alone takes the caller's value.")  # fmt: skip
@click.option("--hostname", metavar="NAME", help="The host name inside.  [the container's name]")
@click.option("--net", "own_network", type=click.Choice(["host", "none"]), default="host", show_default=True,
              callback=lambda context, parameter, net: net == "none",
              help="The host's network, or none but loopback.")  # fmt: skip
@click.option("--cap-add", metavar="CAP", multiple=True, help="Add a capability, or ALL.")
@click.option("--cap-drop", metavar="CAP", multiple=True, help="Drop a capability, or ALL.")
@click.option("--security-opt", "security", metavar="OPT", multiple=True,
              help="seccomp=FILE: a profile in Docker's JSON form; seccomp=unconfined: none.")  # fmt: skip
@click.option("--privileged", is_flag=True,
              help="All capabilities, no filter, the host's /dev, writable /proc/sys and /sys: the command "
                   "can do to the host what root can.")  # fmt: skip
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def run(
    image: str | None,
    command: tuple[str, ...],
    entrypoint: str | None,
    workdir: str | None,
    user: str | None,
    environment: dict[str, str],
    **wish: Any,
) -> int:
    """Run COMMAND with a union as its root, in new mount, pid, uts and ipc namespaces (bubblewrap).

    The container has its own upper: the command's changes stay there, and `run --name NAME` finds them again,
    until `unionfs rm NAME`; with --rm they are removed at the end. Volumes and bind mounts always stay. The
    command has /proc, /dev and the host's network. Root's capabilities, the system call filter (seccomp), and
    the hidden and read-only parts of /proc and /sys are Docker's by default; set-id programs gain nothing. If
    stdin, stdout or stderr is a terminal, the command gets its own.

    The exit code is the command's; 128 plus the signal's number if a signal ended it; 126 or 127 if it cannot
    be executed or found; 1 if the union cannot be mounted. Signals are forwarded to the command.

    {storage}
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.containers.process import CommandError
    from unionfs.containers.run import Wish
    from unionfs.containers.run import run as start

    def report(sentence: str) -> None:
        complain("unionfs", sentence)

    try:
        if image is None and wish["name"] is None:
            if not command:
                raise click.UsageError("Missing argument 'COMMAND...'.")
            whole = Wish(command, workdir=workdir or "/", user=user, environment=environment, **wish)
            return start(whole, report)
        # For start-up time: only images need it.
        from unionfs.containers.imaged import Given, wished

        notes: list[str] = []
        given = Given(image, command, entrypoint, workdir, user, environment)
        with wished(Wish((), **wish), given, notes) as whole:
            tell(notes)
            return start(whole, report)
    except CommandError as error:
        return complain("unionfs", str(error), error.code)


@click.command(epilog="Example: unionfs rm web")
@click.option(
    "--root", metavar="DIR",
    help="The storage root. [UNIONFS_ROOT; /var/lib/unionfs, or ~/.local/share/unionfs]",
)  # fmt: skip
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def rm(root: str | None, names: tuple[str, ...]) -> int:
    """Remove containers that `unionfs run` kept, with all their changes, and print their names.

    Volumes stay. A container that cannot be removed is reported; the others are still removed.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.containers.store import Container
    from unionfs.storage.root import storage_root

    place = storage_root(root)

    def remove(name: str) -> bool:
        container = Container(place, name)
        with container.claimed(make=False):
            container.remove()
        return True

    return for_each(names, remove)
