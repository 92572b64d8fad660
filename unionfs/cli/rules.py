"""The options that say what is accepted in layers and images, and completion of images."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from unionfs.errors import UserError
from unionfs.settings.sizes import volume_size

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


def rules_options(command: Callable[..., int]) -> Callable[..., int]:
    """Add the options; the command receives them as `rules`."""

    @wraps(command)
    def with_rules(
        max_size: str | None, max_entries: int | None, max_ratio: int | None, **others: Any
    ) -> int:
        # For start-up time: --help and completion do not need it.
        from unionfs.images.rules import Rules

        chosen: dict[str, Any] = {
            "size": None if max_size is None else volume_size(max_size, "--max-size"),
            "entries": max_entries,
            "ratio": max_ratio,
            **{name: others.pop(name) for name in ("any_name", "any_platform", "skip_devices")},
        }
        rules = Rules(**{name: value for name, value in chosen.items() if value is not None})
        return command(rules=rules, **others)

    added: Callable[..., int] = with_rules
    for option in reversed((
        click.option("--any-name", is_flag=True, help="Accept names with control characters, as line feeds."),
        click.option("--any-platform", is_flag=True, help="Accept images for other machines."),
        click.option("--skip-devices", is_flag=True,
                     help="Leave out device files, if this user cannot make them."),
        click.option("--max-size", metavar="SIZE", help="The largest content of a layer.  [default: 64g]"),
        click.option("--max-entries", type=click.IntRange(1), metavar="N",
                     help="The most entries of a layer.  [default: 4000000]"),
        click.option("--max-ratio", type=click.IntRange(1), metavar="N",
                     help="The largest ratio of content to compressed size of large layers.  [default: 400]"),
    )):  # fmt: skip
        added = option(added)
    return added


def complete_images(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the names of images of the store, and the beginnings of references."""
    # For start-up time: only completion needs it.
    from click.shell_completion import CompletionItem

    # For start-up time: only completion needs it.
    from unionfs.images.store import Store
    from unionfs.storage.root import storage_root

    words: list[str] = []
    if parameter.name != "names":
        words += ["oci-archive:", "docker-archive:", "oci:"]
    try:
        for image in Store(storage_root(context.params.get("root"))).images():
            words += image.names or [image.id[:12]]
    except (UserError, OSError):
        pass
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]
