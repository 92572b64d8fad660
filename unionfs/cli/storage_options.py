"""The storage options of `mount` and `run`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from unionfs.cli.common import root_option

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

HELP = """\b
    Storage (-v, --mount, --tmpfs), as for docker run:
      -v NAME:/target[:ro,nocopy]   a named volume, created if missing
      -v /host/path:/target[:ro]    a directory or file of the host; a missing
                                    directory is created
      -v /target                    an anonymous volume
      --mount type=volume,source=NAME,target=/target[,readonly,volume-nocopy,
              volume-driver=,volume-opt=K=V,volume-subpath=]
      --mount type=bind,source=/host/path,target=/target[,readonly,
              bind-propagation=,bind-create-src,bind-recursive=]
              a missing source is an error without bind-create-src
      --mount type=tmpfs,target=/target[,readonly,tmpfs-size=64m,
              tmpfs-mode=1777]
      --tmpfs /target[:ro,size=64m,mode=1777,nr_inodes=,uid=,gid=,exec,swap]

    At most one mount per target, and none at /. A missing target is created. An empty volume is filled with
    what the union has at its target. A tmpfs is not swapped out where the kernel supports that (swap allows
    it), and is mounted nosuid,nodev,noexec."""


def _complete_sources(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the names of volumes, and else paths."""
    # For start-up time: only completion needs it.
    from click.shell_completion import CompletionItem

    # For start-up time: only completion needs it.
    from unionfs.cli.volume.common import complete_volumes

    found = [CompletionItem(f"{one.value}:") for one in complete_volumes(context, parameter, incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def storage_options(command: Callable[..., int]) -> Callable[..., int]:
    """Add the storage options to a command, which receives `root` and the parsed specs as `storage`.

    Replaces `{storage}` in its help by the help of these options.
    """

    @wraps(command)
    def with_storage(
        volumes: tuple[str, ...], mounts: tuple[str, ...], tmpfs: tuple[str, ...], **others: Any
    ) -> int:
        if not (volumes or mounts or tmpfs):
            return command(storage=(), **others)
        # For start-up time: most calls have no storage.
        from unionfs.settings.parsing import parse_all

        return command(storage=parse_all(volumes, mounts, tmpfs), **others)

    with_storage.__doc__ = (command.__doc__ or "").replace("{storage}", HELP)
    added: Callable[..., int] = with_storage
    for option in reversed((
        click.option(
            "-v", "--volume", "volumes", multiple=True, metavar="[SRC:]TARGET[:MODE]",
            shell_complete=_complete_sources,
            help="Mount a volume or a host path into the union.",
        ),
        click.option(
            "--mount", "mounts", multiple=True, metavar="KEY=VALUE,...",
            help="The same in long form, also for tmpfs.",
        ),
        click.option(
            "--tmpfs", "tmpfs", multiple=True, metavar="TARGET[:OPT,...]",
            help="Mount an empty tmpfs into the union.",
        ),
        root_option,
    )):  # fmt: skip
        added = option(added)
    return added
