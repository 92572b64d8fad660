"""A click group that imports a command's module when the command is called, to start fast."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class LazyGroup(click.Group):
    """A group of `places`: name to `module:object` and help line, in the order of the help.

    `aliases` are further names of commands, which the help shows beside the first.
    """

    def __init__(
        self,
        *arguments: Any,
        places: Mapping[str, tuple[str, str]],
        aliases: Mapping[str, str] | None = None,
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        self._places = places
        self._aliases = aliases or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._places)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        cmd_name = self._aliases.get(cmd_name, cmd_name)
        if cmd_name not in self._places:
            return None
        module, _, name = self._places[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            others = {name: alias for alias, name in self._aliases.items()}
            formatter.write_dl([
                (f"{name}, {others[name]}" if name in others else name, line)
                for name, (_, line) in self._places.items()
            ])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        # For start-up time: only completion needs it.
        from click.shell_completion import CompletionItem

        found = [
            CompletionItem(name, help=line)
            for name, (_, line) in self._places.items()
            if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)
