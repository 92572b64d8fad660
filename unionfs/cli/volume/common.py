"""Common to the volume commands: --root, key=value options, shell completion of names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from unionfs.cli.common import tell
from unionfs.errors import UserError, quoted

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from unionfs.storage.volumes import Volumes

_F = TypeVar("_F", bound=Callable[..., Any])


def open_volumes(root: str | None, tell: Callable[[str], object] = tell) -> Volumes:
    """Open the volumes of the storage root. Reports repairs, and what cannot be read, on stderr."""
    # For start-up time: --help and completion do not need it.
    from unionfs.storage.root import storage_root
    from unionfs.storage.volumes import Volumes

    return Volumes(storage_root(root), tell=tell)


def pairs(words: Iterable[str], what: str) -> dict[str, str]:
    """Parse arguments KEY=VALUE, or KEY with an empty value. Raises UserError."""
    found: dict[str, str] = {}
    for word in words:
        key, _, value = word.partition("=")
        if not key:
            raise UserError(f"invalid {what} {quoted(word)}; write KEY=VALUE.")
        if key in found and found[key] != value:
            raise UserError(f"the {what} {quoted(key)} is given twice with different values; give it once.")
        found[key] = value
    return found


def complete_volumes(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete volume names; none if the storage root cannot be read."""
    # For start-up time: only completion needs it.
    from click.shell_completion import CompletionItem

    try:
        volumes = open_volumes(context.params.get("root"), tell=lambda sentence: None)
        chosen = set(context.params.get("names") or ())
        return [
            CompletionItem(volume.name, help=volume.driver)
            for volume in volumes.all()
            if volume.name.startswith(incomplete) and volume.name not in chosen
        ]
    except (UserError, OSError):
        return []


def complete_drivers(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    # For start-up time: only completion needs it.
    from click.shell_completion import CompletionItem

    # For start-up time: only completion needs it.
    from unionfs.storage.drivers import driver_names

    return [CompletionItem(name) for name in driver_names() if name.startswith(incomplete)]
