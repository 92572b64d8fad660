"""Common to the volume commands: --root, key=value options, shell completion of names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from unionfs.cli.completing import complete_directories
from unionfs.errors import UserError, quoted

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from unionfs.storage.volumes import Volumes

_F = TypeVar("_F", bound=Callable[..., Any])


def root_option(command: _F) -> _F:
    """Add `--root`, the same for every command."""
    return click.option(
        "--root",
        metavar="DIR", shell_complete=complete_directories,
        help="The storage root (default: $UNIONFS_ROOT, see `unionfs volume --help`).",
    )(command)


def tell(sentence: str) -> None:
    print(f"unionfs: {sentence}", file=sys.stderr)


def open_volumes(root: str | None, tell: Callable[[str], object] = tell) -> Volumes:
    """Open the volumes of the storage root. Reports repairs, and what cannot be read, on stderr."""
    # For start-up time: --help and completion do not need it.
    from unionfs.storage.root import storage_root
    from unionfs.storage.volumes import Volumes

    return Volumes(storage_root(root), tell=tell)


def pairs(words: Iterable[str], what: str, *, bare: bool = False) -> dict[str, str]:
    """Parse KEY=VALUE arguments; `bare` also accepts KEY with an empty value, as for labels."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not (equals or bare):
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
