"""`unionfs branch commit` and `undo`."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any

import click

from unionfs.cli.branch.common import CONFLICTS, complete_branches, json_option
from unionfs.cli.common import complain, print_json, root_option, tell
from unionfs.cli.terminal import shell_word
from unionfs.errors import quoted
from unionfs.settings.words import moment

if TYPE_CHECKING:
    from unionfs.branches.commit import Result


@click.command(
    epilog="""\b
Examples:
  unionfs branch commit fix
  unionfs branch commit --dry-run --json fix
  unionfs branch commit --only src --except '*.o' fix
""",
)
@click.option("--into", metavar="BRANCH", help="The parent of the branch, to be sure that it goes there.")
@click.option("--only", multiple=True, metavar="PATTERN",
              help="Only these paths; the branch stays with the rest. May be repeated.")  # fmt: skip
@click.option("--except", "leave", multiple=True, metavar="PATTERN",
              help="All but these paths; may be repeated.")  # fmt: skip
@click.option("--ours", is_flag=True, help="In conflicts take the branch's version.")
@click.option("--theirs", is_flag=True, help="In conflicts keep the version below.")
@click.option("--merge", is_flag=True,
              help="In conflicts merge texts by git merge-file, if `try` has kept the original.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only print what would be done, and the conflicts.")
@root_option
@json_option
@click.argument("name", shell_complete=complete_branches)
def commit(
    into: str | None, only: tuple[str, ...], leave: tuple[str, ...], ours: bool, theirs: bool, merge: bool,
    dry_run: bool, root: str | None, as_json: bool, name: str,
) -> int:  # fmt: skip
    """Apply the branch NAME to what lies below it, its base or its parent, all or nothing; then the branch
    ends.

    A path that was also changed below since the branch was made is a conflict: conflicts are listed, and
    nothing is done, unless --ours, --theirs or --merge decides. The same command completes a killed commit.

    The exit code is 0 if all is done, 3 if there are conflicts and nothing was changed, else 1.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.commit import MERGE, OURS, STOP, THEIRS, Wish
    from unionfs.branches.commit import commit as apply
    from unionfs.branches.ids import enter
    from unionfs.branches.journal import ids_of
    from unionfs.branches.store import Store

    chosen = [word for word, given in ((OURS, ours), (THEIRS, theirs), (MERGE, merge)) if given]
    if len(chosen) > 1:
        raise click.UsageError(f"{' and '.join(f'--{word}' for word in chosen)} exclude each other")
    # The many thousands of changes are not garbage, however often they are examined.
    gc.disable()
    wish = Wish(into, only, leave, dry_run, chosen[0] if chosen else STOP)
    store = Store(root)
    enter(ids_of(store, name))
    result = apply(store, name, wish)
    if as_json:
        print_json({"name": name, **values(result)})
    else:
        report(name, result, dry_run=dry_run)
    return CONFLICTS if result.stopped and not (dry_run and chosen) else 0


def values(result: Result) -> dict[str, Any]:
    """A result for JSON."""
    return {
        "target": result.target, "done": result.done, "went_on": result.went_on,
        "before": moment(result.before / 1e9) if result.before else None, "undo": result.undo,
        "changes": [[kind, os.fsdecode(path[1:])] for kind, path in result.changes],
        "conflicts": [[what, os.fsdecode(path[1:])] for what, path in result.conflicts],
        "skipped": [os.fsdecode(path[1:]) for path in result.skipped],
        "merged": [os.fsdecode(path[1:]) for path in result.merged], "hazards": result.hazards,
    }  # fmt: skip


def report(name: str, result: Result, *, dry_run: bool = False) -> None:
    """Print a result for people."""
    for sentence in result.hazards:
        tell(sentence)
    for what, path in result.conflicts:
        print(f"conflict: {shell_word(path[1:])} ({what} below since)")
    for path in result.merged:
        print(f"merged: {shell_word(path[1:])}")
    for path in result.skipped:
        print(f"kept: {shell_word(path[1:])}")
    if dry_run:
        for kind, path in result.changes:
            print(f"{kind} {shell_word(path[1:])}")
    elif result.stopped:
        count = len(result.conflicts)
        complain(
            "unionfs",
            f"branch {name} was not committed: {count} {'path was' if count == 1 else 'paths were'} changed "
            "below, too; decide by --ours, --theirs or --merge, or choose paths by --only.",
        )
    elif result.before:
        taken_back = "; `unionfs branch undo` takes that back" if result.undo else ""
        print(f"nothing to commit: {name} was committed to {quoted(result.target)} at "
              f"{moment(result.before / 1e9)}{taken_back}")  # fmt: skip
    else:
        went_on = "an interrupted commit was finished: " if result.went_on else ""
        for_good = "" if result.undo else "; it cannot be undone: the store is on another filesystem"
        print(f"{went_on}committed {name} to {quoted(result.target)}{for_good}")


@click.command(epilog="Example: unionfs branch undo")
@root_option
@json_option
def undo(root: str | None, as_json: bool) -> None:
    """Undo the last commit of the storage root, and restore its branch.

    It works only once, and only if nothing that the commit changed has changed since. A commit to a base can
    be undone only if the base and the store are on one filesystem; an earlier one is not undone instead.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.ids import enter
    from unionfs.branches.journal import ids_of
    from unionfs.branches.store import Store
    from unionfs.branches.undo import undo as take_back

    store = Store(root)
    enter(ids_of(store))
    entry = take_back(store)
    if as_json:
        base = entry.base if entry.parent is None else store.branch(entry.parent).record().base
        print_json({"name": entry.branch, "base": base, "parent": entry.parent})
    else:
        print(f"undid the commit of {entry.branch} to {quoted(entry.target)}")
