"""`unionfs web`: pages that show what there is."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from functools import partial

import click

from unionfs.cli.common import root_option, tell
from unionfs.cli.completing import complete_files
from unionfs.errors import UserError, quoted


@click.command(
    epilog="""\b
Examples:
  unionfs web
  unionfs web --port 0
  ssh -N -L 8484:127.0.0.1:8484 host    # for a server on another host
""",
)
@click.option("--address", metavar="IP", default="127.0.0.1", show_default=True,
              help="The address to listen at; without --address only this host can connect.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=8484, show_default=True,
              help="The port; 0: any free one.")  # fmt: skip
@click.option("--socket", "path", metavar="PATH", shell_complete=complete_files,
              help="Listen at a unix socket instead, which only this user and root may use.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(0.5, 600), default=5.0, show_default=True,
              help="How often to look at the mounts.")  # fmt: skip
@root_option
def web(address: str, port: int, path: str | None, seconds: float, root: str | None) -> None:
    """Serve pages for a browser, until Ctrl-C or SIGTERM, and print their address.

    They show this user's mounts with their figures over time and the changes in their uppers, and the
    volumes, containers and branches of the storage root. They change nothing. While
    the command runs, it keeps the figures of the last 360 looks in memory.

    Every page requires the token in the printed address, so keep that address to yourself.
    The connection is not encrypted: from elsewhere use ssh, as below.

    Needs the extra `web` of the package: pip install 'unionfs[web]'.
    """
    given = click.get_current_context().get_parameter_source
    explicit = click.core.ParameterSource.COMMANDLINE
    if path is not None and explicit in (given("address"), given("port")):
        raise click.UsageError("--socket takes neither --address nor --port")
    try:
        # For start-up time: --help and completion do not need these.
        from unionfs.web.serving import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("unionfs"):
            raise
        raise UserError(
            f"the Python package {error.name.partition('.')[0]} is missing; run `pip install 'unionfs[web]'`."
        ) from error
    # For start-up time: --help and completion do not need these.
    from unionfs.plugin.listening import own_socket
    from unionfs.storage.root import storage_root
    from unionfs.web.listening import is_local, listen, url_of

    place = storage_root(root)
    with ExitStack() as stack:
        if path is not None:
            listener = stack.enter_context(own_socket(path))
            path = os.path.abspath(path)
            tell(f"serves at the socket {quoted(path)}; for a browser: ssh -N -L 8484:{path} HOST")
            url = "http://localhost:8484"
        else:
            listener = listen(address, port)
            url = url_of(listener)
            if not is_local(address):
                tell("the connection is not encrypted: others on the network may read the token and all.")
        serve(listener, place, seconds, partial(_print_address, url))


def _print_address(url: str, path: str) -> None:
    print(f"{url}{path}")
    sys.stdout.flush()
