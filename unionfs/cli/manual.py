"""The manual as man pages, made from the same source as --help."""

from __future__ import annotations

from collections.abc import Iterator

import click


def commands(group: click.Command, path: str = "") -> Iterator[tuple[str, click.Command]]:
    """Yield every command below a group with its path of names, groups included."""
    if not isinstance(group, click.Group):
        return
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        whole = f"{path} {name}".strip()
        yield whole, command
        yield from commands(command, whole)
