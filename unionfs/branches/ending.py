"""Completes a commit, reverts it after an error, and continues either after a kill, by its journal."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress

from unionfs.branches import journal, last, seen, sharing
from unionfs.branches.after import reached
from unionfs.branches.apply import Application, ChangedError, step
from unionfs.branches.ids import entered
from unionfs.branches.journal import Journal
from unionfs.branches.mounts import mounted, parent_claimed
from unionfs.branches.sites import (
    Site,
    committed,
    layer_of,
    remove_stage,
    sites,
    stayed,
    times_kept,
)
from unionfs.branches.store import Branch, Store
from unionfs.branches.view import viewed
from unionfs.errors import UserError, quoted, reason, reason_at
from unionfs.sys import calls
from unionfs.sys.fds import Owned, is_directory
from unionfs.sys.trees import remove_path

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class NotUndoneError(UserError):
    """An undo failed, and everything is as it was committed."""


class UnfinishedError(UserError):
    """A commit or an undo failed in the middle, and the next command goes on with it."""


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Block the signals that end a command, so that none leaves the tree between old and new."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def discard(store: Store, found: Sequence[Site]) -> None:
    """Remove the prepared objects, none of which is in place yet. The first site is the journal's. Raises
    OSError.
    """
    entry = found[0].entry
    for site in found:
        if site.entry.inside:
            remove_stage(site)
    if not all(site.entry.inside for site in found):
        # The journal last: without it a killed undo would be repeated as one of an earlier commit.
        for name in ("new", "old"):
            remove_path(f"{journal.directory(store, entry.id)}/{name}", unlock=True)
        for one in entry.every:
            if one.of_layer:
                remove_path(journal.layer_stage(store, one), unlock=True)
        step("emptied")
    with suppress(FileNotFoundError):
        journal.forget(store, entry.id)


def go_on(store: Store, found: Sequence[Site]) -> None:
    """Apply a journal and complete the commit; revert everything after an error. Raises UserError.

    A commit to a parent needs `end_in_parent` in addition, after the parent was unmounted.
    """
    with _uninterrupted():
        _go_on(store, found)


def _go_on(store: Store, found: Sequence[Site]) -> None:
    entry = found[0].entry
    try:
        for site in found:
            with sharing.opened(layer_of(store, site.entry)) as layer:
                Application(site.entry, site.tree, site.new, site.old, layer).forward()
    except (OSError, UserError) as error:
        entry.turns(journal.BACK)
        with suppress(OSError):  # on a full disk; killed now it goes forward
            journal.mark(store, entry)
        go_back(store, found)
        if isinstance(error, ChangedError):
            raise
        raise UserError(
            f"branch {quoted(entry.branch)} cannot be committed: {_why(error)}; everything was put back."
        ) from error
    with ends_later(entry):
        step("applied")
        _let_go(store, found)
        entry.is_applied(after=last.ended(store))
        journal.write_after(store, entry)
        step("ending")
        if entry.parent is None:
            _end(store, found)


def _let_go(store: Store, found: Sequence[Site]) -> None:
    """Leave to the trees what is in place there, and note their states. Raises UserError, OSError."""
    for site in found:
        with sharing.opened(layer_of(store, site.entry)) as layer:
            sharing.let_go(site.entry, layer)
    step("let go")
    for site in found:
        calls.syncfs(site.tree.fd)
        site.entry.has_reached(reached(site.entry, site.tree) if found[0].entry.can_undo else {})


def _why(error: OSError | UserError) -> str:
    """The cause, for a sentence."""
    if isinstance(error, UserError):
        return str(error).rstrip(".")
    return reason_at(error)


def ends_later(entry: Journal) -> AbstractContextManager[None]:
    """The end of a commit of which all is in place. Raises UserError."""
    return _which_ends_later(
        f"all changes of branch {quoted(entry.branch)} are in place, but its commit cannot end", "commit"
    )


@contextmanager
def _which_ends_later(complaint: str, command: str) -> Iterator[None]:
    """An error does not change what was done, and the next command does the rest. Raises UserError."""
    try:
        yield
    except (OSError, UserError) as error:
        cure = "" if isinstance(error, UserError) else "; free space, or check the permissions"
        raise UnfinishedError(
            f"{complaint}: {_why(error)}; the next `unionfs branch {command}` ends it{cure}."
        ) from error


def end_in_parent(store: Store, entry: Journal, parent: Branch) -> None:
    """Complete a commit to a parent, which is claimed and not mounted: move the replaced objects out of its
    layer."""
    with Owned(os.open(parent.upper, _DIRECTORY)) as layer, suppress(FileNotFoundError), times_kept(layer):
        os.rename(entry.stage, _kept_stage(store, entry), src_dir_fd=layer)
    step("stage moved")
    if entry.keep and (branch := stayed(store, entry)) is not None:
        _accept(store, branch, entry)
    _keep(store, entry)


def _kept_stage(store: Store, entry: Journal) -> bytes:
    return os.fsencode(f"{journal.directory(store, entry.id)}/stage")


def _end(store: Store, found: Sequence[Site]) -> None:
    """Keep the replaced objects for `undo`, or remove them, and remove the branch. All is in place."""
    entry = found[0].entry
    branch = stayed(store, entry)
    if branch is not None and entry.keep:
        _accept(store, branch, entry)
    if not entry.can_undo:
        if branch is not None and not entry.keep:
            branch.remove()
        step("branch removed")
        last.note(store, entry)
        discard(store, found)
        _forget_former(store, entry)
        return
    _keep(store, entry)


def _keep(store: Store, entry: Journal) -> None:
    """Keep the replaced objects for `undo`, and drop those of earlier commits."""
    if not entry.keep and (branch := stayed(store, entry)) is not None:
        os.rename(branch.path, f"{journal.directory(store, entry.id)}/branch")
        step("branch moved")
    last.note(store, entry)
    entry.turns(journal.DONE)
    journal.mark(store, entry)
    step("ended")
    _forget_former(store, entry)


def _forget_former(store: Store, entry: Journal) -> None:
    """Remove what former commits keep, which can be undone no longer. Raises OSError."""
    for id in store.commit_ids():
        other = journal.read(store, id) if id != entry.id else None
        if other is None or other.ids != entered():
            continue  # a command with that branch's ids does it
        if other.state == journal.DONE and other.ended < entry.ended:
            _forget(store, other)


def _forget(store: Store, other: Journal) -> None:
    """Remove what a former commit keeps. Raises OSError."""
    if any(one.stays for one in other.all):
        try:
            with sites(store, other, make=False, only=lambda one: one.stays) as found:
                for site in found:
                    remove_stage(site)
        except UserError:
            return  # its filesystem is not mounted: the next commit tries again
    journal.forget(store, other.id)


def _accept(store: Store, branch: Branch, entry: Journal) -> None:
    """Record the present state of the committed paths as the state that the branch was made from."""
    for one in entry.all:
        part = committed(branch, one)
        with viewed(part) as view:
            seen.accept(part, view, *_accepted(one), journal.former_states(store, one))


def _accepted(entry: Journal) -> tuple[list[str], list[str]]:
    """The paths that a commit has changed with all below them, and directories that stay."""
    paths = [move.path for move in entry.moves]
    paths += [move.source for move in entry.moves if move.source is not None]
    return paths, [setting.former for setting in entry.settings]


def _accept_returned(store: Store, branch: Branch, entry: Journal) -> None:
    """Record the states before the commit, and the new ctimes of the objects that its revert has renamed."""
    for one in entry.all:
        part = committed(branch, one)
        seen.restore(part, *_accepted(one), journal.former_states(store, one))
        sources = {move.path: move.source for move in one.moves if move.source is not None}
        with viewed(part) as view:
            seen.returned(part, view, [_former(move.path, sources) for move in one.moves])


def _former(path: str, sources: Mapping[str, str]) -> str:
    """The path before the commit of the object at `path` after it."""
    above = path
    while above:
        if above in sources:
            return sources[above] + path[len(above) :]
        above = above.rpartition("/")[0]
    return path


def go_back(store: Store, found: Sequence[Site]) -> None:
    """Revert a commit, and forget it. Raises UserError if that fails; the next command continues then."""
    with _uninterrupted():
        _go_back(store, found)


def _go_back(store: Store, found: Sequence[Site]) -> None:
    entry = found[0].entry
    try:
        for site in reversed(found):
            with sharing.opened(layer_of(store, site.entry)) as layer:
                Application(site.entry, site.tree, site.new, site.old, layer).backward()
                sharing.give_back(site.entry, layer, site.new)
        step("given back")
    except (OSError, UserError) as error:
        if entry.ended and _is_again_in_place(store, found):
            raise NotUndoneError(
                f"the commit of branch {quoted(entry.branch)} cannot be undone: {_why(error)}; everything is "
                "as it was committed."
            ) from error
        raise UnfinishedError(
            f"the commit of branch {quoted(entry.branch)} cannot be taken back: {_why(error)}; its files "
            f"are in {quoted(journal.directory(store, entry.id))}. The next `unionfs branch commit` goes on."
        ) from error
    done = "is undone" if entry.ended else "was put back"
    with _which_ends_later(
        f"the commit of branch {quoted(entry.branch)} {done}, but cannot end",
        "undo" if entry.ended else "commit",
    ):
        _return_branch(store, found)


def _is_again_in_place(store: Store, found: Sequence[Site]) -> bool:
    """Apply everything again after an undo that failed. Returns whether that is done; else the next command
    goes on with the undo.
    """
    entry = found[0].entry
    try:
        for site in found:
            with sharing.opened(layer_of(store, site.entry)) as layer:
                Application(site.entry, site.tree, site.new, site.old, layer).forward(again=True)
        _let_go(store, found)
        entry.turns(journal.ENDING)
        journal.write_after(store, entry)
    except (OSError, UserError):
        entry.turns(journal.BACK)
        return False
    with suppress(OSError, UserError):  # else the next command does it
        if entry.parent is None:
            _end(store, found)
    return True


def _return_branch(store: Store, found: Sequence[Site]) -> None:
    """Restore the branch of a reverted commit, and forget that. Raises UserError, OSError."""
    entry = found[0].entry
    kept = f"{journal.directory(store, entry.id)}/branch"
    if is_directory(kept):
        os.rename(kept, free_name(store, entry.branch).path)
        step("branch back")
    if entry.ended:
        last.note(store, entry, undone=True)
    if (branch := stayed(store, entry)) is not None:
        if entry.parent is None:
            _accept_returned(store, branch, entry)
        else:
            # Nothing else changes it meanwhile, and what is in its layer now has other inode numbers.
            _accept(store, branch, entry)
    discard(store, found)


def free_name(store: Store, name: str) -> Branch:
    """The first branch that does not exist of NAME, NAME-2, NAME-3 and so on."""
    branch, count = store.branch(name), 1
    while branch.exists():
        count += 1
        branch = store.branch(f"{name}-{count}")
    return branch


def recover(store: Store, name: str | None = None) -> dict[str, Journal]:
    """Complete the commits and undos of killed commands. The caller holds the store's lock.

    Returns the branches whose commit was completed, with its journal. One that cannot be completed is left;
    raises UserError for one of the branch `name`.
    """
    finished: dict[str, Journal] = {}
    for id in store.commit_ids():
        entry = None
        try:
            entry = journal.read(store, id)
            if entry is None:
                journal.forget(store, id)
            elif entry.ids != entered():
                continue  # a command with that branch's ids does it
            elif entry.state != journal.DONE and finish(store, entry):
                finished[entry.branch] = entry
        except (UserError, OSError) as error:
            if entry is not None and entry.branch != name:
                continue
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"an interrupted commit cannot be finished: {reason(error)}; its files are in "
                f"{quoted(journal.directory(store, id))}."
            ) from error
    return finished


def finish(store: Store, entry: Journal, *, is_new: bool = False) -> bool:
    """Complete or revert a commit. Returns whether it was completed. Raises UserError, OSError.

    `is_new`: it is an undo that has just begun: nothing of it is done if its parent cannot be mounted.
    """
    if entry.parent is None:
        return _settle(store, entry)
    with parent_claimed(store, entry.branch, entry.made, entry.parent) as parent:
        if parent.record().created != entry.parent_made:
            raise UserError(
                f"the branch that {quoted(entry.branch)} was committed to is gone, and another has its name "
                f"{quoted(entry.parent)}; move {quoted(journal.directory(store, entry.id))} away."
            )
        done = entry.state == journal.ENDING
        if not done:
            # After an undo it is there.
            with (
                Owned(os.open(parent.upper, _DIRECTORY)) as layer, suppress(FileNotFoundError),
                times_kept(layer),
            ):  # fmt: skip
                os.rename(_kept_stage(store, entry), entry.stage, dst_dir_fd=layer)
            step("stage back")
            try:
                with mounted(parent):
                    done = _settle(store, entry)
            except UnfinishedError:
                raise
            except (OSError, UserError) as error:
                if is_new or isinstance(error, NotUndoneError):
                    with suppress(OSError, UserError):  # else the next command does it
                        end_in_parent(store, entry, parent)
                raise
        if done:
            end_in_parent(store, entry, parent)
        return done


def _settle(store: Store, entry: Journal) -> bool:
    """Complete or revert a commit to the trees at its bases. Returns whether it was completed."""
    goes = entry.state in (journal.ON, journal.BACK)
    with sites(store, entry, make=goes) as found:
        if entry.state == journal.NEW:
            discard(store, found)
            return False
        if entry.state == journal.ENDING:
            _end(store, found)
            return True
        if entry.state == journal.ON:
            go_on(store, found)
            return True
        go_back(store, found)
        return False
