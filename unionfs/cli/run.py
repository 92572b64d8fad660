"""`unionfs run`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from unionfs.cli.common import CodedError, complain, tell
from unionfs.cli.completing import (
    complete_containers,
    complete_directories,
    complete_files,
    complete_storage_drivers,
)
from unionfs.cli.progress import progress_of, progress_option
from unionfs.cli.rules import complete_images
from unionfs.cli.storage_options import storage_options
from unionfs.errors import UserError, on_failure, quoted
from unionfs.settings.runtime import RUNTIMES
from unionfs.storage.archive.progress import UNSEEN

if TYPE_CHECKING:
    from unionfs.settings.ports import Port
    from unionfs.settings.restart import Policy


def parse_environment(given: Iterable[str], option: str) -> dict[str, str]:
    """Parse K=V, and K for the caller's value. Raises UserError."""
    values = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not key:
            raise UserError(f"{option} {quoted(text)}: the variable has no name; write {option} NAME=VALUE.")
        if equals:
            values[key] = value
        elif key in os.environ:
            values[key] = os.environ[key]
    return values


def _ports(given: Iterable[str]) -> tuple[Port, ...]:
    # For start-up time: few containers publish ports.
    from unionfs.settings.ports import parse_ports

    return parse_ports(given)


def _policy(given: str | None) -> Policy:
    # For start-up time: --help and completion do not need it.
    from unionfs.settings.restart import Policy, parse_policy

    return Policy() if given is None else parse_policy(given)


class CodedCommand(click.Command):
    """Ends with 125, as docker's, if it fails itself."""

    def make_context(self, *words: Any, **settings: Any) -> click.Context:
        with _coded():
            return super().make_context(*words, **settings)

    def invoke(self, context: click.Context) -> Any:
        with _coded():
            return super().invoke(context)


@contextmanager
def _coded() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except (click.ClickException, UserError, OSError) as error:
        # For start-up time: an error needs it.
        from unionfs.containers.detached import OWN_FAILURE

        raise CodedError(OWN_FAILURE) from error


@click.command(
    cls=CodedCommand,
    context_settings={"allow_interspersed_args": False},
    epilog="""\b
Examples:
  unionfs run --rm -l /srv/debian -- bash
  unionfs run --name web -l /srv/debian -v ./site:/srv:ro -- nginx
  unionfs run --rm --image oci-archive:web.tar
  unionfs run -d -p 8080:80 -l /srv/debian -- nginx -g 'daemon off;'
  unionfs run --rm -l /srv/debian -u tmpfs:size=64m --net none -- bash
""",
)
@click.option(
    "-l", "--lower", "lowers", multiple=True, metavar="DIR|IMAGE", shell_complete=complete_files,
    help="A read-only layer; the first is on top. A kept container remembers its own.",
)  # fmt: skip
@click.option(
    "--image", metavar="IMAGE", shell_complete=complete_images,
    help="The layers of an image as lowers, and its command, environment, user and working directory; as for "
         "mount.",
)  # fmt: skip
@click.option(
    "-u", "--upper", metavar="DIR|tmpfs[:OPT,...]", shell_complete=complete_directories,
    help="Store changes in a directory or in memory instead of in the container.",
)  # fmt: skip
@click.option("--storage-driver", "driver", metavar="DRIVER", shell_complete=complete_storage_drivers,
              help="union, overlay2, btrfs, zfs, devicemapper or vfs. A kept container remembers its own.  "
                   "[the configuration's, or union]")  # fmt: skip
@click.option("--work", metavar="DIR", shell_complete=complete_directories,
              help="The work directory of an upper of your own, as for mount.")
@storage_options
@click.option("--name", metavar="NAME", shell_complete=complete_containers,
              help="The container's name: the same name finds its files again.")  # fmt: skip
@click.option("--rm", "remove", is_flag=True, help="Remove the container at the end.")
@click.option("-w", "--workdir", metavar="DIR",
              help="The command's working directory; created if missing.  [the image's, or /]")  # fmt: skip
@click.option("--user", metavar="USER[:GROUP]",
              help="Run as a user of the container, by name or number.  [the image's, or root]")  # fmt: skip
@click.option("--entrypoint", metavar="WORD", help="Replace the image's entrypoint; empty: none.")
@click.option("-e", "--env", "environment", multiple=True, metavar="K=V",
              callback=lambda context, option, given: parse_environment(given, "-e"),
              help="An environment variable; K alone takes the caller's value.")  # fmt: skip
@click.option("--env-file", "env_files", multiple=True, metavar="FILE", shell_complete=complete_files,
              help="Variables, one a line, as for -e; # begins a comment.")  # fmt: skip
@click.option("-d", "--detach", is_flag=True,
              help="Run in the background, and print the name; `unionfs logs` shows the output.")  # fmt: skip
@click.option("--restart", metavar="WHEN", callback=lambda context, option, given: _policy(given),
              help="Start the command of -d again after its end: on-failure[:N], always or unless-stopped, "
                   "until `unionfs stop`. Not after a reboot.")  # fmt: skip
@click.option("-i", "--interactive", is_flag=True,
              help="No effect: stdin is passed on anyway; accepted as for docker.")  # fmt: skip
@click.option("-t", "--tty", is_flag=True,
              help="No effect where stdin is a terminal, else an error; accepted as for docker.")  # fmt: skip
@click.option("--runtime", type=click.Choice(RUNTIMES),
              help="What makes the container; auto: the first that is installed.  [auto]")  # fmt: skip
@click.option("--read-only", is_flag=True,
              help="Make the root read-only; volumes, bind mounts and tmpfs stay writable.")  # fmt: skip
