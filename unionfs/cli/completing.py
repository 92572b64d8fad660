"""Shell completion of what exists: mountpoints, containers, paths, the keys of filters, options of mounts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from unionfs.errors import UserError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Completer = Callable[[click.Context, click.Parameter, str], "list[CompletionItem]"]


def items(found: Iterable[str], incomplete: str, *, kind: str = "plain") -> list[CompletionItem]:
    # For start-up time: only completion needs it.
    from click.shell_completion import CompletionItem

    return [CompletionItem(word, type=kind) for word in found if word.startswith(incomplete)]


def complete_mountpoints(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the mountpoints of this user's mounts, and directories where none matches."""
    # For start-up time: only completion needs it.
    from click.shell_completion import CompletionItem

    # For start-up time: only completion needs it.
    from unionfs.daemon.live import live_mounts

    try:
        given = set(context.params.get("mountpoints") or ())
        found = items({mount.settings.mountpoint for mount in live_mounts()} - given, incomplete)
    except (UserError, OSError):
        found = []
    return sorted(found, key=lambda item: str(item.value)) or [CompletionItem(incomplete, type="dir")]


def complete_directories(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    return _paths(incomplete, "dir")


def complete_files(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the paths of files and directories."""
    return _paths(incomplete, "file")


def _paths(incomplete: str, kind: str) -> list[CompletionItem]:
    # For start-up time: only completion needs it.
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type=kind)]


def complete_containers(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the names of kept containers; none if the storage root cannot be read."""
    # For start-up time: only completion needs it.
    from unionfs.containers.store import names
    from unionfs.storage.root import storage_root

    try:
        found = set(names(storage_root(context.params.get("root"))))
    except (UserError, OSError):
        return []
    return items(sorted(found - set(context.params.get("names") or ())), incomplete)


def complete_storage_drivers(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the names of storage drivers."""
    # For start-up time: only completion needs it.
    from unionfs.settings.drivers import STORAGE_DRIVERS

    return items(STORAGE_DRIVERS, incomplete)


def filter_completer(keys: Sequence[str], values: Mapping[str, Sequence[str]]) -> Completer:
    """Return a completer of `KEY=`, and then of its values where those are known."""

    def complete(
        context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        key = incomplete.partition("=")[0]
        if f"{key}=" in incomplete and key in values:
            return items([f"{key}={value}" for value in values[key]], incomplete)
        return items([f"{key}=" for key in keys], incomplete)

    return complete


def complete_mount_options(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the last one of the options of `-o`, or its value."""
    # For start-up time: only completion needs it.
    from unionfs.settings.features import VALUES
    from unionfs.settings.mount import IO_MODES, SESSIONS
    from unionfs.settings.options import KEYS, WORDS

    values = {**VALUES, "session": SESSIONS, "io": IO_MODES}
    before, comma, option = incomplete.rpartition(",")
    key, equals, value = option.partition("=")
    if not equals:
        known = (*(f"{name}=" for name in KEYS), *WORDS)
        return items([f"{before}{comma}{name}" for name in known], incomplete)
    if key in ("lowerdir", "upperdir", "workdir"):
        return _paths(value.rpartition(":")[2], "dir")
    return items([f"{before}{comma}{key}={word}" for word in values.get(key, ())], incomplete)
