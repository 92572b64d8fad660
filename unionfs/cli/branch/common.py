"""Common to the commands of branches: --root, names, and results as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from unionfs.cli.completing import complete_directories
from unionfs.cli.run import on_terminal
from unionfs.cli.terminal import all_printable
from unionfs.errors import UserError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_F = TypeVar("_F", bound=Callable[..., Any])
CONFLICTS = 3
"""The exit code of a commit that conflicts prevented."""


def root_option(command: _F) -> _F:
    """Add `--root`, the same for every command."""
    return click.option(
        "--root", metavar="DIR", shell_complete=complete_directories,
        help="The storage root (default: $UNIONFS_ROOT, see `unionfs branch "
        "--help`)."
    )(command)


def json_option(command: _F) -> _F:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def print_json(values: Any) -> None:
    """Print JSON, for a terminal with control characters escaped."""
    print(json.dumps(all_printable(values) if on_terminal() else values, indent=2))


def tell(sentence: str) -> None:
    print(f"unionfs: {sentence}", file=sys.stderr)


def complete_branches(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete names of branches; none if the storage root cannot be read."""
    # For start-up time: only completion needs it.
    from click.shell_completion import CompletionItem

    # For start-up time: only completion needs it.
    from unionfs.branches.store import Store

    try:
        names = [branch.name for branch in Store(context.params.get("root")).branches()]
    except (UserError, OSError):
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