@click.option("--hostname", metavar="NAME", help="The host name inside.  [the container's name]")
@click.option("--net", type=click.Choice(["host", "none"]),
              help="The host's network, or none but loopback.  [host; its own with -p]")  # fmt: skip
@click.option("-p", "--publish", "ports", multiple=True, metavar="[IP:]HOST:CONTAINER[/udp]",
              callback=lambda context, option, given: _ports(given),
              help="Let a port of the host lead to the container, which gets its own network.")  # fmt: skip
@click.option("--cap-add", metavar="CAP", multiple=True, help="Add a capability, or ALL.")
@click.option("--cap-drop", metavar="CAP", multiple=True, help="Drop a capability, or ALL.")
@click.option("--security-opt", "security", metavar="OPT", multiple=True,
              help="seccomp=FILE: a profile in Docker's JSON form; seccomp=unconfined: none.")  # fmt: skip
@click.option("--privileged", is_flag=True,
              help="All capabilities, no filter, the host's /dev, writable /proc/sys and /sys: the command "
                   "can do to the host what root can.")  # fmt: skip
@progress_option
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def run(
    image: str | None,
    command: tuple[str, ...],
    entrypoint: str | None,
    workdir: str | None,
    user: str | None,
    environment: dict[str, str],
    env_files: tuple[str, ...],
    detach: bool,
    interactive: bool,
    tty: bool,
    net: str | None,
    progress: str,
    **wish: Any,
) -> int:
    """Run COMMAND with a union as its root, in new mount, pid, uts and ipc namespaces.

    The container has its own upper: the command's changes stay there, and `run --name NAME` finds them again,
    until `unionfs rm NAME`; with --rm they are removed at the end. Volumes and bind mounts always stay. The
    command has /proc, /dev and the host's network. Root's capabilities, the system call filter (seccomp), and
    the hidden and read-only parts of /proc and /sys are Docker's by default; set-id programs gain nothing. If
    stdin, stdout or stderr is a terminal, the command gets its own.

    The exit code is the command's; 128 plus the signal's number if a signal ended it; 126 or 127 if it cannot
    be executed or found; 125 if the container cannot be started. Signals are forwarded to the command.

    {storage}
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.containers.process import CommandError
    from unionfs.containers.store import new_name
    from unionfs.daemon.caller import CALLER
    from unionfs.storage.configured import configuration

    environment = {**variables_from_files(env_files), **environment}
    check_tty(tty)
    wish["runtime"] = wish["runtime"] or configuration().get("runtime")
    wish["own_network"] = net == "none"
    if net is not None and wish["ports"]:
        if net == "none":
            raise UserError("--net none has no network to publish ports of; omit it, or -p.")
        complain("unionfs", "with --net host the ports of the command are the host's; -p is ignored.")
        wish["ports"] = ()
    plain = image is None and wish["name"] is None
    if plain and not command:
        raise click.UsageError("Missing argument 'COMMAND...'.")
    if detach and wish["name"] is None:
        wish["name"] = new_name()
    CALLER.watches(progress_of(progress))
    given = _Given(image, command, entrypoint, workdir, user, environment, plain, detach)
    if detach:
        return _detach(given, wish)
    try:
        return _start(given, wish, lambda: None, _complain)
    except CommandError as error:
        return complain("unionfs", str(error), error.code)


@dataclass(frozen=True, slots=True)
class _Given:
    """What the command line says of the command."""

    image: str | None
    command: tuple[str, ...]
    entrypoint: str | None
    workdir: str | None
    user: str | None
    environment: dict[str, str]
    plain: bool
    """Neither of an image nor of a container that may have one."""
    detached: bool


def _complain(sentence: str) -> None:
    complain("unionfs", sentence)


def _detach(given: _Given, wish: dict[str, Any]) -> int:
    # For start-up time: few containers are detached.
    from unionfs.containers.detached import start

    code, said = start(lambda started, report: _start(given, wish, started, report))
    if said:
        complain("unionfs", said)
    if not code:
        print(wish["name"])
    return code


def _start(
    given: _Given, wish: dict[str, Any], started: Callable[[], None], report: Callable[[str], None]
) -> int:
    # For start-up time: --help and completion do not need it.
    from unionfs.containers.run import Wish
    from unionfs.containers.run import run as start
    from unionfs.daemon.caller import CALLER

    def begun() -> None:
        CALLER.goes()
        started()

    if given.plain:
        whole = Wish(
            given.command, workdir=given.workdir or "/", user=given.user, environment=given.environment,
            detached=given.detached, **wish,
        )  # fmt: skip
        return start(whole, report, begun)
    # For start-up time: only images need it.
    from unionfs.containers.imaged import Given, wished

    notes: list[str] = []
    wanted = Given(
        given.image, given.command, given.entrypoint, given.workdir, given.user, given.environment
    )
    with ExitStack() as held:
        with CALLER.shown(f"unpacking {given.image}") if given.image else nullcontext(UNSEEN) as shown:
            whole = held.enter_context(
                wished(Wish((), detached=given.detached, **wish), wanted, notes, shown)
            )
        tell(*notes)
        return start(whole, report, begun)


def check_tty(tty: bool) -> None:
    """Refuse -t without a terminal. Raises UserError."""
    if tty and not sys.stdin.isatty():
        raise UserError("-t is given, but standard input is not a terminal; leave -t out.")


def variables_from_files(paths: tuple[str, ...]) -> dict[str, str]:
    """Read files of variables, in docker's format: K=V, or K for the caller's value; # begins a comment."""
    values: dict[str, str] = {}
    for path in paths:
        complaint, errors = f"--env-file {quoted(path)} cannot be read", (OSError, UnicodeDecodeError)
        with on_failure(complaint, "check its path", *errors), open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
        values |= parse_environment([line for line in lines if line and not line.startswith("#")], path)
    return values
