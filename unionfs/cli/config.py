"""`unionfs config`."""

from __future__ import annotations

import os
from typing import Any

import click

from unionfs.cli.common import print_json, print_table
from unionfs.cli.lazy import LazyGroup
from unionfs.errors import quoted

_COMMANDS = {"show": ("unionfs.cli.config:show", "Show all values and where each comes from.")}


@click.command(cls=LazyGroup, places=_COMMANDS, epilog="Example: unionfs config show")
def config() -> None:
    """Show the configuration: defaults for all commands, in TOML.

    \b
    /etc/unionfs/config.toml         of the host
    ~/.config/unionfs/config.toml    of the user ($XDG_CONFIG_HOME); its values
                                     replace those of the host
    \b
    Keys:
      root = "/srv/unionfs"       the storage root, as --root
      session = "auto"            as `mount --session`
      io = "auto"                 as `mount --io`
      log-level = "info"          as `mount --log-level`
      volume-driver = "local"     the driver of new volumes
      storage-driver = "union"    as `run --storage-driver`
      runtime = "auto"            as `run --runtime`
      [volume-options.local]      options for new volumes of a driver
      size = "10g"
    \b
    Options of the command line and the variable UNIONFS_ROOT replace these.
    """


@click.command(epilog="Example: unionfs config show --json")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def show(as_json: bool) -> None:
    """Show all values of the configuration, and where each comes from.

    The source is a file, the environment, or `default`.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.storage.configured import configuration
    from unionfs.storage.root import ENVIRONMENT, storage_root

    values: dict[str, dict[str, Any]] = {}
    for key, value in configuration().values.items():
        values[key] = {"value": value.value, "source": value.source or "default"}
    if values["root"]["value"] is None or os.environ.get(ENVIRONMENT):
        source = f"${ENVIRONMENT}" if os.environ.get(ENVIRONMENT) else "default"
        values["root"] = {"value": storage_root(), "source": source}
    if as_json:
        print_json(values)
        return
    print_table(
        ("KEY", "VALUE", "FROM"),
        [(key, quoted(str(one["value"])), quoted(str(one["source"]))) for key, one in values.items()],
    )
