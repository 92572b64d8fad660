"""`unionfs branch create`, `mount`, `discard`, `rename` and `rm`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from unionfs.cli.branch.common import complete_branches, json_option
from unionfs.cli.common import for_each, print_json, root_option
from unionfs.cli.completing import complete_directories
from unionfs.errors import UserError, quoted

if TYPE_CHECKING:
    from unionfs.branches.ids import Ids
    from unionfs.branches.store import Branch


@click.command(
    epilog="""\b
Examples:
  unionfs branch create --base /srv/site fix
  unionfs branch create --from fix fix-more /mnt
""",
)
@click.option("--base", metavar="DIR", shell_complete=complete_directories,
              help="The directory that it lies over.")
@click.option("--from", "parent", metavar="BRANCH", shell_complete=complete_branches,
              help="The branch that it lies over; that one is frozen meanwhile.")  # fmt: skip
@click.option("--no-mount", is_flag=True, help="Do not mount it.")
@root_option
@json_option
@click.argument("name")
@click.argument("mountpoint", shell_complete=complete_directories, required=False)
def create(
    base: str | None, parent: str | None, no_mount: bool, root: str | None, as_json: bool, name: str,
    mountpoint: str | None,
) -> None:  # fmt: skip
    """Create the branch NAME and mount it at MOUNTPOINT, by default below the store; prints where.

    It takes no time and no space, whatever the size of the base. `unionfs umount` unmounts it; it stays
    until it is committed or discarded.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.mounts import create as make
    from unionfs.branches.mounts import mount_branch
    from unionfs.branches.store import Store

    if (base is None) == (parent is None):
        raise click.UsageError("either --base DIR or --from BRANCH is needed")
    if no_mount and mountpoint is not None:
        raise click.UsageError("--no-mount and a mountpoint exclude each other")
    store = Store(root)
    made = make(store, name, base or "", parent)
    place = None
    if not no_mount:
        try:
            place = mount_branch(made, mountpoint).mountpoint
        except BaseException:
            made.remove()
            raise
    _show(name, made.upper, place, as_json)


@click.command(epilog="Example: unionfs branch mount fix /mnt")
@click.option("--lives-with", type=int, metavar="PID", hidden=True,
              help="The process that has claimed the branch, whose end ends the mount.")  # fmt: skip
@click.option("--part", metavar="K", hidden=True, help="A part of it, with --lives-with.")
@root_option
@json_option
@click.argument("name", shell_complete=complete_branches)
@click.argument("mountpoint", shell_complete=complete_directories, required=False)
def mount(
    lives_with: int | None, part: str | None, root: str | None, as_json: bool, name: str,
    mountpoint: str | None,
) -> None:  # fmt: skip
    """Mount the branch NAME at MOUNTPOINT, by default below the store, and print where."""
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.mounts import mount_branch
    from unionfs.branches.parts import Part
    from unionfs.branches.store import Store

    branch = Store(root).existing(name)
    if lives_with is not None:
        mount_branch(branch if part is None else Part(branch, part), mountpoint, lives_with=lives_with)
        return
    with branch.claimed("mounted"):
        _show(name, branch.upper, mount_branch(branch, mountpoint).mountpoint, as_json)


def _show(name: str, upper: str, mountpoint: str | None, as_json: bool) -> None:
    if as_json:
        print_json({"name": name, "upper": upper, "mountpoint": mountpoint})
    else:
        print(mountpoint or name)


@click.command(epilog="Example: unionfs branch discard fix")
@root_option
@json_option
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_branches)
def discard(root: str | None, as_json: bool, names: tuple[str, ...]) -> int:
    """Unmount and remove branches with all their changes, and print their names.

    A branch that others lie over, or that is in use, stays and is reported.
    """
    return _remove_each(root, names, with_changes=True, as_json=as_json)


@click.command(epilog="Example: unionfs branch rm fix")
@click.option("-f", "--force", is_flag=True, help="Also with changes, as `discard`.")
@root_option
@json_option
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_branches)
def rm(force: bool, root: str | None, as_json: bool, names: tuple[str, ...]) -> int:
    """Unmount and remove branches that change nothing, and print their names."""
    return _remove_each(root, names, with_changes=force, as_json=as_json)


def _remove_each(root: str | None, names: tuple[str, ...], *, with_changes: bool, as_json: bool) -> int:
    removed = []

    def remove(name: str) -> bool:
        _remove(root, name, with_changes=with_changes)
        removed.append(name)
        return not as_json

    code = for_each(_children_first(root, names), remove)
    if as_json:
        print_json({"removed": removed})
    return code


def _children_first(root: str | None, names: Sequence[str]) -> list[str]:
    """The names, each after those of branches that lie over it."""
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.store import Store

    parents = {}
    with suppress(UserError):
        for branch in Store(root).branches():
            with suppress(UserError):  # a damaged one can be removed
                parents[branch.name] = branch.record().parent

    def depth(name: str) -> int:
        above, seen = parents.get(name), {name}
        while above is not None and above not in seen:
            seen.add(above)
            above = parents.get(above)
        return len(seen)

    return sorted(names, key=depth, reverse=True)


def _remove(root: str | None, name: str, *, with_changes: bool) -> None:
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.ids import inside
    from unionfs.branches.store import Store

    branch = Store(root).existing(name)
    inside(_ids(branch), lambda: _remove_here(branch, with_changes=with_changes))


def _ids(branch: Branch) -> Ids | None:
    try:
        return branch.record().ids
    except UserError:
        return None  # a damaged one can be removed


def _remove_here(branch: Branch, *, with_changes: bool) -> None:
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.mounts import unmounted
    from unionfs.branches.parts import all_of
    from unionfs.branches.together import all_viewed

    name = branch.name
    with branch.claimed("removed"):
        branch.refuse_frozen("be removed")
        for one in all_of(branch):
            unmounted(one)
        if not with_changes and os.path.isdir(branch.record().base):
            with all_viewed(branch) as found:
                if not all(one.view.is_empty for one in found):
                    raise UserError(
                        f"branch {quoted(name)} has changes; commit it, or remove it with them by `unionfs "
                        f"branch discard {quoted(name)}`."
                    )
        branch.remove()


@click.command(epilog="Example: unionfs branch rename fix fix-login")
@root_option
@json_option
@click.argument("name", shell_complete=complete_branches)
@click.argument("new")
def rename(root: str | None, as_json: bool, name: str, new: str) -> None:
    """Give the branch NAME the name NEW. It must not be mounted, nor have branches over it."""
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.mounts import mount_of
    from unionfs.branches.store import Store

    branch = Store(root).existing(name)
    with branch.claimed("renamed"):
        entry = mount_of(branch)
        if entry is not None:
            raise UserError(
                f"branch {quoted(name)} is mounted at {quoted(entry.settings.mountpoint)}; unmount it first."
            )
        branch.rename(new)
    if as_json:
        print_json({"name": new, "former": name})
