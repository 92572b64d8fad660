"""`unionfs exec`."""

from __future__ import annotations

import click

from unionfs.cli.common import complain, root_option
from unionfs.cli.completing import complete_containers, complete_files
from unionfs.cli.run import CodedCommand, check_tty, parse_environment, variables_from_files


@click.command(
    "exec",
    cls=CodedCommand,
    context_settings={"allow_interspersed_args": False},
    epilog="""\b
Examples:
  unionfs exec -it web sh
  unionfs exec -u www-data -w /srv -e DEBUG=1 web ls -l
""",
)
@click.option("-d", "--detach", is_flag=True, help="Don't wait for its end; its output is dropped.")
@click.option("-i", "--interactive", is_flag=True,
              help="No effect: stdin is passed on anyway; accepted as for docker.")  # fmt: skip
@click.option("-t", "--tty", is_flag=True,
              help="No effect where stdin is a terminal, else an error; accepted as for docker.")  # fmt: skip
@click.option("-u", "--user", metavar="USER[:GROUP]",
              help="Run as a user of the container, by name or number.  [as `run`]")  # fmt: skip
@click.option("-w", "--workdir", metavar="DIR", help="The command's working directory.  [as `run`]")
@click.option("-e", "--env", "environment", multiple=True, metavar="K=V",
              callback=lambda context, option, given: parse_environment(given, "-e"),
              help="Another variable; K alone takes the caller's value.")  # fmt: skip
@click.option("--env-file", "env_files", multiple=True, metavar="FILE", shell_complete=complete_files,
              help="Variables, one a line, as for -e; # begins a comment.")  # fmt: skip
@root_option
@click.argument("container", shell_complete=complete_containers)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(
    detach: bool,
    interactive: bool,
    tty: bool,
    user: str | None,
    workdir: str | None,
    environment: dict[str, str],
    env_files: tuple[str, ...],
    root: str | None,
    container: str,
    command: tuple[str, ...],
) -> int:
    """Run COMMAND in a container that runs: in all its namespaces, with the variables of its command.

    It has the rights of the container's command and no more: capabilities, system call filter, control
    groups, limits. If stdin, stdout or stderr is a terminal, it gets its own. Signals are forwarded to it.
    It ends with the container.

    The exit code is the command's; 128 plus the signal's number if a signal ended it; 126 or 127 if it cannot
    be executed or found; 125 if the container cannot be entered.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.containers.executing import Wish
    from unionfs.containers.executing import execute as start
    from unionfs.containers.process import CommandError

    check_tty(tty)
    if command[0] == "--":
        command = command[1:]
    if not command:
        raise click.UsageError("Missing argument 'COMMAND...'.")
    variables = {**variables_from_files(env_files), **environment}
    try:
        return start(Wish(container, command, root, user, workdir, variables, detach))
    except CommandError as error:
        return complain("unionfs", str(error), error.code)
