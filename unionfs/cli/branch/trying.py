"""`unionfs try` and `unionfs branch shell`."""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from unionfs.cli.branch.common import complete_branches
from unionfs.cli.common import complain, root_option, tell
from unionfs.cli.completing import complete_directories, complete_files
from unionfs.errors import UserError, on_failure, quoted, reason

if TYPE_CHECKING:
    from unionfs.branches.describe import Difference
    from unionfs.branches.ids import Ids
    from unionfs.branches.store import Branch, Store
    from unionfs.branches.together import Viewed

_NOT_STARTED = (126, 127)
_MOST_LINES = 20


@click.command(
    "try",
    context_settings={"allow_interspersed_args": False},
    epilog="""\b
Examples:
  unionfs try -- ./configure --prefix=/usr
  unionfs try -n agent -D ~/project --net none -- agent "fix the login page"
  unionfs try --commit -- sed -i s/old/new/ *.txt
  unionfs try -D / -n nginx -- apt-get install nginx
""",
)
@click.option("-n", "--name", metavar="NAME", help="The branch's name; an existing branch is continued.")
@click.option("-D", "--dir", "base", metavar="DIR", shell_complete=complete_directories,
              help="The directory that the branch lies over.  [.]")
@click.option("--from", "parent", metavar="BRANCH", shell_complete=complete_branches,
              help="Lie over another branch instead.")  # fmt: skip
@click.option("--net", "own_network", type=click.Choice(["host", "none"]), default="host", show_default=True,
              callback=lambda context, parameter, net: net == "none",
              help="The host's network, or none but loopback.")  # fmt: skip
@click.option("--hide", multiple=True, metavar="PATH", shell_complete=complete_files,
              help="Hide PATH from the command.")
@click.option("--rw", "writable", multiple=True, metavar="PATH", shell_complete=complete_files,
              help="Let the command change this for good, not on the branch; may be repeated.")  # fmt: skip
@click.option("--commit", "then", flag_value="commit",
              help="Commit afterwards if the exit code is 0, else keep.")
@click.option("--keep", "then", flag_value="keep", help="Keep the branch afterwards.")
@click.option("--look", "then", flag_value="look", help="Show the diff afterwards, and keep the branch.")
@click.option("--discard", "then", flag_value="discard", help="Remove the branch afterwards.")
@click.option("-q", "--quiet", is_flag=True, help="Do not print the changes.")
@click.option("--report", metavar="FILE", shell_complete=complete_files,
              help="Write branch, exit code and changes there as JSON.")
@root_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, shell_complete=complete_files)
def try_(
    name: str | None, base: str | None, parent: str | None, then: str | None, quiet: bool,
    report: str | None, root: str | None, **wish: Any,
) -> int:  # fmt: skip
    """Run COMMAND on a branch that lies over DIR, and then ask: commit, keep, look or discard.

    The branch is at DIR's own path, so all paths mean the same. The rest of the system is read-only for the
    command, except private /tmp, /var/tmp, /run and /dev; it has the capabilities and the system call
    filter of `unionfs run`. With -D / the branch is the whole system. Filesystems that are mounted below DIR
    are listed: the branch covers most of them, too, and the others are read-only. Without a terminal, or
    with --keep, the branch stays, and how to go on is printed. A new branch without changes is removed.

    The exit code is the command's; 128 plus the signal's number if a signal ended it; 126 or 127 if it
    cannot be executed or found; 1 if the branch cannot be used, or not be committed; 3 if that met conflicts.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.store import Store

    store = Store(root)
    if report is not None:
        _refuse_unwritable(report)
    fresh, branch = _branch(store, name, base, parent)
    code = _run(store, branch, fresh, wish)
    if code in _NOT_STARTED and not branch.exists():
        return code
    return _afterwards(store, branch, code, fresh=fresh, then=then, quiet=quiet, report=report)


@click.command(epilog="Example: unionfs branch shell fix")
@root_option
@click.argument("name", shell_complete=complete_branches)
def shell(root: str | None, name: str) -> int:
    """Run $SHELL on the branch NAME, as `try` does, and keep it. The exit code is the shell's."""
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.store import Store

    store = Store(root)
    words = {"command": (os.environ.get("SHELL") or "/bin/sh",)}
    return _run(store, store.existing(name), fresh=False, wish=words)


