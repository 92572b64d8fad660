"""Common to the commands of branches: --root, names, and results as JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from unionfs.errors import UserError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_F = TypeVar("_F", bound=Callable[..., Any])
CONFLICTS = 3
"""The exit code of a commit that conflicts prevented."""


def json_option(command: _F) -> _F:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


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
