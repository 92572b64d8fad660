"""`unionfs plugin`: the volumes of unionfs for docker and podman."""

from __future__ import annotations

import click

from unionfs.cli.common import root_option, tell
from unionfs.cli.completing import complete_files
from unionfs.cli.lazy import LazyGroup

_COMMANDS = {"serve": ("unionfs.cli.plugin:serve", "Serve the Docker volume plugin protocol.")}
SYSTEM_SOCKET = "/run/docker/plugins/unionfs.sock"
"""Where docker looks for plugins, and what contrib/ names."""


@click.command(cls=LazyGroup, places=_COMMANDS, epilog="Example: unionfs plugin serve")
def plugin() -> None:
    """Let docker and podman use unionfs's volumes, as a volume plugin."""


@click.command(
    epilog="""\b
Examples:
  unionfs plugin serve
  docker volume create -d unionfs -o size=1g orders
  docker run -v orders:/data debian
""",
)
@click.option(
    "--socket", "path", metavar="PATH", shell_complete=complete_files,
    help=f"The socket, whose name is the driver's name for docker. [{SYSTEM_SOCKET}; without root "
         "$XDG_RUNTIME_DIR/unionfs/plugin.sock]",
)  # fmt: skip
@root_option
def serve(path: str | None, root: str | None) -> None:
    """Serve the volumes of a storage root by the Docker volume plugin protocol, until SIGTERM.

    docker finds a socket in /run/docker/plugins by itself. podman needs in containers.conf:

    \b
      [engine.volume_plugins]
      unionfs = "/run/docker/plugins/unionfs.sock"

    Volumes are those of `unionfs volume`, with the same options; the option driver= chooses a driver other
    than local. What is mounted stays mounted when the server ends. Only root, or this user, may connect. A
    socket that systemd passes (see contrib/) takes the place of --socket.
    """
    # For start-up time: --help and completion do not need these.
    from unionfs.daemon.logs import to_stream
    from unionfs.daemon.runtime import runtime_directory
    from unionfs.plugin.listening import own_socket, passed_socket
    from unionfs.plugin.requests import Requests
    from unionfs.plugin.serving import serve as run
    from unionfs.storage.root import open_root, storage_root
    from unionfs.sys.capabilities import is_host_root
    from unionfs.sys.manager import Manager

    place = storage_root(root)
    open_root(place)
    to_stream("warning", shape="unionfs: %(message)s")
    manager, requests = Manager(), Requests(place)
    listener = passed_socket()
    if listener is not None:
        run(listener, requests.answer, manager)
        return
    if path is None:
        path = SYSTEM_SOCKET if is_host_root() else f"{runtime_directory().path}/plugin.sock"
    with own_socket(path) as listener:
        tell(f"serving the volumes in {place} at {path}")
        run(listener, requests.answer, manager)