def _branch(store: Store, name: str | None, base: str | None, parent: str | None) -> tuple[bool, Branch]:
    """The branch to use, and whether it is new."""
    if base is not None and parent is not None:
        raise click.UsageError("-D and --from exclude each other")
    if name is not None and (branch := store.branch(name)).exists():
        record = branch.record()
        if base is not None and not _is_same(base, record.base):
            raise UserError(
                f"branch {quoted(name)} lies over {quoted(record.base)}, not over {quoted(base)}; "
                "leave -D out, or "
                "choose another name."
            )
        if parent is not None and parent != record.parent:
            raise UserError(f"branch {quoted(name)} does not lie over {quoted(parent)}; choose another name.")
        return False, branch
    name = name or f"try-{os.urandom(3).hex()}"
    if parent is None:
        return True, store.create(name, base or ".", ids=_ids(base or "."))
    # For start-up time: a branch over a directory does not need it.
    from unionfs.branches.ids import enter
    from unionfs.branches.mounts import create

    enter(store.existing(parent).record().ids)
    return True, create(store, name, base or ".", parent)


def _is_same(base: str, real: str) -> bool:
    """Whether a path leads to `real`; not if it is relative and the working directory is gone."""
    with suppress(FileNotFoundError):
        return os.path.realpath(base) == real
    return False


def _here() -> str:
    """The working directory, `/` if it was removed."""
    with suppress(FileNotFoundError):
        return os.getcwd()
    os.chdir("/")
    return "/"


def _ids(base: str) -> Ids | None:
    """The ids of an ordinary user's command on the whole system, which is uid 0 of a user namespace."""
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.ids import inside, of_user
    from unionfs.branches.record import WHOLE

    if os.geteuid() == 0 or not _is_same(base, WHOLE):
        return None
    ids = of_user()
    if not isinstance(ids, str):
        try:
            inside(ids, lambda: None)
            return ids
        except UserError as error:
            ids = str(error).rstrip(".")
    tell(f"the command has no ids but uid 0, so chown and apt-get fail in it: {ids}.")
    return None


def _run(store: Store, branch: Branch, fresh: bool, wish: dict[str, Any]) -> int:
    """Run the command; a new branch on which it could not be started is removed."""
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.ids import enter
    from unionfs.branches.trying import Wish, try_on
    from unionfs.containers.process import CommandError

    try:
        enter(branch.record().ids)
        return try_on(store, branch, Wish(here=_here(), **wish), tell)
    except (UserError, OSError) as error:
        with suppress(UserError):
            if fresh and _is_empty(branch):
                branch.remove()
        if isinstance(error, CommandError):
            return complain("unionfs", str(error), error.code)
        raise


def _is_empty(branch: Branch) -> bool:
    """Whether a branch changes nothing; its layer hides a store that is in the base. Raises UserError."""
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.parts import all_of

    if not any(os.listdir(one.upper) for one in all_of(branch)):
        return True
    # For start-up time: only a store in the base needs it.
    from unionfs.branches.together import all_viewed

    with all_viewed(branch) as found:
        return all(one.view.is_empty for one in found)


def _afterwards(
    store: Store, branch: Branch, code: int, *, fresh: bool, then: str | None, quiet: bool, report: str | None
) -> int:
    """Print the changes, and do as the options or the answer say."""
    found, lines = _described(branch, code, report)
    if not found and fresh:
        branch.remove()
        return code
    if not quiet:
        print("\n".join(lines or [f"branch {branch.name}: no changes"]), file=sys.stderr)
    if then == "commit" and code != 0:
        tell(f"branch {branch.name} was not committed, since the command's exit code is {code}.")
        then = "keep"
    return _do(store, branch, code, then or _asked(branch), quiet=quiet)


def _described(branch: Branch, code: int, report: str | None) -> tuple[list[Difference], list[str]]:
    """The changes, and the lines about them; writes the report."""
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.parts import is_untouched

    if is_untouched(branch):
        if report is not None:
            _write(report, {"name": branch.name, "exit_code": code, "changes": []})
        return [], []
    # For start-up time: commands that change nothing do not need it.
    from unionfs.branches.together import all_viewed

    with all_viewed(branch) as views:
        found, lines = _changes(branch, views)
    if report is not None:
        values = [item.to_json() for item in found]
        _write(report, {"name": branch.name, "exit_code": code, "changes": values})
    return found, lines


def _changes(branch: Branch, views: list[Viewed]) -> tuple[list[Difference], list[str]]:
    """The changes, which are remembered, and the lines about them."""
    # For start-up time: commands that change nothing do not need it.
    from unionfs.branches import seen
    from unionfs.branches.merging import keep_originals
    from unionfs.branches.selection import NOISE, Selection
    from unionfs.branches.together import Describers
    from unionfs.cli.branch.differences import hidden, rendered, total

    describers, noise, all_found = Describers(views), Selection((), NOISE), []
    for one, describer in describers.each:
        items = describer.differences()
        known, _ = seen.look(one.branch, one.view)
        keep_originals(one.branch, describer, items, known)
        all_found.append(items)
    found = describers.together(all_found)
    shown = [item for item in found if noise.has(b"/" + item.path)]
    lines = [*rendered(describers, shown[:_MOST_LINES], None)]
    if len(shown) > _MOST_LINES:
        lines.append(f"and {len(shown) - _MOST_LINES} more")
    return found, [*lines, *hidden(len(found) - len(shown)), f"branch {branch.name}: {total(found)}"]


def _refuse_unwritable(report: str) -> None:
    """Refuse a report that cannot be written, before the command runs. Raises UserError."""
    if report == "-":
        return
    place = report if os.path.lexists(report) else os.path.dirname(report) or "."
    with on_failure(f"the report {quoted(report)} cannot be written", "name another file by --report"):
        if os.path.isdir(report):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        os.stat(place)
        if not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _write(path: str, values: object) -> None:
    """Write the report. An error does not prevent what comes after."""
    text = json.dumps(values, indent=2)
    if path == "-":
        print(text)
        return
    try:
        with open(path, "w", encoding="utf-8") as out:
            out.write(text)
    except OSError as error:
        tell(
            f"the report {quoted(path)} cannot be written: {reason(error)}; `unionfs branch diff --json` "
            "shows the changes."
        )


def _asked(branch: Branch) -> str:
    """What the user wants, `keep` without a terminal."""
    # For start-up time: only a terminal needs it.
    from unionfs.cli.branch.differences import diff

    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return "keep"
    answers = {"c": "commit", "k": "keep", "l": "look", "d": "discard"}
    while True:
        text = click.prompt("[c]ommit, [k]eep, [l]ook, or [d]iscard?", default="k", err=True).strip().lower()
        answer = answers.get(text[:1])
        if answer == "look":
            diff.main(["--content", "--root", branch.store.root, branch.name], standalone_mode=False)
        elif answer is not None:
            return answer


def _do(store: Store, branch: Branch, code: int, then: str, *, quiet: bool) -> int:
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.commit import Wish, commit
    from unionfs.cli.branch.committing import report
    from unionfs.cli.branch.common import CONFLICTS
    from unionfs.cli.branch.differences import diff

    name = branch.name
    if then == "look":
        diff.main(["--content", "--root", store.root, name], standalone_mode=False)
    if then == "discard":
        branch.remove()
    elif then == "commit":
        result = commit(store, name, Wish())
        report(name, result)
        return CONFLICTS if result.stopped else code
    elif not quiet:
        print(
            f"kept as branch {name}: unionfs branch diff {name} | commit {name} | shell {name} | "
            f"discard {name}",
            file=sys.stderr,
        )
    return code
